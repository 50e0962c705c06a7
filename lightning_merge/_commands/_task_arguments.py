"""The arguments of ``soup`` for coefficients of task vectors."""

import argparse
from pathlib import Path

BY_GRADIENT = ("adamerging", "atlas", "concrete")
"""Rules that follow the gradient of a loss on batches."""
BY_METRIC = ("map", "evolutionary")
"""Rules that look at a metric that validation logs."""
OF_TASKS = (*BY_GRADIENT, *BY_METRIC, "lorahub")
"""Rules that search coefficients of what each file added to a base."""
_BUDGETS = {"adamerging": 500, "concrete": 500, "map": 40, "lorahub": 40}
FROM_A_BASE = tuple(rule for rule in OF_TASKS if rule != "lorahub")
"""Those of them that need the base; adapters are what was added."""
_NAMED = ", ".join(f"`{rule}`" for rule in OF_TASKS)
_PER = ", ".join(f"`{rule}`" for rule in FROM_A_BASE)
_SAID = {"adamerging": "entropy", "atlas": "cross entropy", "concrete": "entropy"}


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "--per",
        choices=("model", "tensor", "group"),
        help=f"for {_PER}: what has its own coefficient, `group` a module (default model; of `atlas` tensor)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="CONFIG",
        nargs="+",
        help=f"for {_NAMED}: a config.yaml for the data of each task (default: those of `--config`)",
    )
    parser.add_argument(
        "--factors",
        action="store_true",
        help="for `lorahub`: the factors of adapters are added up on their own, as published, not their products",
    )


def check_tasks(options: argparse.Namespace) -> None:
    """Settles what these rules leave open, and refuses what does not fit together.

    Raises:
        ValueError: Naming the argument and the cure.
    """
    if options.budget is None:
        options.budget = _BUDGETS.get(options.rule, 100)
    known = {"per": FROM_A_BASE, "data": OF_TASKS, "factors": ("lorahub",)}
    for name, rules in known.items():
        if getattr(options, name, None) and options.rule not in rules:
            raise ValueError(f"`--{name}` must be left out for `--rule {options.rule}`, which has none.")
    if options.rule not in OF_TASKS:
        return
    options.per = options.per or ("tensor" if options.rule == "atlas" else "model")
    for name in ("config", "base"):
        if getattr(options, name) is None and (name == "config" or options.rule in FROM_A_BASE):
            whose = "model and data" if name == "config" else "the checkpoint that all were fine-tuned from"
            raise ValueError(f"`--rule {options.rule}` needs `--{name}`: {whose}.")
    if options.rule in BY_GRADIENT:
        options.monitor, options.mode = _SAID[options.rule], "min"
    else:
        from lightning_merge._choice import mode_of

        options.mode = mode_of("a search", options.monitor, options.mode)
