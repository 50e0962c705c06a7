"""OnTIES: the largest of the policy's update and of the task vector, with one sign per element."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge.optim._blocks import PIECE, Draw, blocks, within
from lightning_merge.optim._cut import Cut, find_cut
from lightning_merge.optim._magnitudes import magnitude, magnitudes
from lightning_merge.optim._online import OnlineMerging
from lightning_merge.optim._rounding import add_
from lightning_merge.optim._settings import Form, OnlineOptions, OnlineSettings, Rescale
from lightning_merge.optim._side import Side
from lightning_merge.optim._task_vector import Source
from lightning_merge.optim._turn import Moment, Turn
from lightning_merge.weights._held import Part


@final
class OnTIES(OnlineMerging):
    """``weights <- weights + [(1 - alpha) * F(update)] + [alpha * F(reference - pretrained)]``, by sign.

    F keeps the share ``density`` of each tensor that is largest in magnitude. Where the two terms agree in sign they
    are added, where they do not the larger one in magnitude is. ``update`` is what the wrapped optimizer does to the
    weights, not the gradient. Above ``4096 / density`` elements, the magnitude from which an update is kept is that of
    a random sample.

    Args:
        base_optimizer: Any torch optimizer that updates in place, once per step. Decoupled weight decay (of those with
            ``decoupled_weight_decay`` in their groups, as AdamW) is not part of the update: it is applied to the
            result. A parameter group with ``"merge": False`` is stepped as without the wrapper.
        reference: The model before preference tuning: a module, named tensors, or a file.
        pretrained: The model that ``reference`` was fine-tuned from; ``"zero"`` if ``reference`` is a difference.
        density: Share of elements that F keeps, in (0, 1]; at least one of each tensor.
        alpha: Weight of the difference, per merge, in [0, 1]; published values are 1e-7 to 1e-4.
        form: ``"paper"``: weighted terms vote. ``"official"``: unweighted terms vote, as in the published code, so the
            difference, which is far larger, wins wherever it was kept; tensors of which ``density`` keeps less than
            one element are merged in full.
        rescale: ``"none"``, ``"inverse_p"`` (divide by ``density``), or ``"l1"`` (keep each tensor's sum of
            magnitudes).
        alpha_schedule: ``"constant"``, the default, or ``"lr"``, which multiplies ``alpha`` by learning rate / highest
            learning rate (``max_lr`` or ``initial_lr`` of the group, else the one at construction).
        merge_every: Merge the update of so many steps at once; at least 1, the default. Above 1 it takes a copy of the
            parameters.
        seed: Seed of the samples; by default 0.
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
        >>> w.grad = torch.tensor([1.0, -4.0])
        >>> sgd = torch.optim.SGD([("w", w)], lr=0.1)
        >>> OnTIES(sgd, reference={"w": torch.tensor([1.0, -1.0])}, pretrained="zero", density=1.0, alpha=0.5).step()
        >>> w.data  # opposite signs: -0.05 against 0.5, and 0.2 against -0.5
        tensor([1.5000, 1.5000])

    References:
        Lu et al., Online Merging Optimizers for Boosting Rewards and Mitigating Tax in Alignment, 2024, eq. 5 to 7.
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
        rescale: Rescale = "none",
        module: nn.Module | None = None,
        tau: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Unpack[OnlineOptions],
    ) -> None:
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
                rescale=rescale,
                **options,
            ),
        )

    def is_dense(self, whole: Part) -> bool:
        """Whether a tensor is merged in full."""
        return super().is_dense(whole) or (self.form == "official" and whole.numel * self.density < 1)

    def _sparsify(self, dense: Tensor, name: str, whole: Part) -> tuple[Tensor, Tensor | None]:
        kept = dense.clone()
        if self.is_dense(whole):
            return kept, None
        self._trim(kept, whole, Draw(self.seed, 0, name, whole.numel, dense.device))
        return kept, kept.nonzero().view(-1)

    def _merge_rows(self, side: Side) -> Tensor:
        update = side.after.sub_(side.before)
        if not self.is_dense(side.part):
            full = magnitudes(update) if self.rescale == "l1" else None
            update.mul_(side.largest(self.density))
            if self.rescale == "inverse_p":
                update.div_(self.density)
            elif full is not None:
                update.mul_(self._l1_rows(full, magnitudes(update), side.part).to(update.dtype))
        elected = self._elect(update, side.tau, side)
        add_(elected, side.before, side)
        return elected

    def _merge_into(self, after: Tensor, before: Tensor, turn: Turn) -> None:
        index, cut, dense = turn.tau.index, None, self.is_dense(turn.part)
        whole = index is not None or (self.rescale == "l1" and not dense)
        if whole:
            after.sub_(before)
        if not dense:
            if whole:
                self._trim(after, turn.part, turn.draw)
            else:
                cut = find_cut(after, turn.part, turn.draw, self.density, before)
        if index is not None:
            elected = self._elect(after.index_select(0, index), turn.tau.values.to(after.dtype), turn)
            after.mul_(turn.update).index_copy_(0, index, elected)
        # All that is done to a piece while it is in the cache.
        for block in blocks(turn.part.start, turn.part.stop, PIECE):
            here = within(turn.part.start, *block)
            update = after[here] if whole else after[here].sub_(before[here])
            if cut is not None:
                self._cut(update, cut, here, turn.draw, block)
            if index is None:
                self._elect(update, turn.tau.values[here].to(after.dtype), turn)
            add_(update, before[here], turn)

    def _elect(self, update: Tensor, tau: Tensor, turn: Moment) -> Tensor:
        """The two weighted terms together, without the one that the elected sign is not; in ``update``."""
        theirs = tau * turn.reference
        if self.form == "paper":
            return _larger_of_opposite(update.mul_(turn.update), theirs)
        positive = update + tau >= 0
        ours_win, theirs_win = (update >= 0) == positive, (tau >= 0) == positive
        return update.mul_(turn.update).mul_(ours_win.to(update)).add_(theirs.mul_(theirs_win.to(theirs)))

    def _trim(self, values: Tensor, whole: Part, draw: Draw) -> None:
        """``values <- F(values)``, in place."""
        cut = find_cut(values, whole, draw, self.density)
        sums = torch.zeros(2, dtype=torch.float64, device=values.device)
        for block in blocks(whole.start, whole.stop, PIECE):
            here = within(whole.start, *block)
            sums[0] += magnitude(values[here]) if self.rescale == "l1" else 0.0
            self._cut(values[here], cut, here, draw, block)
            sums[1] += magnitude(values[here]) if self.rescale == "l1" else 0.0
        if self.rescale == "l1":
            values.mul_(self._l1(sums, whole))

    def _cut(self, values: Tensor, cut: Cut, here: slice, draw: Draw, block: tuple[int, int, int]) -> None:
        """A piece of ``F(values)`` but for a factor that the whole tensor has."""
        cut.keep_(values, here, draw, block)
        if self.rescale == "inverse_p":
            values.div_(self.density)


def _larger_of_opposite(a: Tensor, b: Tensor) -> Tensor:
    """``a <- a + b``, of two of opposite signs the larger alone; ``b`` is written to."""
    # In magnitude it is the largest of a, b and their sum: of one sign no other is larger than the sum, of opposite
    # signs the sum is smaller than one of them. Masks of torch take ten times as long.
    total = a + b
    torch.maximum(a.abs_(), b.abs_(), out=a)
    torch.maximum(a, torch.abs(total, out=b), out=a)
    return a.mul_(total.sign_())
