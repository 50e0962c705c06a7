"""``soup --rule lorahub``: LoRA adapters, with coefficients for a score."""

import argparse
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lightning_merge.search import Coefficients, Found, Measured
    from lightning_merge.trajectory import Trajectory
    from lightning_merge.weights import Weights


def from_adapters(
    trajectory: "Trajectory", options: argparse.Namespace, bench: Any, hashes: list[str]
) -> "tuple[Weights, Found, dict[str, list[float]], list[str]]":
    """The merge, what was found, nothing by tensor, and what there is to say of it.

    Raises:
        ValueError: If something does not fit.
    """
    from lightning_merge._commands._combining import logged, measured, monitored
    from lightning_merge._commands._task_scores import benches_of
    from lightning_merge._mergeable import lora_factors
    from lightning_merge.search import CMAES, Free, Measured, compose_adapters, penalty

    adapters = [checkpoint.weights() for checkpoint in trajectory]
    form: Literal["products", "factors"] = "factors" if options.factors else "products"
    pairs = lora_factors(adapters[0])
    rank: Literal["same"] | None = None if options.factors else "same"
    ranks = ", ".join(map(str, sorted({len(adapters[0][first]) for first, _ in pairs})))
    benches = benches_of(options, bench)
    sign = 1.0 if options.mode == "min" else -1.0

    def score(coefficients: "Coefficients") -> "Measured":
        weights = measured(bench, compose_adapters(adapters, coefficients, form, rank), options.seed)
        parts = tuple(monitored(each, weights, options.monitor, options.seed) for each in benches)
        return Measured(sum(parts) / len(parts) + sign * penalty(coefficients), parts=parts)

    subject = f"{form} by {options.monitor} of {', '.join(hashes)}"
    found = logged(score, len(trajectory), CMAES(size=0.5, start=0.0), options, space=Free(-1.5, 1.5), subject=subject)
    merged = compose_adapters(adapters, found.coefficients, form, rank)
    exact = compose_adapters(adapters, found.coefficients)
    lost = _distance(exact, merged, pairs)
    how = "sums of factors" if options.factors else f"products, of the rank of the files again ({ranks})"
    remarks = [
        f"{how}: {lost:.2%} from the sum of products (relative, over {len(pairs)} layers)",
        "the score is worse by 0.05 * mean |coefficient|, as published, than the metric",
    ]
    return {**merged, **trajectory[-1].extra}, found, {}, remarks


def _distance(exact: "Weights", merged: "Weights", pairs: list[tuple[str, str]]) -> float:
    """The Frobenius norm of what separates the products, relative to the first."""
    off = size = 0.0
    for first, after in pairs:
        whole, kept = (each[after].flatten(1).double() @ each[first].flatten(1).double() for each in (exact, merged))
        off += float((whole - kept).square().sum())
        size += float(whole.square().sum())
    return float((off / size) ** 0.5) if size else 0.0
