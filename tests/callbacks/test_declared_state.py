"""What a callback remembers is in its section of a file: nothing that changes in a fit is forgotten by a resume."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from golden import runs
from lightning.pytorch.callbacks import Checkpoint

from lightning_merge.callbacks import Branching

DERIVED = {"final_path", "final_metrics", "_resumed"}
"""Attributes that a resumed run need not have as they were: they say what an earlier fit did, or how this one began."""

DERIVED_OF_BRANCHES = {"_calibrated_at"}
"""Of callbacks whose published mean is made anew from the branches, and measured again with it."""

METHODS = [name for name, make in runs.METHODS.items() if runs.averages(make())]


class Remembers(Checkpoint):
    """Copies of all plain attributes of the averages, when training starts and after a file was written."""

    def __init__(self, callbacks: list[Any], path: Path) -> None:
        self.callbacks = callbacks
        self.path = path
        self.started: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = plain_attributes(self.callbacks)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7 and not self.saved:
            trainer.save_checkpoint(self.path)
            self.saved = plain_attributes(self.callbacks)


def plain_attributes(callbacks: list[Any]) -> dict[str, Any]:
    """The attributes of averages that are numbers, texts, or sequences and mappings of them."""
    found: dict[str, Any] = {}
    for average in runs.averages(callbacks):
        left_out = DERIVED | (DERIVED_OF_BRANCHES if isinstance(average, Branching) else set())
        plain = {key: value for key, value in vars(average).items() if key not in left_out and is_plain(value)}
        found |= {f"{type(average).__name__}.{key}": deepcopy(value) for key, value in plain.items()}
    return found


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    return value is None or isinstance(value, int | float | str)


def fit(method: str, root: Path, path: Path | None = None) -> Remembers:
    callbacks = runs.METHODS[method]()
    memory = Remembers(callbacks, root / "amid.ckpt")
    pl.seed_everything(3, verbose=False)
    run = pl.Trainer(
        max_epochs=runs.EPOCHS,
        callbacks=[*callbacks, memory],
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    run.fit(runs.module(method), *runs.loaders(), ckpt_path=path)
    return memory


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_callback_has_every_attribute_as_it_was(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = fit(method, tmp_path)
    resumed = fit(method, tmp_path, tmp_path / "amid.ckpt")
    assert written.saved
    both = written.saved.keys() & resumed.started.keys()  # what is a tensor by then is golden files' to compare
    assert {name: resumed.started[name] for name in both} == {name: written.saved[name] for name in both}
    assert len(both) > 10
