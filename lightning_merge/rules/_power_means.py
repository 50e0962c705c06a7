"""Averages by a power of time, of which any other can be made after training."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge._checks import number, numbers, path, settle, whole
from lightning_merge.rules._base import Rule
from lightning_merge.rules._on_disk import OnDisk
from lightning_merge.rules._resolution import LESS_OFTEN, watch_resolution
from lightning_merge.rules._shares import of_decays
from lightning_merge.rules._snapshots import OnHost, Snapshot, Snapshots
from lightning_merge.weights import State, Weights, average_dtype, clone, in_one_pass, joining, lerp_, to_devices


@final
@dataclass(frozen=True)
class PowerMeans(Rule):
    """``average <- b * average + (1 - b) * weights`` with ``b = (1 - 1 / t) ** (gamma + 1)``.

    So the weights of step ``t`` count about ``t ** gamma``.
    ``sigma`` is the width of that profile as a share of the run so far, at whatever time: 0.1 averages about the last
    tenth (0.28: nearly everything, 0: only the newest). Copies of the averages are kept on the way; ``synthesise``
    combines them to the average of any other width at any kept time. The result is the last of ``sigmas``.

    Args:
        sigmas: Widths that are tracked, each in (0, 0.288); two or more, growing. One copy of the weights each.
        every: Updates between the copies that are kept; at least 1. 1/20 of the run reconstructs to about a thousandth.
        directory: Where they are kept, as files. ``None``: in host memory, ``len(sigmas)`` copies of the weights each
            time, and in every checkpoint.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> rule = PowerMeans(every=10)
        >>> state = rule.init({"w": torch.tensor(0.0)})
        >>> for value in range(1, 41):
        ...     rule.update(state, {"w": torch.tensor(float(value))})
        >>> [round(float(rule.synthesise(state, sigma)["w"]), 1) for sigma in (0.05, 0.07, 0.1)]
        [38.4, 37.4, 36.0]

    References:
        Karras et al., "Analyzing and improving the training dynamics of diffusion models", CVPR 2024, section 3 and
        appendix C.
    """

    callback: ClassVar[str] = "PostHocEMA"

    sigmas: Sequence[float] = (0.05, 0.10)
    every: int = 100
    directory: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        settle(self, sigmas=numbers("sigmas", self.sigmas, says="two or more growing widths"))
        if len(self.sigmas) < 2 or list(self.sigmas) != sorted(set(self.sigmas)):
            raise ValueError(f"`sigmas` must be two or more growing widths, got {self.sigmas}.")
        for sigma in self.sigmas:
            try:
                gamma_of(sigma)
            except ValueError as error:
                raise ValueError(f"`sigmas`: each {error}") from None
        settle(self, every=whole("every", self.every, 1))
        if self.directory is not None:
            settle(self, directory=path("directory", self.directory))

    @property
    def keeps_files(self) -> bool:
        return self.directory is not None

    @property
    def can_be_undone(self) -> bool:
        return self.directory is None

    def init(self, weights: Weights) -> State:
        return {"averages": [clone(weights) for _ in self.sigmas], "updates": 0, "kept": []}

    def update(self, state: State, weights: Weights) -> None:
        state["updates"] += 1
        t = state["updates"]
        with in_one_pass(), joining():
            for sigma, average in zip(self.sigmas, state["averages"], strict=True):
                share = 1.0 - (1.0 - 1.0 / t) ** (gamma_of(sigma) + 1.0)
                watch_resolution(self, t, average, weights, share, LESS_OFTEN)
                lerp_(average, weights, share)
        if t % self.every == 0:
            beside = [snapshot for snapshot in _all_kept(state) if isinstance(snapshot, str)]
            kept = [self._place.keep(each, beside) for each in state["averages"]]
            state["kept"].append({"time": t, "averages": kept})

    def stored(self, state: State) -> Weights | None:
        last: Weights = state["averages"][-1]
        return last if state["updates"] else None

    @torch.no_grad()
    def synthesise(self, state: State, sigma: float, time: int | None = None) -> Weights:
        """The average of any width, from those that were kept and the present ones.

        Args:
            state: Of this rule, after an update.
            sigma: The width, in (0, 0.288). Outside the tracked widths it is extrapolated, which costs accuracy.
            time: Update after which it would have been that average; ``None``: the last.

        Raises:
            ValueError: If ``sigma`` is out of range, or ``time`` is not in [1, updates].
        """
        now = state["updates"]
        time = now if time is None else whole("time", time)
        if not 1 <= time <= now:
            raise ValueError(f"`time` must be in [1, {now}], the updates so far, got {time}.")
        gamma = gamma_of(sigma)
        if not self.sigmas[0] <= sigma <= self.sigmas[-1]:
            warnings.warn(
                f"sigma={sigma} is outside the widths that were tracked, {self.sigmas}, and is extrapolated.",
                stacklevel=2,
            )
        points = [(kept["time"], index) for kept in state["kept"] for index in range(len(self.sigmas))]
        if not state["kept"] or state["kept"][-1]["time"] != now:
            points += [(now, index) for index in range(len(self.sigmas))]
        shares = synthesis_coefficients(
            [t for t, _ in points], [gamma_of(self.sigmas[index]) for _, index in points], time, gamma
        )
        kept = {each["time"]: each["averages"] for each in state["kept"]}
        like: Weights = state["averages"][0]
        total = {
            name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float64)) for name, t in like.items()
        }
        for share, (t, index) in zip(shares, points, strict=True):
            average = self._place.read(kept[t][index]) if t in kept else state["averages"][index]
            for name, tensor in total.items():
                tensor.add_(average[name].to(tensor), alpha=share)
        return {name: tensor.to(average_dtype(like[name])) for name, tensor in total.items()}

    def last_decay(self, state: State) -> float:
        return float((1.0 - 1.0 / state["updates"]) ** (gamma_of(self.sigmas[-1]) + 1.0))

    def shares(self, state: State) -> Tensor:
        times = torch.arange(1, state["updates"] + 1, dtype=torch.float64)
        return of_decays((1.0 - 1.0 / times) ** (gamma_of(self.sigmas[-1]) + 1.0))

    def extend(self, state: State, weights: Weights) -> None:
        for average in state["averages"]:
            average.update(clone(weights))
        for kept in state["kept"]:
            kept["averages"] = [self._place.extended(each, weights) for each in kept["averages"]]

    def save(self, state: State) -> State:
        self._place.name(_all_kept(state) if self.keeps_files else ())
        return super().save(state)

    def load(self, saved: State, devices: Mapping[str, torch.device]) -> State:
        averages = [to_devices(average, devices) for average in saved["averages"]]
        named = _all_kept(saved)
        kept = [{"time": k["time"], "averages": self._place.load(k["averages"], devices, named)} for k in saved["kept"]]
        return {"averages": averages, "updates": saved["updates"], "kept": kept}

    @property
    def _place(self) -> Snapshots:
        return OnHost() if self.directory is None else OnDisk(os.fspath(self.directory))


def _all_kept(state: State) -> list[Snapshot]:
    return [snapshot for kept in state["kept"] for snapshot in kept["averages"]]


def gamma_of(sigma: float) -> float:
    """The power whose profile has this width: the largest root of ``g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2``.

    Example:
        >>> [round(gamma_of(sigma), 6) for sigma in (0.05, 0.1, 0.15, 0.28)]
        [16.972199, 6.937204, 3.557869, 0.169344]
    """
    return _gamma_of(number("sigma", sigma, f"(0, {1.0 / math.sqrt(12.0)})", f"in (0, {1 / math.sqrt(12):.4f})"))


@cache
def _gamma_of(sigma: float) -> float:
    roots = np.roots([1.0, 7.0, 16.0 - sigma**-2, 12.0 - sigma**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def widths_between(sigmas: Sequence[float], points: int) -> list[float]:
    """The narrowest and the widest that are tracked, and as many between them as asked for, evenly in proportion.

    Example:
        >>> [round(sigma, 4) for sigma in widths_between((0.05, 0.1), 1)]
        [0.05, 0.0707, 0.1]
    """
    narrow, wide = sigmas[0], sigmas[-1]
    return [narrow * (wide / narrow) ** (step / (points + 1)) for step in range(points + 1)] + [wide]


def synthesis_coefficients(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> tuple[float, ...]:
    """Coefficients of kept averages whose sum is nearest to the average of another width and time; they sum to one.

    Example:
        >>> powers = [gamma_of(0.05), gamma_of(0.10)]
        >>> shares = synthesis_coefficients([500, 500, 1000, 1000], powers * 2, 1000, powers[1])
        >>> [round(share, 6) + 0.0 for share in shares]
        [0.0, 0.0, 0.0, 1.0]
    """
    matrix = np.array(
        [[_inner(*a, *b) for b in zip(times, gammas, strict=True)] for a in zip(times, gammas, strict=True)]
    )
    target = np.array([_inner(*a, time, gamma) for a in zip(times, gammas, strict=True)])
    shares = np.linalg.lstsq(matrix, target, rcond=1e-15)[0]
    return tuple(float(share) for share in shares / shares.sum())


def _inner(time_a: float, gamma_a: float, time_b: float, gamma_b: float) -> float:
    """The overlap of two profiles."""
    ratio = time_a / time_b
    overlap: float = ratio**gamma_b if ratio < 1 else ratio**-gamma_a
    return (gamma_a + 1) * (gamma_b + 1) * overlap / ((gamma_a + gamma_b + 1) * max(time_a, time_b))
