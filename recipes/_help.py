"""What ``lightning-merge run NAME --help`` prints: the recipe's own settings, then those of its last callback."""

import shutil
import textwrap
from collections.abc import Iterator
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, NamedTuple

import yaml
from docstring_parser import parse

from lightning_merge.recipes._catalog import whole


class Setting(NamedTuple):
    """An option of the command line."""

    option: str
    value: Any
    text: str


def recipe_help(name: str) -> str:
    """The help of one recipe: what it shows, and its settings as options with the values that they have.

    Raises:
        ValueError: If there is no recipe of this name.
    """
    text = whole(name)
    config = yaml.safe_load(text)
    comment = [line.removeprefix("#").removeprefix(" ") for line in text.splitlines() if line.startswith("#")]
    trainer = config.pop("trainer")
    callbacks = [each for each in trainer.pop("callbacks", None) or [] if ".recipes." not in each["class_path"]]
    parts = [f"usage: lightning-merge run {name} [--option value] ...\n", *comment]
    parts += ["", "Settings of this recipe:", ""]
    parts += _lines(_of_recipe(config, trainer))
    if callbacks:
        parts += [f"Settings of its last callback, {callbacks[-1]['class_path']}:", ""]
        parts += _lines(_of_class("--trainer.callbacks", callbacks[-1]))
    if any("monitor" in each.get("init_args", {}) for each in callbacks if each["class_path"].endswith("Checkpoint")):
        parts += [f"Several averages, and the best of them: lightning-merge run {name} --league"]
    parts += [
        f"All options, those of the Trainer too: lightning-merge run {name} --help all",
        f"The recipe as a file to change:        lightning-merge recipes {name} > mine.yaml",
    ]
    return "\n".join(parts)


def _of_recipe(config: dict[str, Any], trainer: dict[str, Any]) -> Iterator[Setting]:
    """What the file sets, and every argument of the classes that it names."""
    described = _documented(_imported("lightning.pytorch.Trainer"))
    for key, value in trainer.items():
        if not isinstance(value, dict):
            yield Setting(f"--trainer.{key}", value, described.get(key, ""))
    for key, value in config.items():
        if key == "seed_everything":
            yield Setting("--seed_everything", value, "Seed of all random numbers; `false` sets none.")
        elif "class_path" in value:
            yield from _of_class(f"--{key}", value)
        else:
            kind = "callbacks.ContinualMerging" if key == "merge" else "recipes.streams._stream.Stream"
            given = {"class_path": f"lightning_merge.{kind}", "init_args": value}
            yield from _of_class(f"--{key}", given)


def _of_class(prefix: str, given: dict[str, Any]) -> Iterator[Setting]:
    """Every argument of a class, with the value that it is given or has by default."""
    kind, values = _imported(given["class_path"]), given.get("init_args", {})
    described = _documented(kind)
    for argument in signature(kind).parameters.values():
        if argument.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL):
            continue
        value = values.get(argument.name, None if argument.default is Parameter.empty else argument.default)
        option = f"{prefix}.{argument.name}"
        if not isinstance(value, dict) or "class_path" not in value:
            yield Setting(option, value, described.get(argument.name, ""))
            continue
        yield Setting(option, value["class_path"], described.get(argument.name, ""))
        texts = _documented(_imported(value["class_path"]))
        for key, inner in value.get("init_args", {}).items():
            yield Setting(f"{option}.{key}", inner, texts.get(key, ""))


def _documented(kind: Any) -> dict[str, str]:
    """What the docstrings of a class say of each argument, in plain words; of other libraries' the first sentence."""
    found: dict[str, str] = {}
    for text in (kind.__doc__, kind.__init__.__doc__):
        for parameter in parse(text or "").params:
            said = " ".join((parameter.description or "").replace("``", "`").split())
            if not kind.__module__.startswith("lightning_merge"):
                said = f"{said.partition('. ')[0].rstrip('.')}." if said else ""
            found.setdefault(parameter.arg_name, said)
    return found


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _lines(settings: Iterator[Setting]) -> Iterator[str]:
    width = max(60, min(100, shutil.get_terminal_size().columns - 1))
    for option, value, text in settings:
        yield f"  {option} {_typed(value)}".rstrip()
        yield from textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    yield ""


def _typed(value: Any) -> str:
    """A value as it is typed on the command line, if it is one of a word."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float | str) else ""
