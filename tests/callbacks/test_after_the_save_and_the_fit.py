"""What is written after the save call, what a requeued job goes on from, and what runs right after a fit."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from golden import runs
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.trainer.connectors import signal_connector
from methods import PUBLISHING, averages
from tiny import Net, Walk, batches, differing, raw_of, read, steps, trainer, validation, values

from lightning_merge.callbacks import EMA, LAWA, SMA, SWA, SWAD

AVERAGES: dict[str, Callable[[], Any]] = {
    "EMA": lambda: EMA(decay=0.5),
    "SWA": lambda: SWA(start_epoch=0),
    "LAWA": lambda: LAWA(k=2, every_n_steps=2),
    "SMA": lambda: SMA("val/loss", start_step=0),
    "SWAD": lambda: SWAD("val/loss", n_converge=1, n_tolerance=3, stop=False),
}
every_average = pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)


# ---- files that are written later


class Late(TorchCheckpointIO):
    """Writes when it is told to, which is after training."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = Event()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        assert self.may_write.wait(timeout=30)
        super().save_checkpoint(*args, **kwargs)


class Frees(Callback):
    """Lets a late writer write once training is over."""

    def __init__(self, writer: Late) -> None:
        self.writer = writer

    def on_train_end(self, *args: Any) -> None:
        self.writer.may_write.set()


@every_average
def test_a_file_that_is_written_later_holds_what_it_would_have_held_at_once(make: Any, tmp_path: Path) -> None:
    def run(root: Path, writer: Late | None) -> list[Path]:
        saved = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
        callbacks = [make(), saved] if writer is None else [Frees(writer), make(), saved]
        plugins = [] if writer is None else [AsyncCheckpointIO(writer)]
        trainer(root, callbacks, max_epochs=3, plugins=plugins).fit(Net(norm=True), batches(), validation())
        return sorted(root.glob("*.ckpt"))

    at_once, later = run(tmp_path / "at once", None), run(tmp_path / "later", Late())
    assert [path.name for path in at_once] == [path.name for path in later]
    assert len(at_once) >= 3
    for one, other in zip(map(read, at_once), map(read, later), strict=True):
        assert differing(one["state_dict"], other["state_dict"]) == []
        assert differing(raw_of(one), raw_of(other)) == []
        assert repr(one["lightning_merge"]) == repr(other["lightning_merge"])


def test_a_run_goes_on_bit_for_bit_from_a_file_that_was_written_later(tmp_path: Path) -> None:
    def run(root: Path, epochs: int, path: Path | None = None) -> Any:
        writer, module = Late(), Net()
        saved = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
        callbacks = [Frees(writer), ema := EMA(decay=0.9), saved]
        fit = trainer(root, callbacks, max_epochs=epochs, plugins=[AsyncCheckpointIO(writer)])
        fit.fit(module, batches(), validation(), ckpt_path=path)
        return ema

    whole = run(tmp_path / "whole", 3)
    again = run(tmp_path / "again", 3, tmp_path / "whole" / "epoch=0.ckpt")
    assert differing(whole.merged_weights(), again.merged_weights()) == []
    assert differing(whole.raw_weights(), again.raw_weights()) == []


class Keeps(TorchCheckpointIO):
    """Keeps what it is handed, beside a copy of that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.handed.append((checkpoint, deepcopy(checkpoint)))


@every_average
def test_merged_weights_that_a_writer_keeps_are_its_own(make: Any, tmp_path: Path) -> None:
    writer = Keeps()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit = trainer(tmp_path, [make(), saved], max_epochs=3, plugins=[writer])
    fit.fit(Net(norm=True), batches(), validation())
    assert len(writer.handed) >= 3
    for now, then in writer.handed:
        assert differing(now["state_dict"], then["state_dict"]) == []


# ---- a job that is requeued


class Requeued(Exception):
    """The job ends here."""


class Requeues(Callback):
    """SLURM's signal arrives, in the second epoch, in a hook of that name; then the job ends."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._receive)

    def _receive(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            trainer._signal_connector._slurm_sigusr_handler_fn(10, None)
            raise Requeued


SIGNALS = [
    (hook, name)
    for hook in ("on_validation_batch_end", "on_validation_end", "on_train_epoch_end")
    for name in AVERAGES
    # Lightning goes on in the middle of a validation, so there is no score of the whole to decide on.
    if (hook, name) != ("on_validation_batch_end", "SWAD")
]


@pytest.mark.parametrize(("hook", "name"), SIGNALS)
def test_a_requeued_job_goes_on_from_its_file_bit_for_bit(
    hook: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(signal_connector, "call", lambda command: asked.append(command) or 0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def run(root: Path, *more: Callback) -> tuple[Any, Any]:
        module, average = Net(norm=True), AVERAGES[name]()
        fit = trainer(root, [average, *more], max_epochs=4)
        fit.fit(module, batches(), validation())
        return module, average

    whole, average = run(tmp_path / "whole")
    with pytest.raises(Requeued):
        run(tmp_path / "job", Requeues(hook))
    assert asked == [["scontrol", "requeue", "7"]]
    assert (tmp_path / "job" / "hpc_ckpt_1.ckpt").exists()
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    monkeypatch.setattr(SLURMEnvironment, "validate_settings", lambda *args, **kwargs: None)
    for key in ("NTASKS", "LOCALID", "NODEID", "PROCID"):
        monkeypatch.setenv(f"SLURM_{key}", str(int(key == "NTASKS")))
    again, average_again = run(tmp_path / "job")  # found by its name
    assert average_again.steps == average.steps == 16
    assert differing(values(whole), values(again)) == []
    assert differing(average.raw_weights(), average_again.raw_weights()) == []


# ---- right after the fit


class Asked(Walk):  # type: ignore[misc]
    """Tells which weight it was tested and asked with."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/w", self.w.detach().sum())

    def predict_step(self, batch: Any, batch_idx: int) -> float:
        return self.w.item()


def test_test_and_predict_after_a_fit_run_with_what_is_published_and_a_second_fit_goes_on_from_raw(
    tmp_path: Path,
) -> None:
    module, ema = Asked(), EMA(decay=0.5)
    run = trainer(tmp_path, [ema], max_epochs=1)
    run.fit(module, steps(4), steps(1))
    merged = ema.merged_weights()["w"].item()  # type: ignore[index]
    assert ema.raw_weights()["w"].item() == 4.0 != merged
    for _ in range(2):
        assert run.predict(module, steps(2)) == [merged, merged]
        assert run.test(module, steps(1), verbose=False)[0]["test/w"] == merged
        assert run.validate(module, steps(1), verbose=False)[0]["val/w"] == merged
        assert module.w.item() == merged
    run.fit_loop.max_epochs = 2
    run.fit(module, steps(4), steps(1))
    assert ema.raw_weights()["w"].item() == 8.0
    assert ema.updates == 8
    assert module.w.item() == ema.merged_weights()["w"].item()  # type: ignore[index]
    assert run.predict(module, steps(1)) == [module.w.item()]


@every_average
def test_another_trainer_predicts_with_what_is_published(make: Any, tmp_path: Path) -> None:
    module, average = Net(norm=True), make()
    trainer(tmp_path, [average, ModelCheckpoint(tmp_path)], max_epochs=3).fit(module, batches(), validation())
    published = values(module)
    module.eval()
    with torch.no_grad():
        expected = [module(batch[0]) for batch in batches(2)]
    module.predict_step = lambda batch, batch_idx: module(batch[0])  # type: ignore[method-assign]
    for callbacks in ([], [average]):
        found = trainer(tmp_path, callbacks).predict(module, batches(2))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert differing(published, values(module)) == []
    loaded = Net(norm=True)
    loaded.load_state_dict(read(tmp_path / f"{average.name}-final.ckpt")["state_dict"])
    assert differing(published, values(loaded)) == []


# ---- a callback that is copied, as launchers and schedulers of experiments do

WITH_A_LAMBDA = {"evaluation-weights"}
"""Those that the table gives a function which Python cannot pickle."""


def pickled(callbacks: list[Any]) -> list[Any]:
    found: list[Any] = pickle.loads(pickle.dumps(callbacks))
    return found


@pytest.mark.parametrize("method", PUBLISHING)
def test_a_copy_of_a_callback_knows_and_does_what_the_callback_does(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(callbacks: list[Any], folder: Path) -> dict[str, Any]:
        folder.mkdir()
        monkeypatch.chdir(folder)
        torch.manual_seed(3)
        module = runs.module(method)
        trainer(folder, callbacks, max_epochs=2, enable_checkpointing=False).fit(module, *runs.loaders())
        return values(module)

    ways = [deepcopy] if method in WITH_A_LAMBDA else [deepcopy, pickled]
    callbacks = PUBLISHING[method]()
    twins = [way(callbacks) for way in ways]
    here = held(callbacks, tmp_path / "own")
    for number, twin in enumerate(twins):
        assert differing(here, held(twin, tmp_path / str(number))) == []
    for way in ways:
        for each, copy in zip(averages(callbacks), averages(way(callbacks)), strict=True):
            assert differing(each.raw_weights(), copy.raw_weights()) == []
