"""The mean that stands for a learning rate that decays, over the last weights at any moment."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_merge._checks import settle, whole
from lightning_merge.rules._decaying import Decaying
from lightning_merge.rules._shares import of_decays, of_updates
from lightning_merge.rules._snapshots import OnDevice, check_room
from lightning_merge.schedules._decay import decay
from lightning_merge.weights import State, Weights, clone, lerp_, weighted_mean


@final
@dataclass(frozen=True)
class SlidingAnnealedMean(Decaying):
    """``AnnealedMean`` of the last ``n`` weights after every update, in few copies; nothing until there are ``n``.

    The weights are taken into means of ``b = ceil((n - 1) / (memory - 1))`` successive ones. The window covers the
    newest of these blocks and the oldest one in part. A block counts as much as its weights in the window do in
    ``AnnealedMean``: ``f(lo / n) - f(hi / n)`` if these are the ``lo``-th to the ``hi``-th.

    *What is exact.* With ``memory >= n`` every block is a single weight, and so is the result. Else each block has the
    right share, spread over its weights evenly (``exponential``: as ``0.5 ** (i / n)``). That is exact within a block
    for ``linear`` and for ``exponential``, whose ``c_i`` fall by the same factor from each weight to the next wherever
    the window begins.

    *What is not.* If ``p`` weights of the oldest block have left the window, its share is spread over all ``b``. For
    ``linear`` that share is ``(b - p) / n``, of which ``p / b`` is out of place, so the merge weights are off by
    ``2 p (b - p) / (n b) <= b / (2 n)`` in all (the sum of absolute differences, where 2 is another mean altogether):
    ``1 / (2 (memory - 1))``. For ``cosine`` and ``1-sqrt`` the weights within a block differ too. Largest differences
    over all moments, for ``n`` of 200 and more:

    ============ ======== ======== ======== =========
    memory          3        5        9        17
    ============ ======== ======== ======== =========
    linear         0.25     0.125    0.063    0.032
    exponential    0.35     0.174    0.087    0.045
    cosine         0.43     0.201    0.100    0.051
    1-sqrt         0.63     0.459    0.332    0.242
    ============ ======== ======== ======== =========

    *Weights of different lengths.* What lies between weights, as tokens, is told with ``advance``; ``window`` is then a
    number of tokens, and the decay falls with them: read ``n`` as the tokens of the window and a weight as its tokens.

    Args:
        shape: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or ``"exponential"``.
        window: Length of the decay: a number of optimizer steps, ``"500 steps"``, ``"2 epochs"`` or ``"20%"`` of the
            run. Epochs and shares need ``resolve`` before the first update.
        steps_per_update: Optimizer steps from one update to the next; at least 1. ``n`` is how often that is within
            ``window``, at least once.
        memory: Copies of the weights that it may keep, at least 2; one more holds the result once it is asked for.

    Raises:
        ValueError: If an argument is outside its range, or at the first update if ``window`` was not resolved.
        MemoryError: At ``init``, before anything is allocated, if the copies do not fit.

    Example:
        >>> import torch
        >>> rule = SlidingAnnealedMean("linear", window=3, memory=3)
        >>> state = rule.init({"w": torch.tensor(0.0)})
        >>> for value in (4.0, 2.0, 9.0, 1.0):
        ...     rule.update(state, {"w": torch.tensor(value)})
        ...     print(rule.result(state))
        None
        None
        {'w': tensor(5.)}
        {'w': tensor(4.)}

    References:
        As ``AnnealedMean``. Blocks as in the sums over sliding windows of Datar et al., "Maintaining stream statistics
        over sliding windows", SIAM J. Comput. 2002, of equal length here.
    """

    memory: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, memory=whole("memory", self.memory, 2))

    @property
    def plan(self) -> list[Any]:
        return [*super().plan, self.memory]

    def init(self, weights: Weights) -> State:
        check_room(_Copies(), weights, min(self.memory, self.snapshots) + 1)
        return {"blocks": [], "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        n, blocks = self.snapshots, state["blocks"]
        if not blocks:
            state["plan"] = self.plan
        size = math.ceil((n - 1) / (self.memory - 1)) or 1
        new = max(1, state.get("passed", 1))
        while blocks and _count(blocks[1:]) + new >= n:
            del blocks[0]  # none of its weights are in the window any more
        if blocks and blocks[-1]["count"] < size:
            blocks[-1]["count"] += new
            lerp_(blocks[-1]["mean"], weights, self._share(blocks[-1]["count"], new))
        else:
            blocks.append({"mean": clone(weights), "count": new})
        state["updates"] += 1
        if "passed" in state:
            state["passed"] = 0

    def advance(self, state: State, passed: int) -> None:
        """Says what has passed since the last update, beside what was said of it before.

        Args:
            state: As ``init`` made it.
            passed: So many tokens, at least 0.
        """
        state["passed"] = state.get("passed", 0) + passed

    def stored(self, state: State) -> Weights | None:
        n, blocks = self.snapshots, state["blocks"]
        if _count(blocks) < n:
            return None
        if "cache" not in state:
            state["cache"] = weighted_mean([block["mean"] for block in blocks], self._shares_of_blocks(blocks))
        mean: Weights = state["cache"]
        return mean

    def shares(self, state: State) -> Tensor | None:
        blocks = state["blocks"]
        if _count(blocks) < self.snapshots or "passed" in state:
            return None
        within: list[Tensor] = []
        for block, share in zip(blocks, self._shares_of_blocks(blocks), strict=True):
            taken = torch.tensor([self._share(count, 1) for count in range(1, block["count"] + 1)], dtype=torch.float64)
            within.append(of_decays(1.0 - taken) * share)
        updates = state["updates"]
        return of_updates(updates - _count(blocks) + 1, updates, updates, torch.cat(within))

    def extend(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        for block in state["blocks"]:
            block["mean"].update(clone(weights))

    def _shares_of_blocks(self, blocks: list[Any]) -> list[float]:
        n, end, shares = self.snapshots, _count(blocks), []
        for block in blocks:
            low, high = max(0, n - end), n - end + block["count"]
            shares.append(decay(self.shape, low / n) - decay(self.shape, high / n))
            end -= block["count"]
        return shares

    def _share(self, count: int, new: int) -> float:
        """Of the last weights, which are ``new`` of so many, in the mean of a block."""
        if self.shape != "exponential":
            return new / count
        ratio = 0.5 ** (1.0 / self.snapshots)
        return float(ratio ** (count - new) * (1.0 - ratio**new) / (1.0 - ratio**count))

    def conclude(self, state: State) -> str | None:
        if not 0 < _count(state["blocks"]) < self.snapshots:
            return None
        return (
            f"the window has {_count(state['blocks'])} of its {self.snapshots}, so nothing was merged. The raw weights"
            " are kept, as without the callback."
        )


class _Copies(OnDevice):
    cure = "Lower `memory`, or average fewer tensors."


def _count(blocks: list[Any]) -> int:
    """Weights that the blocks hold."""
    return sum(block["count"] for block in blocks)
