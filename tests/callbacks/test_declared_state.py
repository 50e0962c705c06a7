"""A resumed callback is as it was when the file was written: what a fit changes is saved, or declared as derived."""

from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from golden import runs
from lightning.pytorch.callbacks import Checkpoint
from methods import PUBLISHING

from lightning_merge import callbacks as merging

DERIVED = {
    "_publisher": "of one fit",
    "publisher": "of one fit",
    "_module": "of one fit",
    "_resumed": "says that this fit goes on from a file",
    "trial": "the first batch of a fit is tried",
    "way": "found out by that",
    "in_eval": "found out by that",
    "_last": "of one batch, for its further branches",
    "_only_to_try": "of one batch",
    "_found": "the second set, read again when it is asked for",
    "_step_hooks": "of one fit",
    "mean": "made of the branches when it is asked for",
    "cache": "made of the snapshots when it is asked for",
    "_average": "the callback itself",
    "outside": "watches the turns of one fit",
    "_checked": "the optimizers of a fit are looked at",
    "attributes": "what steps write on the module beside its state dict is in no file, without branches too",
    "frozen": "looked at again before the turns of a batch",
}
"""Attributes that need not come back, and why."""

OF_BRANCHES = {
    "_buffers": "measured again when the mean is asked for",
    "_calibrated_at": "measured again when the mean is asked for",
}

PLAIN = (bool, int, float, str, tuple, list, dict, set, deque, torch.Tensor)


class Snapshot(Checkpoint):
    """Writes a full file in mid-epoch, and describes the averages when training starts and when the file is written."""

    def __init__(self, averages: list[Any], path: Path) -> None:
        self.averages = averages
        self.path = path
        self.started: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for average in self.averages:
            if isinstance(average, merging.Branching):
                average._running.begin()  # as the first batch does
        self.started = described(self.averages)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step >= 7 and not self.path.exists():
            trainer.save_checkpoint(self.path)
            self.saved = described(self.averages)


def described(averages: list[Any]) -> dict[str, Any]:
    return {path: value for average in averages for path, value in attributes(average, average.name)}


def attributes(owner: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Plain values among the attributes of one of our callbacks, and of the objects of that layer that it holds."""
    derived = DERIVED | (OF_BRANCHES if isinstance(owner, merging.Branching) else {})
    names = [field.name for field in fields(owner)] if is_dataclass(owner) else list(vars(owner))
    for name in names:
        value = getattr(owner, name)
        if name not in derived and is_ours(value):
            yield from attributes(value, f"{path}.{name}")
        elif name not in derived and (value is None or isinstance(value, PLAIN)):
            yield f"{path}.{name}", plain(value)


def is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("lightning_merge.callbacks")


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if is_ours(value):
        return dict(attributes(value, ""))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key not in DERIVED}
    return [plain(each) for each in value] if isinstance(value, list | tuple | deque) else repr(value)


def test_every_callback_that_publishes_is_in_the_table() -> None:
    listed = {type(average).__name__ for make in PUBLISHING.values() for average in runs.averages(make())}
    published = {
        name
        for name in merging.__all__
        if isinstance(kind := getattr(merging, name), type) and issubclass(kind, merging.Published)
    }
    assert published - listed == {"Published"}


@pytest.mark.parametrize("method", PUBLISHING)
def test_a_resumed_callback_is_as_it_was_saved(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def snapshot(ckpt_path: Path | None) -> Snapshot:
        torch.manual_seed(3)
        callbacks = PUBLISHING[method]()
        last = Snapshot(runs.averages(callbacks), tmp_path / "full.ckpt")
        trainer = pl.Trainer(**runs.quiet(tmp_path), max_epochs=runs.EPOCHS, callbacks=[*callbacks, last])
        trainer.fit(runs.module(method), *runs.loaders(), ckpt_path=ckpt_path)
        return last

    first = snapshot(None)
    assert first.saved
    again = snapshot(tmp_path / "full.ckpt")
    before, after = first.saved, again.started
    assert not {
        path: (before.get(path), after.get(path))
        for path in before | after
        if before.get(path, ...) != after.get(path, ...)
    }
