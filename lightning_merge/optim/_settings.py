"""The settings that the online optimizers share, checked once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, final, get_args

import torch

from lightning_merge._checks import instance, names, number, one_of, settle, whole
from lightning_merge._checks import seed as checked_seed

Form = Literal["paper", "official"]
Rescale = Literal["none", "inverse_p", "l1"]
AlphaSchedule = Literal["constant", "lr"]


class OnlineOptions(TypedDict, total=False):
    """The fields of ``OnlineSettings`` that both online optimizers hand on as they are."""

    alpha_schedule: AlphaSchedule
    merge_every: int
    seed: int
    min_numel: int
    exempt: Sequence[str]
    tau_dtype: torch.dtype | None
    chunk_size: int | None


@final
@dataclass(frozen=True)
class OnlineSettings:
    """What ``OnDARE`` and ``OnTIES`` describe among their arguments.

    Raises:
        TypeError: If one of them is of the wrong type.
        ValueError: If one of them is out of range.
    """

    density: float
    alpha: float
    form: Form
    rescale: Rescale
    alpha_schedule: AlphaSchedule = "constant"
    merge_every: int = 1
    seed: int = 0
    min_numel: int = 0
    exempt: Sequence[str] = ()
    tau_dtype: torch.dtype | None = None
    chunk_size: int | None = 2**22

    def __post_init__(self) -> None:
        settle(self, density=number("density", self.density, "(0, 1]"), alpha=number("alpha", self.alpha, "[0, 1]"))
        for argument, kind in (("form", Form), ("rescale", Rescale), ("alpha_schedule", AlphaSchedule)):
            one_of(argument, getattr(self, argument), kind, f"one of {get_args(kind)}")
        settle(
            self,
            merge_every=whole("merge_every", self.merge_every, 1),
            min_numel=whole("min_numel", self.min_numel, 0),
            seed=checked_seed("seed", self.seed),
            exempt=names("exempt", self.exempt),
            chunk_size=None if self.chunk_size is None else checked_chunk_size(self.chunk_size),
        )
        dtype = self.tau_dtype
        if dtype is not None and not instance("tau_dtype", dtype, torch.dtype, "a dtype").is_floating_point:
            raise ValueError(f"`tau_dtype` must be of floating-point numbers, got {dtype}.")


def checked_chunk_size(chunk_size: int) -> int:
    """How many elements a call of the wrapped optimizer takes."""
    try:
        return whole("chunk_size", chunk_size, 1)
    except (TypeError, ValueError):
        raise ValueError(f"`chunk_size` must be at least 1 or None, got {chunk_size!r}.") from None
