"""Which weights are live: merged ones in the place of raw ones and back, for the length of a block."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge._averaging._in_place import in_place, publishable
from lightning_merge._averaging._watching import Watching
from lightning_merge._ranks import check_agreement
from lightning_merge.callbacks._publication._apart import Apart
from lightning_merge.callbacks._publication._average import Average, Ending, averages_of
from lightning_merge.shards import reshard
from lightning_merge.spectral import iterate_
from lightning_merge.weights import Weights


class Exchange(Watching):
    """Puts the weights of a Trainer's averages in place; the only one that moves live tensors.

    Args:
        trainer: A Trainer of ``lightning.pytorch`` or of ``pytorch_lightning``; the two share no class.
        module: The module that is trained.

    Attributes:
        swapped_out: Raw tensors while merged ones are in their place.
        apart: Makes one of the weights of processes that train apart.
        interrupted: Whether the fit has failed, so that no forward pass and no collective may run.
        busy: Whether a file is being written or read, for which torch may step optimizers.
        begun: The averages whose fit has begun.

    Raises:
        ValueError: If the averages of the Trainer do not go together.
    """

    module: LightningModule

    def __init__(self, trainer: Any, module: LightningModule) -> None:
        super().__init__(module)
        self.trainer = trainer
        self.averages = averages_of(trainer)
        self.begun: list[Average] = []
        self.ending: Ending | None = None
        self.interrupted = False
        self.apart = Apart(self.inventory, self._is_interrupted)
        self.swapped_out: Mapping[str, Tensor] = {}
        self.busy = False
        self._measuring: tuple[int, list[nn.Module]] | None = None  # layers with statistics

    def _is_interrupted(self) -> bool:
        return self.interrupted

    def trains_statistics(self) -> bool:
        """Whether training itself measures any: layers in eval mode are frozen, and keep what they have."""
        if self._measuring is None or self._measuring[0] != self.inventory.version:
            layers = [each for each in self.module.modules() if getattr(each, "running_mean", None) is not None]
            self._measuring = self.inventory.version, layers
        return any(layer.training for layer in self._measuring[1])

    @property
    def primary(self) -> Average:
        """The first average of the callback list."""
        return self.averages[0]

    def check_progress(self) -> None:
        """Raises in every process if one has left weights out that others took in, since theirs held no NaN."""
        check_agreement(
            {name: value for average in self.averages for name, value in average.progress().items()},
            "A NaN or an infinity in the weights of one process alone makes averages that do not fit together. Resume"
            " from an earlier checkpoint with a lower learning rate or clipped gradients.",
        )

    def look(self, *, before_step: bool = False) -> None:
        """Looks the live tensors up, and tells the averages if any was replaced, added, removed, frozen or unfrozen.

        Args:
            before_step: Whether Lightning's next step looks at sizes and at what is frozen, and that is early enough.
        """
        if self.swapped_out:
            return  # what is assigned anew while others are in place goes with them
        if self._is_sharded:
            reshard(self.module)
        if self.has_changed(before_step=before_step):
            for average in self.begun:
                average.look_again()

    @property
    def _is_sharded(self) -> bool:
        return any(average.is_sharded for average in self.averages)

    # ---- which weights

    def raw(self, average: Average) -> Weights:
        """The raw tensors of the names an average merges."""
        set_aside = average.ending.raw if average.ending is not None else self.swapped_out
        return {name: set_aside.get(name, tensor).detach() for name, tensor in average.tensors.items()}

    def under_every_name(self, tensors: Weights) -> Weights:
        """Tensors under each name that the module has for them."""
        return self.inventory.under_every_name(tensors)

    def fit_vectors_(self, average: Average, tensors: Weights) -> None:
        """Iterates the vectors of spectral normalisation among the tensors, until they fit the weights among them."""
        if names := self.singular_vectors & tensors.keys():
            fitted = weights.copies(weights.like(tensors, average.tensors))
            with self.in_place(fitted):
                iterate_(self.module)
            weights.copy_({name: tensors[name] for name in names}, fitted)

    @property
    def set_aside(self) -> Mapping[str, Tensor]:
        """All raw tensors that others are in the place of."""
        return self.swapped_out if self.ending is None else {**self.swapped_out, **self.ending.raw}

    def set_of(self, average: Average) -> Weights:
        """The merged tensors of an average as they are published."""
        if not self.interrupted:
            average.recalibrate()
        return self.publishable(average, average.published_weights() or {})

    def publishable(self, average: Average, tensors: Mapping[str, Tensor]) -> Weights:
        """Any tensors in the place of an average's: in the live dtype, buffers equal on all ranks."""
        published, buffers = publishable(self.module, tensors, average.tensors, average.buffer_names)
        if not self.interrupted:
            weights.mean_over_ranks_(buffers, average.captured)
        return {**published, **buffers}

    @contextmanager
    def swapped(self, average: Average, merged: Weights | None = None) -> Iterator[None]:
        """Merged weights in place of the raw ones, for the length of a block, whatever happens in it."""
        self.look()
        with self.in_place(self.set_of(average) if merged is None else merged):
            yield

    @contextmanager
    def raw_in_place(self, average: Average) -> Iterator[None]:
        """Raw weights in place again within a block of merged ones."""
        with self.in_place(dict(self.swapped_out)):
            yield

    @contextmanager
    def in_place(self, tensors: Mapping[str, Tensor]) -> Iterator[Weights]:
        """Tensors in the place of the live ones of their names for the length of a block, whatever happens in it.

        Yields what was there before, which fills as the exchange goes on.
        """
        before: Weights = {}
        outer = self.swapped_out
        # Of nested blocks the outermost knows the raw weights.
        self.swapped_out = ChainMap(outer, before)  # type: ignore[arg-type]
        try:
            with in_place(self.module, self.inventory, tensors, before, outermost=not outer):
                yield before
        finally:
            self.swapped_out = outer
