"""Random number generators saved with the run, so that resuming draws the same numbers."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_merge.callbacks._lightning._internals import loaders_of
from lightning_merge.callbacks._lightning._loaders import count_reloads, restore_samplers
from lightning_merge.callbacks._lightning._patches import Patches


class RandomState(Callback):
    """Saves the random state of torch (CPU and CUDA), numpy and Python in every full checkpoint, and restores it.

    Lightning saves none, so a resumed run draws other numbers for dropout, augmentation and the order of samples. From
    a file of an epoch's end a run equals the uninterrupted one bit for bit, with any number of workers that begin anew
    in each epoch (no ``persistent_workers``). So it does from the middle of an epoch with a loader that remembers its
    position (``torchdata``'s ``StatefulDataLoader``, ``num_workers=0``). Generators that were given to loaders or their
    samplers are saved and restored likewise. For one process: each rank has its own state
    and a file is written by one of them.

    Raises:
        ValueError: At fit start if there is more than one process.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._patches = Patches()
        self._trainer: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses several processes, and takes its place where the first epoch of a resumed fit begins."""
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise ValueError(f"RandomState works for one process, got `world_size` {trainer.world_size}.")
        self._loaded, self._trainer = None, trainer  # what was loaded is of a file that was only validated or tested
        self._patches.undo()
        self._patches.replace(trainer.fit_loop, "on_advance_start", partial(self._begin, trainer))
        self._patches.replace(trainer.fit_loop.epoch_loop, "on_run_start", partial(self._begin_batches, trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the loops as they were."""
        self._patches.undo()
        self._trainer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the loops as they were."""
        self._patches.undo()

    def state_dict(self) -> dict[str, Any]:
        """The current states, as tensors and numbers."""
        version, internal, gauss = random.getstate()
        numpy = np.random.get_state(legacy=False)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            # As numbers: `torch.load(weights_only=True)` reads no arrays.
            "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
            "python": [version, list(internal), gauss],
            "loaders": [generator.get_state() for generator in _generators(self._trainer)],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts: what Lightning does before that draws numbers too."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores what was loaded, for hooks that draw numbers here."""
        if self._loaded is not None:
            _restore(self._loaded)

    def _begin(self, trainer: Any, original: Callable[[], None]) -> None:
        """An epoch begins. The first time, restores what was loaded: what came before has drawn numbers of its own."""
        if self._loaded is not None:
            _restore(self._loaded)
            _restore_loaders(trainer, self._loaded)
            count_reloads(trainer)
        original()

    def _begin_batches(self, trainer: Any, original: Callable[[Any], None], fetcher: Any) -> None:
        """The batches of an epoch begin. The first time, makes the iterator of a new epoch anew.

        Lightning made it before there was anything to restore, so its order of samples is another one.
        """
        before = fetcher.iterator
        original(fetcher)
        loaded, self._loaded = self._loaded, None
        loop = trainer.fit_loop
        is_new_epoch = loop.epoch_loop.batch_progress.current.ready == 0 and loop.epoch_progress.current.processed > 0
        if loaded is not None and is_new_epoch and fetcher.iterator is before:
            restore_samplers(loop)
            _restore_loaders(trainer, loaded)
            iter(fetcher)


def _generators(trainer: Any) -> list[torch.Generator]:
    """Those that the loaders of training and validation were given, and their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for loop in () if trainer is None else (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        for loader in loaders_of(loop):
            by_batches = getattr(loader, "batch_sampler", None)
            for owner in (loader, getattr(loader, "sampler", None), by_batches, getattr(by_batches, "sampler", None)):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    found[id(generator)] = generator
    return list(found.values())


def _restore_loaders(trainer: Any, states: dict[str, Any]) -> None:
    generators, saved = _generators(trainer), states.get("loaders", [])
    if len(generators) != len(saved):
        if saved:
            rank_zero_warn(
                f"RandomState: the file's run had loaders with {len(saved)} generators of their own, this run has"
                f" {len(generators)}: these are left as they are, so the order of samples may be another one."
            )
        return
    for generator, state in zip(generators, saved, strict=True):
        generator.set_state(state)


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy = states["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}})
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
