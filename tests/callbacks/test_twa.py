"""TWA in a Trainer: known steps, an undisturbed first stage, resuming in both, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, NetParts, Walk, batches, differing, of, raw_of, read, steps, trainer, values
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_merge.callbacks import EMA, TWA
from lightning_merge.optim import Subspace
from lightning_merge.selections import Selection
from lightning_merge.trajectory import Trajectory

ROWS = torch.tensor([[2, 0, 0, 1], [0, 2, 0, 1], [1, 1, 1, 1]], dtype=torch.float64)
CURVATURE = torch.tensor([1, 2, 3, 4], dtype=torch.float64)
OPTIMUM = torch.tensor([1.2, 0.8, 0.3, 1.4], dtype=torch.float64)


class Visit(torch.optim.Optimizer):
    """Goes to the rows one after the other."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.visited = 0

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (parameter,) = self.param_groups[0]["params"]
        with torch.no_grad():
            parameter.copy_(ROWS[min(self.visited, 2)])
        self.visited += 1
        return loss


class Quadratic(LightningModule):
    """The loss ``sum h (w - w*)^2 / 2``; keeps the weights at the beginning of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.path: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.path.append(self.w.detach().clone())
        return (CURVATURE * (self.w - OPTIMUM).square()).sum() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Visit(self.parameters())


KNOWN = {
    "iclr": [
        (1, 1, 1 / 3, 1),
        (1.076667, 1.016667, 0.323333, 1.046667),
        (1.210278, 1.040611, 0.307333, 1.125444),
        (1.374299, 1.058838, 0.290733, 1.216569),
    ],
    "centred": [
        (1, 1, 1 / 3, 1),
        (1.03, 0.97, 0.323333, 1),
        (1.0825, 0.9175, 0.307333, 1),
        (1.147375, 0.852625, 0.290733, 1),
        (1.213656, 0.786344, 0.278573, 1),
        (1.271261, 0.728739, 0.274057, 1),
    ],
}


def exact(form: str) -> list[Tensor]:
    """The same steps in full precision: SGD on all weights with the gradient projected on the span."""
    rows = ROWS if form == "iclr" else ROWS[:2] - ROWS[2]
    q, _ = torch.linalg.qr(rows.T)
    w = ROWS.mean(0).clone().requires_grad_()
    optimizer = torch.optim.SGD([w], 0.1, momentum=0.9)
    path = [w.detach().clone()]
    for _ in range(len(KNOWN[form]) - 1):
        w.grad = q @ q.T @ (CURVATURE * (w.detach() - OPTIMUM))
        optimizer.step()
        path.append(w.detach().clone())
    return path


@pytest.mark.parametrize("given", [False, True], ids=["one fit", "from checkpoints"])
@pytest.mark.parametrize("form", ["iclr", "centred"])
def test_second_stage_takes_the_known_steps(tmp_path: Path, form: str, given: bool) -> None:
    module, length = Quadratic(), len(KNOWN[form]) - 1
    for index, row in enumerate(ROWS):
        torch.save({"state_dict": {"w": row.clone()}, "global_step": index}, tmp_path / f"{index}.ckpt")
    stages: dict[str, Any] = {"checkpoints": tmp_path} if given else {"every": 1, "stage": length}
    twa = TWA(**stages, lr=0.1, schedule="constant", form=form)  # type: ignore[arg-type]
    before = 0 if given else 3
    trainer(tmp_path / "run", [twa], max_steps=before + length).fit(module, steps(20))
    found = [*module.path[before:], module.w.detach()]
    for w, digits, precise in zip(found, KNOWN[form], exact(form), strict=True):
        torch.testing.assert_close(w, torch.tensor(digits, dtype=torch.float64), atol=5e-7, rtol=0)
        torch.testing.assert_close(w, precise, atol=1e-10, rtol=0)
    assert twa.snapshots == 3
    assert twa.updates == length
    assert twa.steps == before + length
    assert twa.coefficients is not None
    total = torch.tensor(twa.coefficients, dtype=torch.float64) @ ROWS
    torch.testing.assert_close(total, module.w.detach(), atol=1e-10, rtol=0)


def test_first_stage_is_that_of_a_run_without_the_callback(tmp_path: Path) -> None:
    paths: list[list[dict[str, Tensor]]] = []
    for callbacks in ([], [TWA(every=2, stage=3)]):
        path: list[dict[str, Tensor]] = []

        class Witness(Net):  # type: ignore[misc, valid-type]
            def training_step(self, batch: Any, batch_idx: int, path: Any = path) -> Any:
                path.append(values(self))
                return super().training_step(batch, batch_idx)

        torch.manual_seed(0)
        trainer(tmp_path, callbacks, max_steps=12).fit(Witness(norm=True), batches(4))
        paths.append(path)
    plain, ours = paths
    assert all(not differing(a, b) for a, b in zip(plain[:9], ours[:9], strict=True))
    assert differing(plain[9], ours[9])


def test_the_optimizer_keeps_its_state_and_the_scheduler_its_steps_while_coefficients_are_trained(
    tmp_path: Path,
) -> None:
    class Scheduled(NetParts):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), "interval": "step"}
            ]

    buffers: list[dict[str, Tensor]] = []

    class Watched(of(Scheduled)):  # type: ignore[misc]
        def on_train_batch_end(self, *args: Any) -> None:
            state = self.optimizers().optimizer.state
            buffers.append({str(i): s["momentum_buffer"].clone() for i, s in enumerate(state.values())})

    module = Watched()
    run = trainer(tmp_path, [TWA(every=2, stage=4)], max_steps=10)
    run.fit(module, batches(5))
    assert not differing(buffers[5], buffers[9])
    assert differing(buffers[4], buffers[5])
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**10)


def test_steps_are_counted_under_accumulation_and_the_rate_falls_to_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    twa = TWA(every=1, stage=4, lr=0.4)
    step = Subspace.step

    def recorded(subspace: Subspace, live: Any, gradients: Any, lr: float, *args: Any) -> bool:
        rates.append(lr)
        return step(subspace, live, gradients, lr, *args)

    monkeypatch.setattr(Subspace, "step", recorded)
    trainer(tmp_path, [twa], max_steps=8, accumulate_grad_batches=3).fit(Net(), batches(6))
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert (twa.snapshots, twa.updates, twa.steps) == (4, 4, 8)


def test_second_stage_lowers_the_loss_and_is_what_is_measured_saved_and_left(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    twa = TWA(every=2, stage="40%", lr=0.05)
    module = Net(norm=True)
    run = trainer(tmp_path, [twa, best], max_epochs=10)
    run.fit(module, batches(4), batches(2, seed=5))
    assert twa.ready
    final = read(str(twa.final_path))
    assert final["lightning_merge"]["holds"] == "twa"
    assert final["lightning_merge"]["averages"]["twa"]["coefficients"] == pytest.approx(twa.coefficients)
    assert sum(twa.coefficients or []) == pytest.approx(1)
    again = Net(norm=True)
    again.load_state_dict(final["state_dict"])
    loss = trainer(tmp_path).validate(again, batches(2, seed=5), verbose=False)[0]["val/loss"]
    assert twa.final_metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert not differing(values(module), final["state_dict"])


def test_an_average_beside_it_reads_the_same_run_and_each_is_published(tmp_path: Path) -> None:
    ema, twa = EMA(decay=0.5), TWA(every=2, stage=3, lr=0.1)
    files = ModelCheckpoint(tmp_path, save_last=True)
    module = Net()
    trainer(tmp_path, [ema, twa, files], max_steps=12, max_epochs=-1).fit(module, batches(4), batches(2))
    merged, average = twa.merged_weights() or {}, ema.merged_weights() or {}
    assert not differing(values(module), values(average))
    assert differing(values(merged), values(average))
    assert not differing(values(merged), values(twa.raw_weights()))
    assert not differing(read(str(twa.final_path))["state_dict"], values(merged))


@pytest.mark.parametrize("form", ["centred", "iclr", "journal"])
@pytest.mark.parametrize("stop", [3, 7, 10], ids=["first stage", "first step of the second", "second stage"])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, form: str, stop: int) -> None:
    def run(folder: str, ckpt: str | None = None) -> tuple[TWA, Any]:
        inner = "sgd" if form == "iclr" else "adamw"
        twa = TWA(every=2, stage=5, lr=0.02, form=form, inner=inner)  # type: ignore[arg-type]
        files = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = Net(norm=True)
        loader = StatefulDataLoader(batches(20).dataset, batch_size=4)  # knows where it was
        trainer(tmp_path, [twa, files], max_steps=12).fit(module, loader, batches(2), ckpt_path=ckpt)
        return twa, module

    twa, module = run("whole")
    again, resumed = run("again", str(tmp_path / "whole" / f"step={stop}.ckpt"))
    assert not differing(values(module), values(resumed))
    assert again.coefficients == twa.coefficients
    assert (again.steps, again.updates, again.snapshots) == (twa.steps, twa.updates, twa.snapshots)
    assert not differing(read(str(again.final_path))["state_dict"], read(str(twa.final_path))["state_dict"])


def test_a_second_fit_with_the_same_callback_goes_on_in_the_second_stage(tmp_path: Path) -> None:
    twa, module = TWA(every=1, stage=2, lr=0.02), Net(norm=True)
    run = trainer(tmp_path, [twa], max_epochs=2)
    run.fit(module, batches(4))
    assert twa.updates == 2
    run.fit_loop.max_epochs = 3
    run.fit(module, batches(4))
    assert twa.updates == 6
    assert sum(twa.coefficients or []) == pytest.approx(1)


def test_snapshots_of_a_folder_continue_a_model_that_was_just_made(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path / "run", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trained = Net(norm=True)
    trainer(tmp_path, [files], max_steps=8).fit(trained, batches(4))
    fresh = Net(norm=True)
    twa = TWA(checkpoints=Trajectory.of_run(tmp_path / "run", last=3), lr=1e-9)
    trainer(tmp_path, [twa], max_steps=1).fit(fresh, batches(4), batches(2))
    assert twa.snapshots == 3
    mean = Trajectory.of_run(tmp_path / "run", last=3).combine([1 / 3] * 3)
    for name, parameter in fresh.named_parameters():
        torch.testing.assert_close(parameter.detach(), mean[name], atol=1e-6, rtol=1e-6)
    assert int(fresh.net[1].num_batches_tracked) == 9  # that of the last checkpoint, and one step


def test_nonfinite_snapshots_and_gradients_are_left_out(tmp_path: Path) -> None:
    class Bad(NetParts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 8 else loss

    twa, module = TWA(every=1, stage=5, lr=0.02), of(Bad)()
    with pytest.warns(UserWarning, match="gradient holds a NaN or an infinity at applied step 9"):
        trainer(tmp_path, [twa], max_steps=12).fit(module, batches(4))
    assert twa.skipped_nonfinite == 1
    assert all(tensor.isfinite().all() for tensor in values(module).values())


def test_raw_weights_in_a_full_file_are_the_live_ones(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    twa = TWA(every=1, stage=4, lr=0.02, selection=Selection(buffers="copy"))
    trainer(tmp_path, [twa, files], max_steps=8).fit(Net(norm=True), batches(4))
    for step in (3, 6):
        file = read(tmp_path / f"step={step}.ckpt")
        assert not differing(file["state_dict"], raw_of(file))
        assert file["lightning_merge"]["holds"] == ("raw" if step == 3 else "twa")


def test_a_run_that_ends_early_is_left_as_it_is_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(NetParts):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = self.global_step >= 3

    module = of(Stop)()
    twa = TWA(every=1, stage=4)
    with caplog.at_level("INFO"):
        trainer(tmp_path, [twa], max_steps=12).fit(module, batches(4))
    assert not twa.ready
    assert twa.coefficients is None
    assert "its second stage was to begin at step 8, and the run ended after" in caplog.text


def test_equal_snapshots_are_refused_when_the_stage_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two different weights have to be collected"):
        trainer(tmp_path, [TWA(every=1, stage=2)], max_steps=6).fit(Walk(lr=0.0), steps(6))


class TwoOptimizers(NetParts):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]


class Closure(NetParts):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Net, {"max_steps": 3}, "needs two snapshots or more before its second stage: `every` is 1 steps"),
        (Net, {"max_steps": -1, "max_epochs": -1}, "needs a run of known length"),
        (of(TwoOptimizers), {"max_steps": 20}, "replaces the steps of one optimizer other than LBFGS, got SGD, SGD"),
        (of(Closure), {"max_steps": 20}, "other than LBFGS, got LBFGS"),
    ],
)
def test_runs_that_it_cannot_train_in_are_refused_at_the_start(
    tmp_path: Path, module: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [TWA(every=1, stage=2)], **settings).fit(module(), batches(4))


def test_checkpoints_of_another_model_and_changed_parameters_are_refused(tmp_path: Path) -> None:
    for step in range(2):
        torch.save({"state_dict": {"w": torch.zeros(step + 1)}, "global_step": step}, tmp_path / f"{step}.ckpt")
    with pytest.raises(ValueError, match="is of another model than"):
        trainer(tmp_path, [TWA(checkpoints=tmp_path)], max_steps=4).fit(Walk(), steps(4))
    torch.save({"state_dict": {"w": torch.ones(1)}, "global_step": 1}, tmp_path / "1.ckpt")
    with pytest.raises(ValueError, match="another model than the one that is trained"):
        trainer(tmp_path, [TWA(checkpoints=tmp_path)], max_steps=4).fit(Net(), batches(4))

    class Freezes(NetParts):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch == 0)

    with pytest.raises(ValueError, match=r"`net\.0\.bias` was frozen, unfrozen, or replaced"):
        trainer(tmp_path, [TWA(every=1, stage=2)], max_steps=20).fit(of(Freezes)(), batches(4))


def test_more_snapshots_than_memory_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_merge.optim._subspace.free_bytes", lambda device: 100)
    with pytest.raises(MemoryError, match=r"10 collected weights and their mean need 2,156 bytes on cpu, and 100"):
        trainer(tmp_path, [TWA(every=1, stage=2)], max_steps=12).fit(Net(), batches(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "`lr` must be more than 0, got 0.0"),
        ({"schedule": "cosine"}, "`schedule` must be 'linear' or 'constant', got 'cosine'"),
        ({"form": "paper"}, "`form` must be"),
        ({"inner": "lamb"}, "must be 'sgd' or 'adamw'"),
        ({"stage": "no"}, "a duration must read like"),
        ({"name": "raw"}, "`name` must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TWA(**settings)
