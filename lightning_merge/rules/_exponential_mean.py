"""Exponential moving average."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import flag, instance, number, one_of, settle, whole
from lightning_merge.rules._base import Rule
from lightning_merge.rules._decay_warmups import DecayWarmup, DiffusersWarmup, EmaPytorchWarmup, TimmWarmup
from lightning_merge.rules._resolution import watch_resolution
from lightning_merge.rules._shares import of_decays
from lightning_merge.schedules import Duration, RunLength
from lightning_merge.weights import State, Weights, clone, compensated_lerp_, lerp_, zeros

_DEFAULT_DECAY = 0.999
_CURE = "`compensated=True` does, for one more copy of the weights."
_WARMUPS: dict[str, type[TimmWarmup | DiffusersWarmup | EmaPytorchWarmup]] = {
    "timm": TimmWarmup,
    "diffusers": DiffusersWarmup,
    "ema_pytorch": EmaPytorchWarmup,
}


@final
@dataclass(frozen=True)
class ExponentialMean(Rule):
    """Exponential moving average: ``average <- d * average + (1 - d) * weights``, ``d = decay ** steps_per_update``.

    The average starts as a copy of the weights, whose share of it falls with every update (``initial_share``).

    Args:
        decay: Share of the old average kept per optimizer step, in ``[0, 1)``; 0.999 if neither this nor ``half_life``
            is given. Its half-life is ``log(0.5) / log(decay)`` steps: 693 for 0.999.
        half_life: Instead of ``decay``: the length of training after which the share of a weight has halved. A number
            of optimizer steps, ``"500 steps"``, ``"2 epochs"`` or ``"5%"`` of the run. Epochs and shares need
            ``resolve`` before the first update. ``decay`` is then ``2 ** (-1 / steps)``.
        steps_per_update: Optimizer steps that one update stands for; at least 1. Updating every 10 steps with 10 here
            averages over the same stretch of training as updating at every step.
        warmup: How the decay grows up to ``decay``: the name of the library whose schedule it is (``"timm"``,
            ``"diffusers"`` or ``"ema_pytorch"``; they differ), or one of ``lightning_merge.rules``' warm-ups.
        compensated: Carry along what rounding loses, for one more copy of the weights. In float32 a weight near 1 that
            is off by less than ``6e-8 / (1 - decay)`` never moves otherwise: 6e-4 for 0.9999. A warning says so where
            it happens. Measured over 100,000 updates that drift by 1e-7 each: 0.9999 is off by 40 % of its lag, 3e-5 of
            it if compensated; where weights are noisy, 0.2 % (``benchmarks/numerics.py``).

    Raises:
        ValueError: If an argument is outside its range, if both ``decay`` and ``half_life`` are given, or at the first
            update if a half-life in epochs or shares of the run was not resolved.

    Example:
        >>> import torch
        >>> rule = ExponentialMean(decay=0.5)
        >>> state = rule.init({"w": torch.tensor(0.0)})
        >>> rule.update(state, {"w": torch.tensor(1.0)})
        >>> rule.result(state)
        {'w': tensor(0.5000)}
        >>> rule.initial_share(state)
        0.5
        >>> ExponentialMean(half_life="2 epochs").resolve(RunLength(steps_per_epoch=500)).decay
        0.9993070929904525

    References:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992. Morales-Brotons et al.,
        "Exponential moving average of weights in deep learning: dynamics and benefits", TMLR 2024.
        Kahan, "Further remarks on reducing truncation errors", 1965 (``compensated``).
    """

    callback: ClassVar[str] = "EMA"

    decay: float | None = None
    half_life: float | str | Duration | None = None
    steps_per_update: int = 1
    warmup: Literal["timm", "diffusers", "ema_pytorch"] | DecayWarmup | None = None
    compensated: bool = False

    def __post_init__(self) -> None:
        given = self.half_life
        if self.half_life is not None:
            self._set_half_life(Duration.parse(self.half_life, "half_life"))
            if self.decay == 1.0:
                raise ValueError(f"`half_life` must be shorter: after {given!r} nothing would ever change.")
        elif self.decay is None:
            object.__setattr__(self, "decay", _DEFAULT_DECAY)
        if self.decay is not None:
            settle(self, decay=number("decay", self.decay, "[0, 1)"))
        settle(self, steps_per_update=whole("steps_per_update", self.steps_per_update, 1))
        settle(self, compensated=flag("compensated", self.compensated))
        known = f"one of {', '.join(map(repr, _WARMUPS))}"
        if isinstance(self.warmup, str):
            settle(self, warmup=_WARMUPS[one_of("warmup", self.warmup, tuple(_WARMUPS), known)]())
        elif self.warmup is not None:
            instance("warmup", self.warmup, DecayWarmup, f"{known}, a warm-up of `lightning_merge.rules`, or None")

    @property
    def can_be_undone(self) -> bool:
        return True

    def init(self, weights: Weights) -> State:
        state: State = {"average": clone(weights), "updates": 0, "initial_share": 1.0}
        if self.compensated:
            state["compensation"] = zeros(weights)
        return state

    def update(self, state: State, weights: Weights) -> None:
        decay = self._decay_of_update(state["updates"] + 1)
        if self.compensated:
            compensated_lerp_(state["average"], state["compensation"], weights, 1.0 - decay)
        else:
            watch_resolution(self, state["updates"] + 1, state["average"], weights, 1.0 - decay, _CURE)
            lerp_(state["average"], weights, 1.0 - decay)
        state["updates"] += 1
        state["initial_share"] *= decay

    def stored(self, state: State) -> Weights | None:
        # Without the compensation: it is less than what the average can resolve, so adding it would change nothing.
        return state["average"] if state["updates"] else None

    def resolve(self, run: RunLength) -> "ExponentialMean":
        if not isinstance(self.half_life, Duration) or self.decay is not None:
            return self
        return replace(self, half_life=Duration(self.half_life.steps(run)))

    def initial_share(self, state: State) -> float:
        return float(state["initial_share"])

    def last_decay(self, state: State) -> float:
        return self._decay_of_update(state["updates"])

    def shares(self, state: State) -> Tensor:
        decays = [self._decay_of_update(update) for update in range(1, state["updates"] + 1)]
        return of_decays(torch.tensor(decays, dtype=torch.float64))

    def _set_half_life(self, half_life: Duration) -> None:
        """Keeps the half-life as it was given, and the decay that it is if it is known in steps."""
        decay = 2.0 ** (-1.0 / half_life.value) if half_life.unit == "steps" else None
        if self.decay is not None and self.decay != decay:
            raise ValueError(f"give `decay` or `half_life`, not both; got {self.decay} and {self.half_life!r}.")
        object.__setattr__(self, "decay", decay)
        object.__setattr__(self, "half_life", half_life)

    def _decay_of_update(self, update: int) -> float:
        if self.decay is None:
            raise ValueError(
                f"`half_life={self.half_life!r}` is relative to the run: call `resolve(RunLength(...))` before the"
                " first update, or give it in steps."
            )
        if isinstance(self.warmup, DecayWarmup):
            return self.warmup.decay(self.decay, update * self.steps_per_update, self.steps_per_update)
        return float(self.decay**self.steps_per_update)
