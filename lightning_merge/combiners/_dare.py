"""Drop and rescale."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import number, one_of, seed, settle
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.combiners._sum import Sum
from lightning_merge.weights import State, Weights, average_dtype, part, parts, rows, unstacked

_PIECE = 2**22
"""Numbers that are thinned together: enough tensors for all threads."""


@final
@dataclass(frozen=True)
class DARE(Combiner):
    """Drops each entry of a vector with probability ``1 - density``, divides the rest by ``density``, then combines.

    What is dropped depends on ``seed``, the task's label and the tensor's name alone: not on the device, the order
    of the tasks, or the rank. Every vector is thinned once, when it is taken in; what is merged already never is again.

    Args:
        combiner: What merges the thinned vectors: ``Sum``, ``TIES``, or any other.
        density: Probability that an entry is kept, in ``(0, 1]``; 0.1 to 0.5 for fine-tuned models.
        seed: Any integer.
        dare_rescale: What makes up for the dropped entries: ``"inv_keep"`` divides by ``density``, so that the vector
            is right on average; ``"l1"`` keeps each tensor's sum of magnitudes (mergekit); ``None`` does nothing.

    Raises:
        ValueError: If a value is outside its range, or ``combiner`` drops entries itself.

    Example:
        >>> from lightning_merge.combiners import Sum
        >>> DARE(Sum(scale=1.0), density=0.5, seed=1).combine([{"w": torch.ones(8)}])
        {'w': tensor([0., 0., 2., 0., 2., 2., 0., 2.])}

    References:
        Yu et al., "Language models are super Mario: absorbing abilities from homologous models as a free lunch",
        ICML 2024, section 3.1.
    """

    combiner: Combiner = Sum()  # noqa: RUF009  (frozen)
    density: float = 0.5
    seed: int = 0
    dare_rescale: Literal["inv_keep", "l1"] | None = "inv_keep"

    def __post_init__(self) -> None:
        if not isinstance(self.combiner, Combiner) or isinstance(self.combiner, DARE):
            raise ValueError(f"`combiner` must be a combiner other than DARE, got {self.combiner!r}.")
        settle(self, density=number("density", self.density, "(0, 1]"), seed=seed("seed", self.seed))
        one_of("dare_rescale", self.dare_rescale, ("inv_keep", "l1", None), '"inv_keep", "l1" or None')

    @property
    def removable(self) -> bool:
        return self.combiner.removable

    @property
    def needs_every_vector(self) -> bool:
        return self.combiner.needs_every_vector

    @property
    def locality(self) -> Locality:
        return "model" if self.combiner.locality == "model" else "tensor"

    def init(self, like: Weights) -> State:
        return self.combiner.init(like)

    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        for piece, thinned in self._pieces(state, vector, task):
            self.combiner._take(piece, thinned, task)

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        for piece, thinned in self._pieces(state, vector, task):
            self.combiner._take_out(piece, thinned, task)

    def _pieces(self, state: State, vector: Weights, task: int | str) -> Iterator[tuple[State, Weights]]:
        """Parts of the state and of the thinned vector, which as a whole would be a further copy of the model."""
        whole = self.needs_every_vector  # a list of vectors would be extended by pieces
        for where in parts(vector, "model" if whole else self.locality, size=_PIECE):
            piece = {key: part(value, where) if isinstance(value, dict) else value for key, value in state.items()}
            yield piece, self._thinned(part(vector, where), task)
            for key, value in piece.items():  # a combiner may have put another tensor or number in place of its own
                if isinstance(value, dict):
                    state[key].update(value)
                else:
                    state[key] = value

    def _merged(self, state: State) -> Weights | None:
        return self.combiner._merged(state)

    def _last_result(self, state: State) -> Weights | None:
        return self.combiner._last_result(state)

    def _make_room(self, state: State, names: list[str], task: int | str) -> None:
        self.combiner._make_room(state, names, task)

    @torch.no_grad()
    def _thinned(self, vector: Weights, task: int | str) -> Weights:
        thinned: Weights = {}
        for names, matrix in rows(vector):
            masks = [_kept(vector[name], self, task, name).view(1, matrix.shape[1]) for name in names]
            wide = matrix.to(average_dtype(matrix))
            thinned |= unstacked(self._thin(wide, _sent(masks, matrix.device)), names, vector)
        return thinned

    def _thin(self, wide: Tensor, mask: Tensor) -> Tensor:
        thinned = wide * mask
        if self.dare_rescale == "inv_keep":
            return thinned.div_(self.density)
        if self.dare_rescale == "l1":
            remaining = thinned.abs().sum(1, keepdim=True)
            return thinned.mul_(torch.where(remaining > 0, wide.abs().sum(1, keepdim=True) / remaining, 1.0))
        return thinned


def _kept(tensor: Tensor, dare: DARE, task: int | str, name: str) -> Tensor:
    """Which entries stay: drawn on the CPU, since each kind of device has random numbers of its own."""
    digest = sha256(repr((dare.seed, task, name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(tensor.shape, generator=generator) < dare.density


def _sent(masks: list[Tensor], device: torch.device) -> Tensor:
    """The masks as rows on a device, which nobody waits for."""
    mask = masks[0] if len(masks) == 1 else torch.cat(masks)
    if device.type == "cuda" and torch.cuda.is_available():
        mask = mask.pin_memory()
    return mask.to(device, non_blocking=True)
