"""``lightning-merge completion``: what a shell needs to complete commands, recipes and options."""

import argparse
from importlib import import_module
from typing import Any

from lightning_merge._commands._needs import CLI_MODULES, need

DESCRIPTION = (
    'Print what completes commands, recipes and options in a shell; for bash: eval "$(lightning-merge completion bash)"'
)

_FILES = ("file", "files", "out", "config", "base", "statistics", "base_statistics", "run", "runs", "ckpt_path")
"""Arguments that take a path."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``completion``."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell that will read it")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    need((*CLI_MODULES, "shtab"))
    import shtab

    print(shtab.complete(_everything(), options.shell))
    return 0


def _everything() -> argparse.ArgumentParser:
    """A parser of all commands with all of their arguments, which is read and never parses."""
    from lightning_merge.cli import COMMANDS, PASSED_ON
    from lightning_merge.recipes._catalog import recipes

    parser = argparse.ArgumentParser("lightning-merge")
    commands = parser.add_subparsers()
    names = list(recipes())
    for command in COMMANDS:
        module = import_module(f"lightning_merge._commands.{command}")
        own = commands.add_parser(command, help=module.DESCRIPTION)
        module.add_arguments(own)
        for action in own._actions:
            _complete(action, names if command == "recipes" else None)
    options = _lightning_options()
    for command in PASSED_ON:
        own = commands.add_parser(command, help="train")
        if command == "run":
            own.add_argument("name", choices=names)
        for option in options:
            _complete(own.add_argument(option), None)
    return parser


def _complete(action: Any, names: list[str] | None) -> None:
    if names is not None and action.dest == "name":
        action.choices = names
    elif action.dest in _FILES:
        import shtab

        action.complete = shtab.FILE


def _lightning_options() -> list[str]:
    """The options of ``fit`` that do not depend on a class that is named."""
    from lightning.pytorch import Trainer

    from lightning_merge.recipes._lightning_cli import Parser

    parser = Parser(add_help=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    of_trainer = [option for option in parser._option_string_actions if option.startswith("--trainer.")]
    return ["--config", "--print_config", "--seed_everything", "--ckpt_path", "--model", "--data", *of_trainer]
