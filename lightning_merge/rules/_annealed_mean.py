"""The mean that stands for a learning rate that decays, over a window whose length is known when it begins."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge.rules._decaying import Decaying
from lightning_merge.rules._resolution import LESS_OFTEN, watch_resolution
from lightning_merge.rules._shares import of_updates
from lightning_merge.schedules._decay import decay
from lightning_merge.weights import State, Weights, clone, lerp_


@final
@dataclass(frozen=True)
class AnnealedMean(Decaying):
    """What the ``n`` weights of a window give if its updates are scaled like a learning rate that decays to 0.

    ``merged = sum over i of c_i w_i`` with ``c_i = f(i / n) - f((i + 1) / n)`` for ``i = 0 ... n - 1``, oldest first,
    where ``f`` is the shape: ``linear`` ``1 - s`` (so ``c_i = 1 / n``, the plain mean), ``cosine``
    ``(1 + cos(pi s)) / 2``, ``1-sqrt`` ``1 - sqrt(s)``, ``exponential`` ``2 * 0.5 ** s - 1``.

    *Why these.* Write ``w_i = w_0 + u_1 + ... + u_i``. In ``merged`` the update ``u_j`` counts as much as all weights
    that contain it: ``c_j + ... + c_{n-1} = f(j / n) - f(1) = f(j / n)``, the factor of a rate that decays over the
    window. So it is what that decay gives where updates add up and do not depend on the weights; for a real run it is
    an estimate, since the decayed run would have met other gradients.

    *What one copy holds.* The mean of the first ``m`` weights under ``c``, ``sum_{i<m} c_i w_i / (1 - f(m / n))``: a
    new weight gets ``c_{m-1} / (1 - f(m / n))`` of it. With the ``n``-th that is ``merged``, exactly. Before, it is
    the merge for the factors ``1 - (1 - f(j / n)) / (1 - f(m / n))``. For ``linear`` and ``1-sqrt``, where ``1 - f`` is
    a power of ``s``, these are ``f(j / m)``: the decay over the ``m`` weights so far, exactly. For ``cosine`` and
    ``exponential`` they are the first part of the longer decay, brought down to 0.

    After the ``n``-th weights the next window begins, with the next weights.

    Args:
        shape: ``"linear"``, ``"cosine"``, ``"1-sqrt"`` or ``"exponential"``.
        window: Length of the decay: a number of optimizer steps, ``"500 steps"``, ``"2 epochs"`` or ``"20%"`` of the
            run. Epochs and shares need ``resolve`` before the first update.
        steps_per_update: Optimizer steps from one update to the next; at least 1. ``n`` is how often that is within
            ``window``, at least once.

    Raises:
        ValueError: If an argument is outside its range, or at the first update if ``window`` was not resolved.

    Example:
        >>> import torch
        >>> rule = AnnealedMean("1-sqrt", window=4)
        >>> state = rule.init({"w": torch.tensor(0.0)})
        >>> for value in (1.0, 2.0, 3.0, 4.0):
        ...     rule.update(state, {"w": torch.tensor(value)})
        >>> rule.result(state)  # 0.5 * 1 + 0.2071 * 2 + 0.1589 * 3 + 0.1340 * 4
        {'w': tensor(1.9269)}

    References:
        Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging for LLM pre-training", ICLR 2026.
        The shapes are those of Megatron-LM's ``--lr-wsd-decay-style``.
    """

    def init(self, weights: Weights) -> State:
        return {"mean": clone(weights), "updates": 0, "taken": 0}

    def update(self, state: State, weights: Weights) -> None:
        n = self.snapshots
        m = state["taken"] % n + 1
        before = decay(self.shape, (m - 1) / n)
        share = 1.0 if m == 1 else (before - decay(self.shape, m / n)) / (1.0 - decay(self.shape, m / n))
        watch_resolution(self, m, state["mean"], weights, share, LESS_OFTEN)
        lerp_(state["mean"], weights, share)
        state["updates"] += 1
        state["taken"] = m
        if m == 1:
            state["plan"] = self.plan

    def stored(self, state: State) -> Weights | None:
        return state["mean"] if state["updates"] else None

    def shares(self, state: State) -> Tensor:
        n, m, updates = self.snapshots, state["taken"], state["updates"]
        at = torch.tensor([decay(self.shape, i / n) for i in range(m + 1)], dtype=torch.float64)
        return of_updates(updates - m + 1, updates, updates, (at[:-1] - at[1:]) / (1.0 - at[m]))

    def conclude(self, state: State) -> str | None:
        if state["taken"] in (0, self.snapshots):
            return None
        return (
            f"the window has {state['taken']} of its {self.snapshots} weights; what is published is the merge of these,"
            f" for a decay of {state['taken'] * self.steps_per_update} steps."
        )
