"""OnDARE: the policy's update and the task vector, each thinned out at random."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge._checks import whole
from lightning_merge.optim._blocks import PIECE, Draw, blocks, within
from lightning_merge.optim._magnitudes import magnitude, magnitudes
from lightning_merge.optim._online import OnlineMerging
from lightning_merge.optim._rounding import add_
from lightning_merge.optim._settings import Form, OnlineOptions, OnlineSettings, Rescale
from lightning_merge.optim._side import Side
from lightning_merge.optim._task_vector import Source
from lightning_merge.optim._turn import Turn
from lightning_merge.weights._held import Part

Piece = tuple[int, int, int]

_INDICES_BELOW = 0.1


@final
class OnDARE(OnlineMerging):
    """``weights <- weights + (1 - alpha) * F(update) + alpha * F(reference - pretrained)``; F keeps a random share.

    ``update`` is what the wrapped optimizer does to the weights, not the gradient. F of the update is drawn anew at
    every step, F of the difference once, both from (``seed``, step, name, block of 2**20 elements).

    Args:
        base_optimizer: Any torch optimizer that updates in place, once per step. Decoupled weight decay (of those with
            ``decoupled_weight_decay`` in their groups, as AdamW) is not part of the update: it is applied to the
            result. A parameter group with ``"merge": False`` is stepped as without the wrapper.
        reference: The model before preference tuning: a module, named tensors, or a file.
        pretrained: The model that ``reference`` was fine-tuned from; ``"zero"`` if ``reference`` is a difference.
        density: Share of elements that F keeps, in (0, 1].
        alpha: Weight of the difference, per merge, in [0, 1]. After T steps ``alpha * T * density`` of the difference
            has been added on average; published values are 1e-7 to 1e-4.
        form: ``"paper"``: F does not rescale. ``"official"``: as in the published code, which divides what it keeps by
            ``density`` and limits the difference to 1 in magnitude.
        rescale: ``"none"``, ``"inverse_p"`` (divide by ``density``), or ``"l1"`` (keep each tensor's sum of
            magnitudes). By default ``"none"`` in the paper's form and ``"inverse_p"`` in the official one.
        tau_every: Add the difference every so many merges, so many times as strong; at least 1.
        alpha_schedule: ``"constant"``, the default, or ``"lr"``, which multiplies ``alpha`` by learning rate / highest
            learning rate (``max_lr`` or ``initial_lr`` of the group, else the one at construction).
        merge_every: Merge the update of so many steps at once; at least 1, the default. Above 1 it takes a copy of the
            parameters.
        seed: Seed of the masks; by default 0.
        min_numel: Tensors with fewer elements are merged in full; by default none.
        exempt: Glob patterns of parameter names that are stepped as without the wrapper; by default none.
        module: The model that is trained, for its names. By default ``reference`` if it is that model, else the names
            that the optimizer was given.
        tau_dtype: How the difference is stored; by default in float32, or wider if the parameter is.
        tau: What ``tau_state()`` of an earlier optimizer gave, instead of ``reference`` and ``pretrained``.
        chunk_size: Elements per call of ``base_optimizer``, by default 2**22, at least a whole tensor; sixteen times as
            many off the CPU, where launches are what costs. ``None``: one call on everything, for one that couples
            tensors.

    Raises:
        ValueError: If an argument is out of range, ``reference`` and ``pretrained`` do not fit the parameters or do
            not differ, or a parameter is sharded otherwise than along its first dimension.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> w.grad = torch.tensor([1.0, -1.0])
        >>> sgd = torch.optim.SGD([("w", w)], lr=0.1)
        >>> reference, pretrained = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.0, 2.0])}
        >>> OnDARE(sgd, reference=reference, pretrained=pretrained, density=1.0, alpha=0.5).step()
        >>> w.data
        tensor([1.4500, 2.0500])

    References:
        Lu et al., Online Merging Optimizers for Boosting Rewards and Mitigating Tax in Alignment, 2024, eq. 2 to 4.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        reference: Source | None = None,
        pretrained: Source | Literal["zero"] | None = None,
        density: float = 1.0,
        alpha: float = 1e-7,
        *,
        form: Form = "paper",
        rescale: Rescale | None = None,
        tau_every: int = 1,
        module: nn.Module | None = None,
        tau: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Unpack[OnlineOptions],
    ) -> None:
        if form == "official" and rescale == "none":
            raise ValueError("`rescale` must be 'inverse_p' or 'l1' in the official form, which always divides.")
        self.tau_every = whole("tau_every", tau_every, 1)
        super().__init__(
            base_optimizer,
            reference,
            pretrained,
            module,
            tau,
            OnlineSettings(
                density=density,
                alpha=alpha,
                form=form,
                rescale=("none" if form == "paper" else "inverse_p") if rescale is None else rescale,
                **options,
            ),
        )

    def _sparsify(self, dense: Tensor, name: str, whole: Part) -> tuple[Tensor, Tensor | None]:
        if self.is_dense(whole):
            return dense, None
        index = Draw(self.seed, 0, name, whole.numel, dense.device).kept(self.density, whole.start, whole.stop)
        kept = torch.zeros_like(dense).index_copy_(0, index, dense[index])
        if self.form == "official":
            return kept.div_(self.density).clamp_(-1.0, 1.0), index
        return kept.mul_(self._scale(magnitude(dense), magnitude(kept), whole)), index

    def _merge_rows(self, side: Side) -> Tensor:
        update = side.after.sub_(side.before)
        if self.is_dense(side.part):
            update.mul_(side.update)
        elif self.rescale == "l1":
            full = magnitudes(update)
            left = magnitudes(update.mul_(side.kept(self.density)))
            update.mul_(self._l1_rows(full, left + self._epsilon(side.part), side.part).to(update.dtype))
            if self.form == "official":
                update.clamp_(-1.0, 1.0)
            update.mul_(side.update)
        else:
            update.mul_(side.kept(self.density).mul_(side.update * self._scale(None, None, side.part)))
        if side.reference:
            update.add_(side.tau, alpha=side.reference)
        add_(update, side.before, side)
        return update

    def _merge_into(self, after: Tensor, before: Tensor, turn: Turn) -> None:
        if not self.is_dense(turn.part) and self.density < _INDICES_BELOW and self.rescale != "l1" and not turn.decay:
            self._merge_few(after, before, turn)
            return
        pieces = list(blocks(turn.part.start, turn.part.stop, PIECE))
        if self.rescale == "l1" or turn.tau.index is not None:
            self._thin_out_all(after, before, turn, pieces)
            for piece in pieces:
                self._add(after, before, turn, piece)
        else:
            for piece in pieces:
                self._thin_out(after, before, turn, piece, turn.update * self._scale(None, None, turn.part))
                self._add(after, before, turn, piece)

    def _merge_few(self, after: Tensor, before: Tensor, turn: Turn) -> None:
        """For a low density: only what is kept is drawn and computed."""
        index = turn.draw.kept(self.density, turn.part.start, turn.part.stop)
        start = before.index_select(0, index)
        values = (
            after.index_select(0, index).sub_(start).mul_(turn.update * self._scale(None, None, turn.part)).add_(start)
        )
        after.copy_(before).index_copy_(0, index, values)
        if turn.reference:
            # Where both are kept this is a second add, and loses nothing either.
            assert turn.tau.index is not None
            start = after.index_select(0, turn.tau.index)
            increment = turn.tau.values.to(after.dtype, copy=True).mul_(turn.reference)
            add_(increment, start, turn)
            after.index_copy_(0, turn.tau.index, increment)

    def _thin_out(self, after: Tensor, before: Tensor, turn: Turn, piece: Piece, factor: float) -> Tensor:
        """``after <- factor * F(after - before)`` in a piece; the sum of magnitudes before F if it is needed."""
        here = within(turn.part.start, *piece)
        update = after[here].sub_(before[here])
        full = magnitude(update) if self.rescale == "l1" else update
        if self.is_dense(turn.part):
            update.mul_(factor)
        else:
            # A product with 0 and 1: torch's masked operations take ten times as long on a CPU.
            update.mul_(turn.draw.keep(self.density, *piece, dtype=update.dtype).mul_(factor))
        return full

    def _thin_out_all(self, after: Tensor, before: Tensor, turn: Turn, pieces: list[Piece]) -> None:
        """The same where the whole tensor counts: for its sum of magnitudes, or since its task vector is sparse."""
        if self.rescale == "l1" and not self.is_dense(turn.part):
            full = torch.zeros((), dtype=torch.float64, device=after.device)
            for piece in pieces:
                full += self._thin_out(after, before, turn, piece, 1.0)
            after.mul_(self._scale(full, magnitude(after), turn.part))
            if self.form == "official":
                after.clamp_(-1.0, 1.0)
            after.mul_(turn.update)
        else:
            for piece in pieces:
                self._thin_out(after, before, turn, piece, turn.update * self._scale(None, None, turn.part))
        if turn.reference and turn.tau.index is not None:
            after.index_add_(0, turn.tau.index, turn.tau.values.to(after.dtype), alpha=turn.reference)

    def _add(self, after: Tensor, before: Tensor, turn: Turn, piece: Piece) -> None:
        """``after <- before + after + alpha * tau`` in a piece, in one add; a sparse tau is in ``after`` already."""
        here = within(turn.part.start, *piece)
        increment = after[here]
        if turn.reference and turn.tau.index is None:
            increment.add_(turn.tau.values[here], alpha=turn.reference)
        add_(increment, before[here], turn)

    def _scale(self, full: Tensor | None, kept: Tensor | None, whole: Part) -> float:
        """What F multiplies what it keeps by."""
        if self.rescale == "none" or self.is_dense(whole):
            return 1.0
        if self.rescale == "inverse_p":
            return 1.0 / self.density
        assert full is not None
        assert kept is not None
        return self._l1(torch.stack([full, kept + self._epsilon(whole)]), whole)

    def _epsilon(self, whole: Part) -> float:
        # The published code divides by the sum of what it kept, over density, plus Adam's epsilon: once over all parts.
        return 1e-8 * self.density if self.form == "official" and whole.start == 0 else 0.0
