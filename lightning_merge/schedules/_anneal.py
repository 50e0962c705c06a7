"""The way of a value, such as a learning rate, from one to another."""

import math
from typing import Literal

from lightning_merge._checks import number, one_of


def anneal(
    base: float, target: float, elapsed: float, length: float, strategy: Literal["cos", "linear"] = "cos"
) -> float:
    """Value on the way from ``base`` to ``target`` after ``elapsed`` of ``length`` (any unit; 0: at once).

    ``base + (target - base) * a`` with ``a = s`` (linear) or ``(1 - cos(pi s)) / 2``, ``s = min(1, elapsed / length)``.
    The closed form of ``torch.optim.swa_utils.SWALR``, so it does not depend on what others write to the optimizer.
    It is about a learning rate; ``callbacks.Anneal`` merges weights in the place of one that decays.

    Args:
        base: Value at the start.
        target: Value at the end, and after it.
        elapsed: How much has passed.
        length: How long the way is, in the same unit.
        strategy: ``"cos"`` or ``"linear"``.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``strategy`` is neither.

    Example:
        >>> [round(anneal(0.1, 0.02, epoch, 4, "linear"), 6) for epoch in range(6)]
        [0.1, 0.08, 0.06, 0.04, 0.02, 0.02]
    """
    base, target, elapsed, length = (
        number(name, value)
        for name, value in (("base", base), ("target", target), ("elapsed", elapsed), ("length", length))
    )
    one_of("strategy", strategy, ("cos", "linear"))
    share = 1.0 if length <= 0 else min(1.0, elapsed / length)
    if strategy == "cos":
        share = (1 - math.cos(math.pi * share)) / 2
    return target * share + base * (1 - share)
