"""Warm-ups of an exponential mean's decay: small at first, so the average forgets where it started."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from lightning_merge._checks import number, settle


class DecayWarmup(ABC):
    """How the decay of an exponential mean grows from the start of the average. A frozen dataclass."""

    @abstractmethod
    def decay(self, limit: float, step: int, steps_per_update: int) -> float:
        """Share of the old average kept at an update, in ``[0, 1)``.

        Args:
            limit: Decay per optimizer step that the warm-up grows to, in ``[0, 1)``.
            step: Optimizer steps from the start of the average to this update; at least 1.
            steps_per_update: Optimizer steps that the update stands for; at least 1.
        """


@final
@dataclass(frozen=True)
class TimmWarmup(DecayWarmup):
    """``min(limit, 1 - step ** -power) ** steps_per_update``: what timm's ``ModelEmaV3`` does with ``use_warmup``.

    The decay of step 1 is 0, so the average starts as the weights of that step.

    Args:
        power: More than 0. 1 makes the average the uniform mean of all steps, until the limit is reached. 2/3 reaches
            a decay of 0.999 after 31.6k steps, 3/4 after 10k.

    Raises:
        ValueError: If ``power`` is not more than 0.

    Example:
        >>> [round(TimmWarmup().decay(0.9999, step, 1), 3) for step in (1, 2, 10, 100)]
        [0.0, 0.37, 0.785, 0.954]
    """

    power: float = 2 / 3

    def __post_init__(self) -> None:
        settle(self, power=number("power", self.power, "(0, inf)"))

    def decay(self, limit: float, step: int, steps_per_update: int) -> float:
        return float(min(limit, 1 - step**-self.power) ** steps_per_update)


@final
@dataclass(frozen=True)
class DiffusersWarmup(DecayWarmup):
    """``min(limit, step / (9 + step)) ** steps_per_update``, 0 at step 1: the default of diffusers' ``EMAModel``.

    With ``use_ema_warmup=True`` diffusers does what ``TimmWarmup`` does.

    Example:
        >>> [round(DiffusersWarmup().decay(0.9999, step, 1), 3) for step in (1, 2, 10, 100)]
        [0.0, 0.182, 0.526, 0.917]
    """

    def decay(self, limit: float, step: int, steps_per_update: int) -> float:
        return float(min(limit, step / (9 + step)) ** steps_per_update) if step > 1 else 0.0


@final
@dataclass(frozen=True)
class EmaPytorchWarmup(DecayWarmup):
    """``min(limit, 1 - (1 + step) ** -power)`` for each update, however many steps it stands for: as ema-pytorch.

    Its defaults ``update_after_step=100, update_every=10`` are an average that starts after step 101 and takes the
    weights every 10 steps. With 10 steps per update the limit too is a decay per update, so the average looks 10 times
    as far back as one of the same decay elsewhere.

    Args:
        power: More than 0; see ``TimmWarmup``.

    Raises:
        ValueError: If ``power`` is not more than 0.

    Example:
        >>> [round(EmaPytorchWarmup().decay(0.9999, step, 10), 3) for step in (10, 20, 100)]
        [0.798, 0.869, 0.954]
    """

    power: float = 2 / 3

    def __post_init__(self) -> None:
        settle(self, power=number("power", self.power, "(0, inf)"))

    def decay(self, limit: float, step: int, steps_per_update: int) -> float:
        return float(min(limit, 1 - (1 + step) ** -self.power))
