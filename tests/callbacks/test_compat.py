"""Lightning's averaging callbacks by name: one import line changes, and old files go on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as lightnings
import pytest
import tiny
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_merge import compat
from lightning_merge.callbacks import EMA, SWA, SWAD
from lightning_merge.cli import main

# ---- a changed import line


def script(imports: str, callback: str) -> str:
    return f"""
import lightning.pytorch as pl
import torch
from {imports}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]


{callback}
x = torch.randn(32, 4)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), 4)
callbacks = [callback, pl.callbacks.ModelCheckpoint(monitor="val/loss", save_last=True),
             pl.callbacks.EarlyStopping("val/loss", patience=99), pl.callbacks.LearningRateMonitor()]
trainer = pl.Trainer(max_epochs=6, callbacks=callbacks, accelerator="cpu", accumulate_grad_batches=2,
                     enable_progress_bar=False, enable_model_summary=False,
                     logger=pl.loggers.CSVLogger("."), log_every_n_steps=1)
model = Net()
trainer.fit(model, loader, loader)
trainer.validate(model, loader, ckpt_path="best", verbose=False)
"""


CONFIGURATIONS = {
    "StochasticWeightAveraging": [
        "callback = StochasticWeightAveraging(swa_lrs=1e-2)",
        "callback = StochasticWeightAveraging([0.05], 2, annealing_epochs=3, annealing_strategy='linear')",
        "callback = StochasticWeightAveraging(0.05, 0.5, avg_fn=lambda a, w, n: a + (w - a) / (n + 1), device=None)",
    ],
    "WeightAveraging": [
        "callback = WeightAveraging()",
        "from torch.optim.swa_utils import get_ema_multi_avg_fn\n"
        "callback = WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(0.9))",
        "class Late(WeightAveraging):\n"
        "    def __init__(self):\n"
        "        super().__init__(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))\n"
        "    def should_update(self, step_idx=None, epoch_idx=None):\n"
        "        return (step_idx is not None) and (step_idx >= 5)\n"
        "callback = Late()",
    ],
    "EMAWeightAveraging": [
        "callback = EMAWeightAveraging()",
        "callback = EMAWeightAveraging(device='cpu', decay=0.9, update_every_n_steps=2, update_starting_at_step=4)",
        "callback = EMAWeightAveraging(use_buffers=False, update_every_n_steps=0, update_starting_at_epoch=1)",
    ],
}


@pytest.mark.parametrize(
    ("name", "callback"), [(name, callback) for name, all_ in CONFIGURATIONS.items() for callback in all_]
)
def test_a_run_finishes_after_one_import_line_was_changed(
    name: str, callback: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for home in ("lightning.pytorch.callbacks", "lightning_merge.compat"):
        done: dict[str, Any] = {"__name__": "users_script"}
        exec(compile(script(f"{home} import {name}", callback), "users_script", "exec"), done)
        # Lightning adds an epoch of forward passes for BatchNorm.
        assert done["trainer"].current_epoch == 6 + (home.startswith("lightning.") and name.startswith("Stochastic"))
    assert done["callback"].updates > 0
    assert (tmp_path / "lightning_logs" / "version_1" / "checkpoints" / f"{done['callback'].name}-final.ckpt").is_file()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("StochasticWeightAveraging", {"swa_lrs": 0.01, "swa_epoch_start": 0.5, "device": "cpu"}),
        ("WeightAveraging", {"use_buffers": False}),
        ("EMAWeightAveraging", {"decay": 0.9}),
    ],
)
def test_a_configuration_finishes_after_its_class_path_was_changed(
    name: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    config = {
        "model": "lightning.pytorch.demos.boring_classes.BoringModel",
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 2,
            "limit_val_batches": 1,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": f"lightning_merge.compat.{name}", "init_args": arguments}],
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config=run.yaml"]) == 0


# ---- the numbers


def final(callback: Any, root: Path, norm: bool = False, epochs: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = tiny.Net(norm=norm)
    trainer = tiny.trainer(root, [callback], max_epochs=epochs)
    trainer.fit(module, tiny.batches(), tiny.validation())
    return tiny.values(module)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("WeightAveraging", {}),
        ("WeightAveraging", {"avg_fn": get_ema_avg_fn(0.8)}),
        ("EMAWeightAveraging", {"decay": 0.8}),
        ("EMAWeightAveraging", {"decay": 0.8, "update_every_n_steps": 3, "update_starting_at_step": 2}),
        ("EMAWeightAveraging", {"decay": 0.8, "use_buffers": False}),
    ],
)
@pytest.mark.parametrize("norm", [False, True])
def test_weights_after_the_fit_are_lightnings(name: str, arguments: dict[str, Any], norm: bool, tmp_path: Path) -> None:
    theirs = final(getattr(lightnings, name)(**arguments), tmp_path, norm)
    ours = final(getattr(compat, name)(**arguments), tmp_path, norm)
    for key, tensor in theirs.items():
        if "num_batches" not in key:  # an integer: Lightning averages it and rounds down
            assert torch.allclose(ours[key], tensor, rtol=1e-5, atol=1e-6), key


def test_an_average_of_every_step_does_not_start_before_the_first(tmp_path: Path) -> None:
    """Lightning's first update copies, so the weights before training are no part of the average."""
    finals = []
    for home in (lightnings, compat):

        class Always(home.EMAWeightAveraging):  # type: ignore[misc,name-defined]
            def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
                return step_idx is not None

        finals.append(final(Always(decay=0.5), tmp_path, epochs=1))
    for key, tensor in finals[0].items():
        assert torch.allclose(finals[1][key], tensor, rtol=1e-5, atol=1e-6), key


def test_stochastic_averaging_takes_lightnings_weights_in_and_those_of_the_last_epoch(tmp_path: Path) -> None:
    """At a constant rate the raw weights of both runs are the same: w is 4, 8, 12, 16, 20 after the epochs."""

    def w(callback: Any) -> float:
        module = tiny.Walk()
        tiny.trainer(tmp_path, [callback], max_epochs=5).fit(module, tiny.steps(4))
        return float(module.w.item())

    for start in (3, 0.6, 0.79):  # each is the third epoch
        arguments = {"swa_lrs": 1.0, "swa_epoch_start": start, "annealing_epochs": 0}
        assert w(lightnings.StochasticWeightAveraging(**arguments)) == (8 + 12 + 16) / 3
        assert w(compat.StochasticWeightAveraging(**arguments)) == (8 + 12 + 16 + 20) / 4


def test_stochastic_averaging_sets_the_rate_of_each_group(tmp_path: Path) -> None:
    class Groups(tiny.Net):  # type: ignore[misc]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=0.1)

    callback = compat.StochasticWeightAveraging([0.02, 0.03], swa_epoch_start=2, annealing_epochs=1)
    trainer = tiny.trainer(tmp_path, [callback], max_epochs=3)
    trainer.fit(Groups(), tiny.batches())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.02, 0.03]
    wrong = compat.StochasticWeightAveraging([0.02, 0.03, 0.04], swa_epoch_start=2)
    with pytest.raises(ValueError, match="one rate or one for each of 2 parameter groups"):
        tiny.trainer(tmp_path, [wrong], max_epochs=3).fit(Groups(), tiny.batches())


# ---- old files


@pytest.mark.parametrize("target", [compat.EMAWeightAveraging, EMA])
def test_a_file_of_lightnings_average_is_gone_on_with(target: Any, tmp_path: Path) -> None:
    """Resuming Lightning's file with our class ends as Lightning's own uninterrupted run does."""
    theirs = final(lightnings.EMAWeightAveraging(decay=0.8), tmp_path)
    module = tiny.Net()
    saved = lightnings.ModelCheckpoint(tmp_path / "old")
    torch.manual_seed(0)
    first = tiny.trainer(tmp_path, [lightnings.EMAWeightAveraging(decay=0.8), saved], max_epochs=2)
    first.fit(module, tiny.batches(), tiny.validation())
    average = target(decay=0.8)
    module = tiny.Net()
    second = tiny.trainer(tmp_path, [average], max_epochs=4)
    second.fit(module, tiny.batches(), tiny.validation(), ckpt_path=saved.best_model_path, weights_only=False)
    assert (average.steps, average.updates) == (16, 16)
    for key, tensor in theirs.items():
        assert torch.allclose(tiny.values(module)[key], tensor, rtol=1e-5, atol=1e-6), key


def test_a_file_of_lightnings_stochastic_averaging_is_gone_on_with(tmp_path: Path) -> None:
    saved = lightnings.ModelCheckpoint(tmp_path / "old")
    arguments = {"swa_lrs": 1.0, "swa_epoch_start": 1, "annealing_epochs": 0}
    first = tiny.trainer(tmp_path, [lightnings.StochasticWeightAveraging(**arguments), saved], max_epochs=3)
    first.fit(tiny.Walk(), tiny.steps(4))
    average = compat.StochasticWeightAveraging(**arguments)
    module = tiny.Walk()
    tiny.trainer(tmp_path, [average], max_epochs=4).fit(
        module, tiny.steps(4), ckpt_path=saved.best_model_path, weights_only=False
    )
    # Lightning took in 0, 4 and 8 (the starts of three epochs); what comes after the file is the end of the fourth.
    assert module.w.item() == (0 + 4 + 8 + 16) / 4
    assert average.raw_weights()["w"].item() == 16


def test_a_rule_that_keeps_more_than_an_average_starts_empty_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = lightnings.ModelCheckpoint(tmp_path / "old")
    first = tiny.trainer(tmp_path, [lightnings.EMAWeightAveraging(), saved], max_epochs=1)
    first.fit(tiny.Net(), tiny.batches(), tiny.validation())
    swad = SWAD(monitor="val/loss")
    second = tiny.trainer(tmp_path, [swad], max_epochs=2)
    with pytest.warns(UserWarning, match="starts empty: it cannot go on with the average"):
        second.fit(tiny.Net(), tiny.batches(), tiny.validation(), ckpt_path=saved.best_model_path, weights_only=False)
    assert SWA().updates == 0


def test_a_file_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    saved = lightnings.ModelCheckpoint(tmp_path / "old")
    first = tiny.trainer(tmp_path, [lightnings.EMAWeightAveraging(), saved], max_epochs=1)
    first.fit(tiny.Net(norm=True), tiny.batches(), tiny.validation())
    with pytest.raises(ValueError, match="another model"):
        tiny.trainer(tmp_path, [EMA()], max_epochs=2).fit(
            tiny.Net(), tiny.batches(), ckpt_path=saved.best_model_path, weights_only=False
        )


# ---- refused


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: compat.WeightAveraging(model=None), r"WeightAveraging takes no argument `model`"),
        (lambda: compat.EMAWeightAveraging(avg_fn=max), r"takes no argument `avg_fn`.*WeightAveraging"),
        (lambda: compat.EMAWeightAveraging(decay=1.5), r"`decay` must be in \[0, 1\), got 1.5"),
        (lambda: compat.EMAWeightAveraging(update_every_n_steps=-1), r"`update_every_n_steps` must be at least 0"),
        (lambda: compat.WeightAveraging(avg_fn=max, multi_avg_fn=max), "not both"),
        (lambda: compat.StochasticWeightAveraging(0.0), r"`swa_lrs` must be more than 0"),
        (lambda: compat.StochasticWeightAveraging(0.1, swa_epoch_start=0), r"`swa_epoch_start` must be at least 1"),
        (lambda: compat.StochasticWeightAveraging(0.1, swa_epoch_start=1.5), r"`swa_epoch_start` must be in \[0, 1\]"),
        (lambda: compat.StochasticWeightAveraging(0.1, annealing_epochs=-1), r"`annealing_epochs` must be at least 0"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(make: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        make()


def test_an_average_on_another_device_is_refused_at_fit_start(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [compat.EMAWeightAveraging(device="meta")], max_epochs=1)
    with pytest.raises(ValueError, match=r"`device` of EMAWeightAveraging must be None or the device of the model"):
        trainer.fit(tiny.Net(), tiny.batches())


def test_a_share_of_an_endless_run_is_refused_at_fit_start(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [compat.StochasticWeightAveraging(0.1)], max_epochs=-1, max_steps=3)
    with pytest.raises(ValueError, match=r"`swa_epoch_start=0.8` is a share of the run.*max_epochs"):
        trainer.fit(tiny.Net(), tiny.batches())


def test_importing_the_package_does_not_import_compat() -> None:
    code = "import sys, lightning_merge; assert not {'lightning', 'lightning_merge.compat'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
