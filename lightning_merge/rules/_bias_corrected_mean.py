"""Exponential moving average without its lag behind the weights."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_merge._checks import number, settle, whole
from lightning_merge.rules._base import Rule
from lightning_merge.rules._shares import of_decays
from lightning_merge.rules._variances import keep_variances_positive_
from lightning_merge.weights import State, Weights, add_, clone, copies, copy_, lerp_, scale_


@final
@dataclass(frozen=True)
class BiasCorrectedMean(Rule):
    """``average + multiplier * (lag + t) ** -bias_power * (weights - start)``, of the weights last taken in.

    Before that, ``average <- average + (lag + t) ** -ema_power * (weights - average)``, for ``t = 1, 2, ...`` steps
    since the start. An average with much smoothing is far behind; the correction moves it on the way that the weights
    have come, by a share that falls with time. Running variances that would be 0 or less are those of the weights.

    It keeps three copies: the start, the average and the last weights; and one of the result while it is looked at.

    Args:
        ema_power: How fast the share of new weights falls, in [0, 1].
        bias_power: How fast the correction falls, at least 0.
        lag: Steps added to the time, so that the first shares are not too large; at least 0.
        multiplier: Of the correction, at least 0; with 0 it is an average with a decay that grows. The paper and
            TRL's callback multiply the time by it instead, ``(lag + multiplier * t) ** -power``; with 1 both are the
            same.
        steps_per_update: Optimizer steps from one update to the next, by which ``t`` grows; at least 1.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> rule = BiasCorrectedMean()
        >>> state = rule.init({"w": torch.tensor(1.0)})
        >>> rule.update(state, {"w": torch.tensor(0.6)})
        >>> rule.result(state)
        {'w': tensor(0.6318)}

    References:
        Block and Zhang, "EMA without the lag: bias-corrected iterate averaging schemes" (BEMA), 2025.
    """

    callback: ClassVar[str] = "BEMA"
    start_is_meant: ClassVar[bool] = True

    ema_power: float = 0.5
    bias_power: float = 0.2
    lag: float = 10.0
    multiplier: float = 1.0
    steps_per_update: int = 1

    def __post_init__(self) -> None:
        settle(self, ema_power=number("ema_power", self.ema_power, "[0, 1]"))
        settle(self, bias_power=number("bias_power", self.bias_power, "[0, inf)"))
        settle(self, lag=number("lag", self.lag, "[0, inf)"))
        settle(self, multiplier=number("multiplier", self.multiplier, "[0, inf)"))
        settle(self, steps_per_update=whole("steps_per_update", self.steps_per_update, 1))

    @property
    def can_be_undone(self) -> bool:
        return True

    def init(self, weights: Weights) -> State:
        copied = {key: clone(weights) for key in ("start", "average", "last")}
        return {**copied, "updates": 0, "initial_share": 1.0}

    def update(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        state["updates"] += 1
        share = self._falling(state, self.ema_power)
        lerp_(state["average"], weights, share)
        copy_(state["last"], weights)
        state["initial_share"] *= 1.0 - share

    def stored(self, state: State) -> Weights | None:
        if not state["updates"]:
            return None
        if "cache" not in state:
            merged = copies(state["last"])
            add_(merged, state["start"], -1.0)
            scale_(merged, self._correction(state))
            add_(merged, state["average"])
            keep_variances_positive_(merged, state["last"])
            state["cache"] = merged
        found: Weights = state["cache"]
        return found

    def extend(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        super().extend(state, weights)

    def initial_share(self, state: State) -> float:
        if not state["updates"]:
            return 0.0
        return float(state["initial_share"]) - self._correction(state)

    def last_decay(self, state: State) -> float:
        return 1.0 - self._falling(state, self.ema_power)

    def shares(self, state: State) -> Tensor | None:
        if not state["updates"]:
            return None
        times = self.lag + torch.arange(1, state["updates"] + 1, dtype=torch.float64) * self.steps_per_update
        shares = of_decays(1.0 - times**-self.ema_power)
        shares[-1] += self._correction(state)
        return shares

    def _falling(self, state: State, power: float) -> float:
        return float((self.lag + state["updates"] * self.steps_per_update) ** -power)

    def _correction(self, state: State) -> float:
        return self.multiplier * self._falling(state, self.bias_power)
