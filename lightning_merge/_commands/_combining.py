"""How checkpoints are merged, by the name of the rule; torch is loaded when one is asked for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge.search import Evaluation, Found, Method, Score
    from lightning_merge.trajectory import Trajectory
    from lightning_merge.weights import Weights


def measured(bench: Any, merged: "Weights", seed: int) -> "Weights":
    """The weights with BatchNorm statistics of their own, on the same batches whatever was asked before."""
    from lightning_merge._commands._drawing import drawing

    with drawing(seed):
        bench.set_up(merged)  # or the first candidate of a search that goes on would draw other batches
    with drawing(seed):
        return {**merged, **bench.statistics(merged)}


def coefficients(options: argparse.Namespace, count: int) -> list[float]:
    """Of a rule that gives them without looking at the weights."""
    from lightning_merge import trajectory

    rules = {
        "mean": lambda: trajectory.mean(count),
        "uniform": lambda: trajectory.mean(count),
        "window": lambda: trajectory.window(count, options.k),
        "linear": lambda: trajectory.linear(count),
        "ema": lambda: trajectory.exponential(count, options.decay),
        "wsm-linear": lambda: trajectory.wsm_linear(count),
        "wsm-cosine": lambda: trajectory.wsm_cosine(count),
        "wsm-1-sqrt": lambda: trajectory.wsm_1_sqrt(count),
        "wsm-exponential": lambda: trajectory.wsm_exponential(count),
    }
    return list(rules[options.rule]())


def search(trajectory: "Trajectory", options: argparse.Namespace, bench: Any, hashes: list[str]) -> "Found":
    """The coefficients of the best score, as the bench measures it."""
    from lightning_merge.search import Bayesian, Evolutionary, Gradient, Greedy

    methods: dict[str, Method] = {
        "greedy": Greedy(),
        "diwa": Greedy(),  # DiWA's restricted selection is the greedy soup, ties included
        "lcsc": Evolutionary(),
        "bayes": Bayesian(),
        "learned": Gradient(),
    }

    def score(coefficients: tuple[float, ...]) -> float:
        return monitored(
            bench, measured(bench, trajectory.combine(coefficients), options.seed), options.monitor, options.seed
        )

    space: Any = "negative" if options.rule == "lcsc" else "simplex"
    subject = f"{options.monitor} of {', '.join(hashes)}"
    return logged(score, len(trajectory), methods[options.rule], options, space=space, subject=subject)


def monitored(bench: Any, merged: "Weights", monitor: str, seed: int) -> float:
    """The metric that validation logs of a name; what it draws is the same whatever was asked before.

    Raises:
        ValueError: If it logs none of that name.
    """
    from lightning_merge._commands._drawing import drawing

    with drawing(seed):
        metrics = bench.metrics(merged)
    if monitor not in metrics:
        raise ValueError(
            f"`--monitor` must be a metric that validation logs, got {monitor!r}; it logs:"
            f" {', '.join(sorted(metrics)) or 'nothing'}."
        )
    return float(metrics[monitor])


def logged(score: "Score", count: int, method: "Method", options: argparse.Namespace, **how: Any) -> "Found":
    """A search with its log beside the output, and a progress bar."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from lightning_merge.search import search

    best: list[float] = []
    with tqdm(total=options.budget, desc=f"{options.rule}: scoring", unit="candidate") as bar:

        def show(evaluation: "Evaluation") -> None:
            if evaluation.score is not None:
                best.append(evaluation.score)
                bar.set_postfix_str(f"best {options.monitor} {(max if options.mode == 'max' else min)(best):.4g}")
            bar.update()

        return search(
            score,
            count,
            method,
            mode=options.mode,
            budget=options.budget,
            seed=options.seed,
            log=options.log or Path(options.out).with_suffix(".search.jsonl"),
            on_evaluation=show,
            **how,
        )
