"""LightningCLI, set up for the ``lightning-merge`` command."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core import rank_zero

from lightning_merge.callbacks import League
from lightning_merge.files._read import read

# Shown on every run, and nothing a user of a recipe could act on.
_NOISE = (
    r".*does not have many workers.*",
    r".*is smaller than the logging interval.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*LightningCLI's args parameter is intended to run from within Python.*",
)

# Lines of jsonargparse's reports that say how it tried rather than what is wrong.
_ROUTE = re.compile(
    r"(- )?(Does not validate|Subtypes:|Errors:|Given value type:|Given value: (Namespace|NestedArg)"
    r"|Expected a <class 'NoneType'>)"
)
_PLAINER = (
    (r'Parser key "([^"]+)":', r"`\1`:"),
    (r"Expected an? <class '([^']+)'>", r"expected \1"),
    (r"(Given|Got) value:", "given value:"),
    (r"required: (?:fit|validate|test|predict)\.(\S+)", r"required: `--\1`"),
)


class Parser(LightningArgumentParser):
    """Takes options in full only: an abbreviation would be another option, or none, after the next release."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "lightning-merge", "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with code 2 and the message only; a hundred lines of usage would push it off the screen."""
        if not self.exit_on_error:  # a parser of a nested class, whose error becomes part of another
            super().error(message, ex)
        said = condensed(message)
        mean = _meant(message, list(_options_of(self)))
        if "`--model`" in said:
            mean = ". Type `--config mine.yaml`; `lightning-merge recipes digits/swa > mine.yaml` gives one to change"
        print(f"lightning-merge: error: {said}{mean}\n`--help` lists all options.", file=sys.stderr)
        self.exit(2)


class _Stderr(logging.StreamHandler[TextIO]):
    """Logs to the current ``sys.stderr``, which a live progress bar replaces to show lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _CLI(LightningCLI):
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds it, with a bar that stays on one line in the place of Lightning's."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
        for place, callback in enumerate(callbacks):
            if type(callback) is RichProgressBar:  # so rich is installed
                from lightning_merge.recipes._progress import OneLineProgressBar

                callbacks[place] = OneLineProgressBar()
        return trainer

    def after_fit(self) -> None:
        """Reports the winner of a league on test data, where there are some: it was chosen on validation."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
        for league in (callback for callback in callbacks if isinstance(callback, League)):
            source = self.model if self.datamodule is None else self.datamodule
            tests = is_overridden("test_step", self.model) and is_overridden("test_dataloader", source)
            if league.path is not None and tests:
                self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=league.path, verbose=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses, and reads the requested checkpoint, so that a bad file is reported before anything is built."""
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and Path(path).is_file():
            read(Path(path))


def run(args: list[str]) -> None:
    """Runs ``fit``, ``validate``, ``test`` or ``predict`` with the options of LightningCLI.

    ``${...}`` in a file refers to the value after all files and options are read, so a schedule whose length is
    ``${trainer.max_epochs}`` follows ``--trainer.max_epochs 5``.
    """
    quiet()
    _CLI(
        args=args,
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        # Testing a run leaves nothing behind in its folder.
        save_config_callback=SaveConfigCallback if args[:1] == ["fit"] else None,
    )


def quiet() -> None:
    """Sets how ``${...}`` is read, and filters output that nobody could act on."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    rank_zero.log.addFilter(_is_no_tip)  # the last Lightning package that was imported has set it
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers = [_Stderr() if type(h) is logging.StreamHandler else h for h in logger.handlers]


def instantiate(config: Path) -> tuple[Trainer, LightningModule, LightningDataModule | None]:
    """Builds the Trainer, module and data of a configuration without running anything."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    cli = LightningCLI(
        args=[f"--config={config}"],
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        save_config_callback=None,
        run=False,
    )
    return cli.trainer, cli.model, cli.datamodule


def condensed(message: str) -> str:
    """Shortens jsonargparse's report on a value to its reasons, in one line.

    Example:
        >>> condensed("Parser key \\"n\\":\\n  Errors:\\n    - Expected a <class 'int'>\\n  Given value: x")
        '`n`: expected int; given value: x'
    """
    lines = [line.strip() for line in message.splitlines()]
    reasons = list(dict.fromkeys(line.removeprefix("- ") for line in lines if line and not _ROUTE.match(line)))
    while len(reasons) > 1 and reasons[-1].endswith(":"):  # a way that was tried, of which no reason is left
        reasons.pop()
    text = " ".join(reason if reason.endswith((":", ".", ",")) else f"{reason};" for reason in reasons).rstrip(";")
    for pattern, plain in _PLAINER:
        text = re.sub(pattern, plain, text)
    return text


def _options_of(parser: Any) -> Iterator[str]:
    """All options of a parser and of its subcommands."""
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from getattr(inner, "_option_string_actions", ())


def _meant(message: str, options: list[str]) -> str:
    """Which option, or argument of a class, was likely meant by one that there is not."""
    unknown = re.search(r"[Uu]nrecognized arguments: (--[^\s=]+)", message)
    near = get_close_matches(unknown[1], options, n=1) if unknown else []
    refused = re.search(r"class_path '([\w.]+)'\D*Option '(\w+)' is not accepted", message)
    if refused:
        module, _, name = refused[1].rpartition(".")
        near = get_close_matches(refused[2], signature(getattr(import_module(module), name)).parameters, n=1)
    return f". Did you mean `{near[0]}`?" if near else ""


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in str(record.msg)
