"""The ``lightning-merge`` command.

``--help``, ``recipes`` and ``--version`` answer without loading torch; everything else is imported when it is needed:
each command is a module of ``_commands``, with its parser and what it runs.
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from signal import SIGTERM
from types import ModuleType
from typing import NoReturn

from lightning_merge import __version__
from lightning_merge._commands._mistakes import quiet_workers, users_mistake, worker_was_told_to_end
from lightning_merge._commands._reader import CLOSED, reader_is_gone

PASSED_ON = {"run": "run", "fit": "fit", "validate": "fit", "test": "fit", "predict": "fit"}
"""Commands whose arguments LightningCLI reads, with the module of each."""

COMMANDS = (
    "recipes",
    "inspect",
    "diff",
    "export",
    "verify",
    "doctor",
    "average",
    "soup",
    "statistics",
    "unlearn",
    "replay",
    "report",
    "completion",
)
"""All others. The module of a command has its name, ``DESCRIPTION``, ``add_arguments`` and ``run``."""

_EVERY = (*PASSED_ON, *COMMANDS)


_HELP = """\
commands:
  recipes [NAME]               list the bundled recipes, or print one: `lightning-merge recipes digits/swa > mine.yaml`
  run NAME [--option value]    train with a recipe, e.g. `lightning-merge run digits/swa --trainer.max_epochs 10`;
                               `--config FILE` and options override it, `--print_config` shows it,
                               `run NAME --help` explains its settings, `run NAME --help all` lists all options
                               `run NAME --league` compares averages in one run, in the place of the recipe's own
  run continual/NAME [--merge.preset PRESET]
                               train a stream of tasks and merge them; run again to go on after an interruption
  unlearn RUN --task TASK      subtract a task from a stream's merged model, if the other tasks keep their accuracy
  fit | validate | test | predict --config FILE [--option value]
                               LightningCLI with any model and data class; `lightning-merge fit --help`
  inspect FILE                 which weights are in a checkpoint, which of them its score belongs to, how to load it
  diff FILE[:SET] [FILE[:SET]] how far apart two sets of weights are, and where; of one file, its two sets
  export FILE OUT [--set SET]  one set as safetensors (OUT ends in .safetensors), a plain state dict (.pt) or for timm
  export FILE FOLDER --hf MODEL
                               one set in a folder that from_pretrained reads, like MODEL's; of PEFT the adapter
  verify RUN                   measure a run's files again, and compare with the scores that they record
  doctor FILE... [--config FILE] [--base FILE]
                               whether sets of weights can be merged, with the figure that says so
  average RUN --out FILE [--rule RULE]
                               one run's checkpoints merged into one file: mean, window, ema, wsm-..., or searched for
                               the best score with `--config FILE`: greedy, lcsc, bayes
  soup FILE... --out FILE [--rule RULE]
                               checkpoints of several runs: uniform, greedy, diwa, learned; with `--base FILE`
                               model-stock, iso-c, tsv-m, tall, metagpt; with `--statistics FILE...` of each besides
                               fisher, fisher-nodes, daheim, regmean, mats; with `--config FILE` adamerging, atlas,
                               map, evolutionary, concrete; adapters with `--config FILE` alone: lorahub
  statistics FILE --config FILE [--kind gram]
                               how much each weight of a checkpoint matters, for `soup --statistics`
  replay RUN|RECIPE            does it resume bit for bit? If not, which tensor or random state differs first
  report RUN... [--out FILE]   the reports of runs (`callbacks.Report()`) over each other, on one page
  completion bash|zsh|tcsh     what completes commands, recipes and options in a shell
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Gives 0, 2 for a user's mistake (a line or two say which), 130 for Ctrl-C, 141 if nobody reads on, 143 for SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with quiet_workers():
            code = _dispatch(arguments)
            sys.stdout.flush()  # fails here, and not where nobody answers for it
            return code
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1, after it has shut down.
        if isinstance(error.__context__, KeyboardInterrupt):
            return 130
        if type(error).__name__ == "SIGTERMException":  # Lightning's own, and without a code
            return _terminated(arguments)
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return _fail(str(error.code))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return CLOSED
        if worker_was_told_to_end(error):
            return _terminated(arguments)
        message = users_mistake(error)
        if message is None:
            raise
        return _fail(message)


class _Parser(argparse.ArgumentParser):
    """Takes options in full only, and names the one that was likely meant."""

    options: list[str] = []  # noqa: RUF012 (of the command, once it is known)

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        known = [*self.options, *self._option_string_actions]
        near = [match for word in unknown for match in get_close_matches(word, known, n=1)]
        if "argument COMMAND: invalid choice" in message:
            message, _, _ = message.partition(" (choose from")
            near = get_close_matches(message.rpartition(": ")[2].strip("'").lower(), _EVERY, n=1)
            message += "" if near else f"; the commands are {', '.join(_EVERY)}"
            mean = f" Did you mean {near[0]}?" if near else ""
            super().error(f"{message}.{mean}")
        mean = f" Did you mean {' or '.join(near)}?" if near and message.startswith("unrecognized") else ""
        super().error(f"{message}.{mean}" if mean else message)


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command in PASSED_ON:
        passed_on = import_module(f"lightning_merge._commands.{PASSED_ON[command]}")
        return int(passed_on.main(arguments[1:] if command == "run" else arguments))
    parser = _Parser(
        prog="lightning-merge",
        description="Merge model weights during PyTorch Lightning training.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lightning-merge [--help] [--version] COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lightning-merge {__version__}")
    commands = parser.add_subparsers(prog="lightning-merge", dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    module: ModuleType | None = None
    for name in _EVERY:
        if name != command:
            commands.add_parser(name)
            continue
        module = import_module(f"lightning_merge._commands.{name}")
        own = commands.add_parser(name, description=module.DESCRIPTION, allow_abbrev=False)
        module.add_arguments(own)
        parser.options = list(own._option_string_actions)
    options = parser.parse_args(arguments)
    if module is None:
        parser.print_help()
        return 0
    return int(module.run(options))


def _terminated(arguments: list[str]) -> int:
    stream = arguments[:1] == ["run"] and arguments[1].startswith("continual/")
    cure = "Run the same command again" if stream else "Add `--ckpt_path FILE` with a checkpoint of the run"
    print(f"lightning-merge: stopped by SIGTERM. {cure} to go on from where it was saved.", file=sys.stderr)
    return 128 + SIGTERM


def _fail(*lines: str) -> int:
    print(f"lightning-merge: error: {lines[0]}", *lines[1:], sep="\n", file=sys.stderr)
    return 2
