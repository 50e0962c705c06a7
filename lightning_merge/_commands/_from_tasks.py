"""``soup`` by coefficients of what each file added to a base, by a gradient."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge._choice import Mode
    from lightning_merge.search import Found
    from lightning_merge.search._groups import Per
    from lightning_merge.trajectory import Trajectory
    from lightning_merge.weights import Weights


def from_tasks(
    trajectory: "Trajectory", options: argparse.Namespace, bench: Any, hashes: list[str]
) -> "tuple[Weights, Found, dict[str, list[float]], list[str]]":
    """The merge, what was found, by tensor where there are several coefficients, and what there is to say of it.

    Raises:
        ValueError: If something does not fit.
    """
    from lightning_merge._commands._combining import logged
    from lightning_merge._commands._task_arguments import BY_GRADIENT
    from lightning_merge._commands._task_scores import by_gradient, by_metric
    from lightning_merge._commands._task_vectors import TaskVectors

    bench.set_up()
    tasks = TaskVectors(options.base, trajectory, bench.model)
    plan = (by_gradient if options.rule in BY_GRADIENT else by_metric)(tasks, options, bench)
    found = logged(
        plan.score,
        len(trajectory),
        plan.method,
        options,
        space=plan.space,
        subject=f"{options.monitor} of {', '.join([tasks.start.sha256(), *hashes])} ",
        per=options.per,
        tensors=plan.tensors,
    )
    merged = tasks.as_in_files(plan.weights(found.coefficients))
    shares, lines = of_groups(trajectory, found, plan.tensors, options.per)
    held = sum(tensor.nbytes for own in tasks.vectors for tensor in own.values())
    lines.append(f"{len(tasks.vectors)} task vectors were in memory: {held / 2**20:,.1f} MiB")
    return merged, found, shares, [*lines, *(_trade_offs(found, options.mode) if options.rule == "map" else ())]


def _trade_offs(found: "Found", mode: "Mode") -> list[str]:
    """A line for each candidate that no other beats."""
    from lightning_merge.search import pareto_set

    best = pareto_set(found, mode)
    return [
        f"trade-offs that no other candidate beats ({len(best)}): coefficients, score of each task",
        *(
            f"  {' '.join(f'{a:.4f}' for a in each.coefficients)}   {' '.join(f'{s:.6g}' for s in each.parts or ())}"
            for each in best[:10]
        ),
    ]


def of_groups(
    trajectory: "Trajectory", found: "Found", tensors: "tuple[str, ...]", per: "Per"
) -> tuple[dict[str, list[float]], list[str]]:
    """Each tensor's coefficients, and a line for each file on its own; nothing of one coefficient a file."""
    from lightning_merge.search import by_tensor

    if per == "model":
        return {}, []
    count = len(found.coefficients) // len(trajectory)
    lines = [f"a coefficient for each {per} ({count} each): mean, least, largest"]
    for index, checkpoint in enumerate(trajectory):
        own = found.coefficients[index * count : (index + 1) * count]
        lines.append(f"{checkpoint.path}  {sum(own) / count:8.4f} {min(own):8.4f} {max(own):8.4f}")
    return {name: list(own) for name, own in by_tensor(found.coefficients, tensors, per).items()}, lines
