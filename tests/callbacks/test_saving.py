"""What is in a file: the weights its score was measured on, whatever wrote it, and all that a resume needs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from tiny import Net, NetParts, Walk, batches, differing, of, raw_of, read, score, steps, trainer, validation, values

from lightning_merge.callbacks import EMA, SWA, WeightMerging
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps

# What writes a file: arguments of ModelCheckpoint, and of the Trainer.
TRIGGERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "validation end": ({"save_on_train_epoch_end": False, "save_top_k": -1}, {}),
    "validation in mid-epoch": ({"save_top_k": -1}, {"val_check_interval": 2}),
    "epoch end": ({"save_on_train_epoch_end": True, "save_top_k": -1}, {}),
    "every n steps": ({"every_n_train_steps": 2, "save_top_k": -1}, {"val_check_interval": 2}),
    "every n epochs": ({"every_n_epochs": 2, "save_top_k": -1}, {}),
    "last": ({"save_last": True}, {}),
    "last link": ({"save_last": "link"}, {}),
    "the best two": ({"save_top_k": 2}, {}),
    "the worst": ({"mode": "max"}, {}),
    "weights only": ({"save_weights_only": True, "save_top_k": -1}, {}),
    "last, weights only": ({"save_weights_only": True, "save_last": True}, {}),
}
AVERAGES: dict[str, Callable[[], WeightMerging]] = {
    "ema": lambda: EMA(decay=0.8),
    "swa": lambda: SWA(start_epoch=1),
    "mean": lambda: WeightMerging(Mean(), EveryNSteps(3)),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("trigger", TRIGGERS.values(), ids=TRIGGERS)
def test_the_weights_in_a_file_have_the_score_in_the_file(
    trigger: tuple[dict[str, Any], dict[str, Any]], average: Callable[[], WeightMerging], tmp_path: Path
) -> None:
    arguments, settings = trigger
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{step}", monitor="val/loss", **arguments)
    callback = average()
    run = trainer(tmp_path, [callback, checkpoint], max_epochs=3, **settings)
    run.fit(Net(norm=True), batches(4), validation())

    measured = 0
    for path, recorded in checkpoint.best_k_models.items():
        file = read(path)
        label = file["lightning_merge"]
        assert label["holds"] == (callback.name if label["averages"][callback.name]["updates"] else "raw")
        assert label["monitor"] == "val/loss"
        # Asked for every n steps, Lightning also saves before a validation, under the score of the one before.
        assert label["measured"] or "every_n_train_steps" in arguments
        if label["measured"]:
            measured += 1
            assert label["metrics"]["val/loss"] == label["score"] == score(file["state_dict"], norm=True)
            assert label["score"] == recorded.item()
        else:
            assert (label["metrics"], label["score"]) == ({}, None)
    assert measured
    last = read(checkpoint.last_model_path or checkpoint.best_model_path)
    assert last["lightning_merge"]["metrics"]["val/loss"] == score(last["state_dict"], norm=True)


def test_score_equals_file_in_both_packages(package: ModuleType, tmp_path: Path) -> None:
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path, monitor="val/loss", save_weights_only=True)
    run = trainer(tmp_path, [EMA(decay=0.8), checkpoint], package=package, max_epochs=2)
    run.fit(of(NetParts, package)(), batches(4), validation())
    assert checkpoint.best_model_score.item() == score(read(checkpoint.best_model_path)["state_dict"])


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("at_epoch_end", [False, True])
@pytest.mark.parametrize(
    ("monitor", "holds"),
    [("val/loss", "ema"), ("raw/val/loss", "raw"), ("slow/val/loss", "slow"), ("train/loss", "raw")],
)
def test_each_file_holds_the_set_that_its_own_monitor_was_measured_on(
    monitor: str, holds: str, at_epoch_end: bool, weights_only: bool, tmp_path: Path
) -> None:
    arguments = {"monitor": monitor, "save_weights_only": weights_only, "save_on_train_epoch_end": at_epoch_end}
    averages = [EMA(decay=0.5, validate="both"), EMA(decay=0.9, name="slow")]
    checkpoint = ModelCheckpoint(tmp_path, **arguments)
    run = trainer(tmp_path, [*averages, checkpoint], max_epochs=2)
    run.fit(Net(), batches(4), validation())

    file = read(checkpoint.best_model_path)
    assert file["lightning_merge"]["holds"] == holds
    assert file["lightning_merge"]["score"] == checkpoint.best_model_score.item()
    if monitor == "train/loss":
        plain = ModelCheckpoint(tmp_path / "plain", **arguments)
        trainer(tmp_path, [plain], max_epochs=2).fit(Net(), batches(4), validation())
        assert not differing(file["state_dict"], read(plain.best_model_path)["state_dict"])
    else:
        assert checkpoint.best_model_score.item() == score(file["state_dict"])


@pytest.mark.parametrize(("monitor", "holds", "weight"), [(None, "ema", 3.0625), ("train/w", "raw", 4.0)])
def test_a_file_written_after_the_publication_is_like_any_other(
    monitor: str | None, holds: str, weight: float, tmp_path: Path
) -> None:
    class Logging(Walk):
        def on_train_batch_end(self, *args: Any) -> None:
            self.log("train/w", self.w.detach().sum())

    # Lightning writes the last file in `on_train_end` if no other was due.
    last = ModelCheckpoint(tmp_path, monitor=monitor, save_last=True, every_n_train_steps=100)
    module = Logging()
    trainer(tmp_path, [EMA(decay=0.5), last], max_epochs=1).fit(module, steps(4))
    file = read(last.last_model_path)
    assert (file["lightning_merge"]["holds"], file["state_dict"]["w"].item()) == (holds, weight)
    assert raw_of(file)["w"].item() == 4.0
    assert module.w.item() == 3.0625
    resumed, ema = Logging(), EMA(decay=0.5)
    trainer(tmp_path, [ema], max_epochs=2).fit(resumed, steps(4), ckpt_path=last.last_model_path)
    assert (ema.updates, ema.raw_weights()["w"].item()) == (8, 8.0)


@pytest.mark.parametrize("where", ["on_validation_end", "on_train_epoch_end", "on_train_batch_end"])
def test_an_explicit_save_holds_the_primary_and_says_whether_it_was_measured(where: str, tmp_path: Path) -> None:
    class Saving(Callback):
        """Saves, and keeps what the average and the live weights were."""

        def save(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "full.ckpt")
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
            self.merged = values(average.merged_weights())
            self.raw = values(average.raw_weights())

    setattr(Saving, where, Saving.save)
    average, saving = EMA(decay=0.8), Saving()
    trainer(tmp_path, [average, saving], max_epochs=1).fit(Net(), batches(4), validation())

    full, weights = read(tmp_path / "full.ckpt"), read(tmp_path / "weights.ckpt")
    assert not differing(full["state_dict"], saving.merged)
    assert not differing(weights["state_dict"], saving.merged)
    assert differing(saving.raw, saving.merged)
    assert full["lightning_merge"]["holds"] == weights["lightning_merge"]["holds"] == "ema"
    measured = where != "on_train_batch_end"
    assert full["lightning_merge"]["measured"] is weights["lightning_merge"]["measured"] is measured
    if measured:
        assert full["lightning_merge"]["metrics"]["val/loss"] == score(full["state_dict"])


def test_a_file_written_on_an_exception_says_whether_it_was_measured(tmp_path: Path) -> None:
    class Crashing(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch == 1 and batch_idx == self.crash_at:
                raise RuntimeError("no power")

    # Before the first batch of an epoch the weights are those of the last validation; later they are not.
    for crash_at, measured in ((0, True), (2, False)):
        rescue = OnExceptionCheckpoint(tmp_path / str(crash_at))
        module = Crashing()
        module.crash_at = crash_at
        with pytest.raises(RuntimeError, match="no power"):
            trainer(tmp_path, [EMA(decay=0.8), rescue], max_epochs=2).fit(module, batches(4), validation())
        file = read(rescue.ckpt_path)
        assert file["lightning_merge"]["holds"] == "ema"
        assert file["lightning_merge"]["measured"] is measured
        if measured:
            assert file["lightning_merge"]["metrics"]["val/loss"] == score(file["state_dict"])
        assert not differing(raw_of(file), module)


def test_a_save_after_the_last_validation_is_not_called_measured(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path, [EMA(decay=0.5), every], max_epochs=1, val_check_interval=2)
    run.fit(Walk(), steps(5), steps(1))
    labels = {step: read(tmp_path / f"step={step}.ckpt")["lightning_merge"] for step in range(1, 6)}
    # A file is written before the validation of its own step; nothing measured is ever attached to other weights.
    for step, label in labels.items():
        if label["measured"]:
            assert label["metrics"]["val/w"] == read(tmp_path / f"step={step}.ckpt")["state_dict"]["w"].item()
    assert [labels[step]["measured"] for step in (1, 3, 5)] == [False, False, False]


def test_a_full_file_has_all_sets_and_a_weights_only_file_only_its_own(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.live = values(pl_module)
            trainer.save_checkpoint(tmp_path / "full.ckpt")
            trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    save = Save()
    trainer(tmp_path, [EMA(decay=0.8), save], max_epochs=1).fit(Net(norm=True), batches(4))

    full, weights = read(tmp_path / "full.ckpt"), read(tmp_path / "weights.ckpt")["lightning_merge"]
    assert not differing(raw_of(full), save.live)
    assert differing(full["state_dict"], save.live)
    assert set(weights) == {"format", "holds", "measured", "monitor", "score", "metrics", "averages"}
    assert set(full["lightning_merge"]) == {*weights, "raw", "states"}


def test_resuming_from_a_weights_only_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer(tmp_path, [EMA(), checkpoint], max_epochs=1).fit(Net(), batches(4))
    with pytest.raises(ValueError, match="weights only"):
        trainer(tmp_path, [EMA()], max_epochs=2).fit(Net(), batches(4), ckpt_path=checkpoint.best_model_path)


def test_resuming_with_the_average_of_another_model_names_the_first_difference_and_both_shapes(tmp_path: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net[2] = torch.nn.Linear(8, 3)

    checkpoint = ModelCheckpoint(tmp_path)
    trainer(tmp_path, [EMA(), checkpoint], max_epochs=1).fit(Net(), batches(4))
    different = r"another model: `net\.2\.weight` has shape \(1, 8\) instead of \(3, 8\)"
    with pytest.raises(ValueError, match=different):
        trainer(tmp_path, [EMA()], max_epochs=2).fit(Other(), batches(4), ckpt_path=checkpoint.best_model_path)


def test_each_average_has_a_final_file_with_its_score(tmp_path: Path) -> None:
    ema, swa = EMA(decay=0.8), SWA(start_epoch=1)
    module = Net(norm=True)
    checkpoint = ModelCheckpoint(tmp_path)
    trainer(tmp_path, [ema, swa, checkpoint], max_epochs=2).fit(module, batches(4), validation())

    assert not differing(ema.merged_weights(), module)
    for average in (ema, swa):
        assert Path(average.final_path) == tmp_path / f"{average.name}-final.ckpt"
        file = read(average.final_path)
        assert not differing(file["state_dict"], average.merged_weights())
        assert file["lightning_merge"]["holds"] == average.name
        assert file["lightning_merge"]["measured"] is True
        assert file["lightning_merge"]["metrics"] == average.final_metrics
        assert average.final_metrics["val/loss"] == score(file["state_dict"], norm=True)


def test_without_checkpointing_no_file_is_written(tmp_path: Path) -> None:
    ema = EMA(decay=0.8)
    trainer(tmp_path, [ema], max_epochs=1).fit(Net(), batches(4), validation())
    assert ema.final_path is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_run_that_never_merged_is_that_of_a_run_without_the_callback(tmp_path: Path) -> None:
    def run(callbacks: list[Callback], folder: Path) -> dict[str, Any]:
        checkpoint = ModelCheckpoint(folder, monitor="val/loss")
        trainer(tmp_path, [*callbacks, checkpoint], max_epochs=2).fit(Net(norm=True), batches(4), validation())
        return {"score": checkpoint.best_model_score, "file": read(checkpoint.best_model_path)}

    plain = run([], tmp_path / "plain")
    never = run([EMA(start_step=1000), SWA(start_epoch=1000)], tmp_path / "never")
    assert never["score"] == plain["score"]
    assert not differing(never["file"]["state_dict"], plain["file"]["state_dict"])
    assert never["file"]["lightning_merge"]["holds"] == "raw"
    assert never["file"]["lightning_merge"]["score"] == plain["score"].item()


def test_best_file_loads_by_the_usual_ways(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    run = trainer(tmp_path, [EMA(decay=0.8), checkpoint], max_epochs=2)
    run.fit(Net(), batches(4), validation())
    best = checkpoint.best_model_score.item()

    assert score(Net.load_from_checkpoint(checkpoint.best_model_path).state_dict()) == best
    # A Trainer with and without the callback measures the file's own score again.
    assert run.validate(Net(), validation(), ckpt_path="best", verbose=False) == [{"val/loss": best}]
    for callbacks in ([], [EMA(decay=0.8)]):
        again = trainer(tmp_path, callbacks)
        path = checkpoint.best_model_path
        assert again.validate(Net(), validation(), ckpt_path=path, verbose=False) == [{"val/loss": best}]


@pytest.mark.parametrize("monitor", ["val/loss", "val/loss_epoch", "raw/val/loss_epoch"])
def test_a_metric_that_is_logged_per_step_and_epoch_can_be_monitored(monitor: str, tmp_path: Path) -> None:
    class Both(Net):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("val/loss", self.loss(batch), on_step=True, on_epoch=True, batch_size=len(batch[0]))

    checkpoint = ModelCheckpoint(tmp_path, monitor=monitor)
    run = trainer(tmp_path, [EMA(decay=0.8, validate="both"), checkpoint], max_epochs=2)
    run.fit(Both(), batches(4), validation())
    file = read(checkpoint.best_model_path)
    assert file["lightning_merge"]["holds"] == ("raw" if monitor.startswith("raw/") else "ema")
    assert file["lightning_merge"]["measured"] is True
    assert checkpoint.best_model_score.item() == file["lightning_merge"]["score"] == score(file["state_dict"])


def test_several_checkpoints_of_one_run_each_hold_their_own_set(tmp_path: Path) -> None:
    holds = {"val/loss": "ema", "raw/val/loss": "raw", "swa/val/loss": "swa"}
    checkpoints = {key: ModelCheckpoint(tmp_path / name, monitor=key) for key, name in holds.items()}
    averages = [EMA(decay=0.8, validate="both"), SWA(start_epoch=1)]
    run = trainer(tmp_path, [*averages, *checkpoints.values()], max_epochs=3)
    run.fit(Net(norm=True), batches(4), validation())
    for key, checkpoint in checkpoints.items():
        file = read(checkpoint.best_model_path)
        assert file["lightning_merge"]["holds"] == holds[key]
        assert checkpoint.best_model_score.item() == score(file["state_dict"], norm=True)


class Stops(Net):
    """Asks in its sixth step, in mid-epoch, for the end of the fit."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 5:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


# What is filed under a score: the module, arguments of the Trainer and of ModelCheckpoint, whether all was measured.
ENDS: dict[str, tuple[type[Net], dict[str, Any], dict[str, Any], bool]] = {
    "as planned": (Net, {}, {}, True),
    "asked to stop": (Stops, {}, {}, True),
    "asked to stop, at the epoch's end": (Stops, {}, {"save_on_train_epoch_end": True}, True),
    "no validation at the end": (Net, {"max_steps": 6}, {}, False),
    "training went on": (Net, {"val_check_interval": 3}, {"save_on_train_epoch_end": True}, False),
    "the cure": (Net, {"max_steps": 6}, {"save_on_train_epoch_end": False}, True),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize(("module", "settings", "arguments", "measured"), ENDS.values(), ids=ENDS)
def test_a_file_under_an_earlier_score_is_said_and_none_is_after_a_stop(
    module: type[Net],
    settings: dict[str, Any],
    arguments: dict[str, Any],
    measured: bool,
    average: Callable[[], WeightMerging],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{step}", monitor="val/loss", save_top_k=-1, **arguments)
    run = trainer(tmp_path, [average(), checkpoint], **{"max_epochs": 3} | settings)
    with caplog.at_level("INFO"):
        run.fit(module(), batches(4), validation())
    files = {path: read(path) for path in checkpoint.best_k_models}
    assert all(file["lightning_merge"]["measured"] for file in files.values()) is measured
    assert caplog.text.count("is filed under `val/loss` of an earlier validation") == (not measured)
    for path, file in files.items():
        if file["lightning_merge"]["measured"]:
            assert score(file["state_dict"]) == float(checkpoint.best_k_models[path])
