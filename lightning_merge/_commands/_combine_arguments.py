"""The arguments of ``average`` and ``soup``."""

import argparse
import os
from pathlib import Path

from lightning_merge._commands._form_arguments import add_forms, check_forms
from lightning_merge._commands._task_arguments import FROM_A_BASE, OF_TASKS, add_tasks, check_tasks

_DECAYS = ("wsm-linear", "wsm-cosine", "wsm-1-sqrt", "wsm-exponential")
AVERAGE_RULES = ("mean", "window", "linear", "ema", *_DECAYS, "greedy", "lcsc", "bayes")
_SETS = ("raw", "published")
SEARCHES = {"greedy", "lcsc", "bayes", "diwa", "learned"}
_OF_SETS = "of files with an average: what training works on, or what the score was measured on"
WITH_STATISTICS = ("fisher", "fisher-nodes", "daheim", "regmean", "mats")
"""Of those the ones that weigh by statistics of each file."""
FROM_BASE = ("model-stock", "iso-c", "tsv-m", "tall", "metagpt", *WITH_STATISTICS)
"""Rules that merge what each file added to a base."""
SOUP_RULES = ("uniform", "greedy", "diwa", "learned", *FROM_BASE, *OF_TASKS)
_NAMED = ", ".join(f"`{rule}`" for rule in (*FROM_BASE, *FROM_A_BASE))
_WEIGHED = ", ".join(f"`{rule}`" for rule in WITH_STATISTICS)


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not on this machine, and only local files are merged: copy it")
    return Path(text)


def add_average(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``average``."""
    parser.add_argument("run", type=_local, metavar="RUN", help="folder with the checkpoints of one run")
    parser.add_argument("--rule", choices=AVERAGE_RULES, default="mean", help="how they are merged (default mean)")
    parser.add_argument("--pattern", default="**/*.ckpt", help="which files (default **/*.ckpt)")
    parser.add_argument("--weights", choices=_SETS, default="raw", help=f"{_OF_SETS} (default raw)")
    parser.add_argument("--start", type=int, default=0, help="least step of a checkpoint")
    parser.add_argument("--end", type=int, help="largest step of a checkpoint")
    parser.add_argument("--last", type=int, help="only so many of the latest")
    parser.add_argument("--k", type=int, default=6, help="for `window`: the mean of so many of the latest (default 6)")
    parser.add_argument(
        "--decay", type=float, default=0.8, help="for `ema`: share kept at each checkpoint (default 0.8)"
    )
    parser.add_argument(
        "--continue-from",
        type=_local,
        metavar="MERGE",
        help="file or folder of an earlier `average` by `mean` or `ema`, to which new checkpoints are added",
    )
    _add_common(parser)


def add_soup(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``soup``."""
    parser.add_argument(
        "files", type=_local, metavar="FILE", nargs="+", help="checkpoints of several runs of one model"
    )
    parser.add_argument("--rule", choices=SOUP_RULES, default="uniform", help="how they are merged (default uniform)")
    parser.add_argument("--weights", choices=_SETS, default="published", help=f"{_OF_SETS} (default published)")
    parser.add_argument(
        "--align",
        action="store_true",
        help="for runs from different starts: puts hidden units into the order of the first file (needs `--config`)",
    )
    parser.add_argument("--base", type=_local, metavar="FILE", help=f"for {_NAMED}: what all were fine-tuned from")
    add_tasks(parser)
    add_forms(parser)
    parser.add_argument(
        "--scale",
        type=float,
        help="for `iso-c`, `tsv-m`, `daheim` (default 1), `tall` (default 0.3): factor of the merged vector",
    )
    parser.add_argument(
        "--statistics",
        type=_local,
        metavar="FILE",
        nargs="+",
        help=f"for {_WEIGHED}: what `ImportanceStatistics` wrote for each file, in their order",
    )
    parser.add_argument(
        "--base-statistics", type=_local, metavar="FILE", help="for `daheim`: the same of the base (default: 0)"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, help="the checkpoint to write, or a URL; ends in .ckpt or .pt, or is a folder"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="so many write the parts of a folder (default 1; under torchrun its own)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--config", type=Path, help="config.yaml of a run or a recipe: model and data to score with")
    parser.add_argument("--monitor", default="val/loss", help="the score: a metric that validation logs")
    parser.add_argument(
        "--mode",
        choices=("min", "max"),
        help="whether lower or higher is better, if the name of the metric does not say it",
    )
    parser.add_argument(
        "--budget",
        type=int,
        help="most evaluations of a search (default 100; of `adamerging`, `concrete` 500, of `map`, `lorahub` 40)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of a search")
    parser.add_argument("--log", type=Path, help="evaluations of a search, to continue from (default OUT.search.jsonl)")


def check(options: argparse.Namespace) -> None:
    """Settles ``mode`` and refuses what does not fit together.

    Raises:
        ValueError: Naming the argument and the cure.
    """
    from lightning_merge._commands._continued import refuse_rule
    from lightning_merge.files import is_remote

    _check_target(options)
    check_tasks(options)
    if getattr(options, "continue_from", None) is not None:
        refuse_rule(options.rule)
    if options.rule in SEARCHES and options.config is None:
        raise ValueError(
            f"`--rule {options.rule}` looks for the best score: name model and data with `--config` (config.yaml of a"
            " run, or a recipe's file), and the score with `--monitor` and `--mode`."
        )
    if options.rule in SEARCHES:
        from lightning_merge._choice import mode_of

        options.mode = mode_of("a search", options.monitor, options.mode)
    if options.rule in (*SEARCHES, *OF_TASKS) and options.log is None and is_remote(options.out):
        raise ValueError(
            f"`--log` must name a file on this machine where `--out` is not on it, got `--out` {options.out}."
        )
    if options.rule in FROM_BASE and options.base is None:
        raise ValueError(f"`--rule {options.rule}` needs `--base`, the checkpoint that all were fine-tuned from.")
    if options.rule not in FROM_BASE and getattr(options, "scale", None) is not None:
        raise ValueError(f"`--scale` must be left out for `--rule {options.rule}`, got {options.scale}.")
    if options.command == "soup":
        _check_statistics(options)
        check_forms(options, linear=options.rule not in (*FROM_BASE, *OF_TASKS))
        if options.align and (options.config is None or options.rule in (*FROM_BASE, *OF_TASKS)):
            raise ValueError(
                f"`--align` needs `--config`, whose model tells which units there are, and a rule without a base, got"
                f" `--rule {options.rule}`."
            )
    if options.rule == "learned" and options.mode == "max":
        raise ValueError(
            "`--rule learned` follows a gradient, so the score has to be a smooth loss, as with `--monitor val/loss"
            " --mode min`."
        )


def _check_target(options: argparse.Namespace) -> None:
    from lightning_merge._commands._target import folder_of, refuse_folder, refuse_target

    if (folder := folder_of(options.out)) is None:
        try:
            refuse_target(options.out, "`--out`", (".ckpt", ".pt"), options.force)
        except ValueError as error:
            if "must end in" in str(error):
                raise ValueError(
                    f"`--out` must end in .ckpt or .pt, got {options.out}. `lightning-merge export` converts it."
                ) from None
            raise
        if options.processes != 1:
            raise ValueError("`--processes` is for a sharded output: let `--out` be a folder (without an ending).")
        return
    if options.processes != 1 and is_of_torchrun():
        raise ValueError(
            f"`--processes` must be left out under `torchrun`, which starts them, got {options.processes}."
        )
    if options.processes < 1:
        raise ValueError(f"`--processes` must be at least 1, got {options.processes}.")
    if options.config is not None or options.rule in FROM_BASE:
        which = f"`--rule {options.rule}`" if options.config is None else "what `--config` measures"
        raise ValueError(f"{which} is written to a file, not to a folder: let `--out` end in .ckpt or .pt.")
    refuse_folder(folder, options.force)


def _check_statistics(options: argparse.Namespace) -> None:
    given = options.statistics or []
    if options.rule in WITH_STATISTICS and len(given) != len(options.files):
        raise ValueError(
            f"`--rule {options.rule}` needs `--statistics`, a file for each of the {len(options.files)} checkpoints,"
            f" got {len(given)}: the callback `ImportanceStatistics` writes them beside the checkpoints of a run."
        )
    if options.rule not in WITH_STATISTICS and given:
        raise ValueError(f"`--statistics` must be left out for `--rule {options.rule}`, got {given[0]}.")
    if options.rule != "daheim" and options.base_statistics is not None:
        raise ValueError(
            f"`--base-statistics` must be left out for `--rule {options.rule}`, got {options.base_statistics}."
        )


def is_of_torchrun() -> bool:
    """Whether ``torchrun`` has started this process among others."""
    return os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"}
