"""OnlineMerging around an unchanged module, in a real Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import Net, NetParts, batches, differing, of, read, trainer, validation, values
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, OnlineMerging
from lightning_merge.optim import OnDARE, OnTIES
from lightning_merge.selections import Selection


class ScheduledParts(NetParts):
    """AdamW whose rate falls at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


Scheduled = of(ScheduledParts)


def pretrained() -> dict[str, Tensor]:
    """The model before an earlier fine-tuning, by its difference from ``Net``'s start."""
    return {name: tensor - 0.1 for name, tensor in values(Net()).items()}


def merging(method: Any = "ondare", **settings: Any) -> OnlineMerging:
    return OnlineMerging(method, pretrained(), **({"density": 0.5, "alpha": 0.02} | settings))


def fit(root: Path, *callbacks: Any, module: Any = None, ckpt_path: Path | None = None, **settings: Any) -> Any:
    module = Scheduled() if module is None else module
    run = trainer(root, callbacks, **({"max_epochs": 3} | settings))
    run.fit(module, batches(), validation(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("method", "optimizer"), [("ondare", OnDARE), ("onties", OnTIES)])
def test_a_fit_is_that_of_the_wrapped_optimizer_in_a_plain_loop(method: str, optimizer: Any, tmp_path: Path) -> None:
    module = fit(tmp_path, merging(method))
    plain = Scheduled()
    built = plain.configure_optimizers()
    wrapped = optimizer(built["optimizer"], plain, pretrained(), density=0.5, alpha=0.02)
    for _ in range(3):
        for batch in batches():
            wrapped.zero_grad()
            plain.loss(batch).backward()
            wrapped.step()
            built["lr_scheduler"]["scheduler"].step()
    assert not differing(module, plain)
    assert differing(module, fit(tmp_path))


def test_with_alpha_0_and_density_1_nothing_changes(tmp_path: Path) -> None:
    assert not differing(fit(tmp_path), fit(tmp_path, merging(alpha=0.0, density=1.0)))


@pytest.mark.parametrize("first", ["average", "merging"])
def test_averages_count_every_step_once_wherever_they_stand(first: str, tmp_path: Path) -> None:
    ema, online = EMA(decay=0.5), merging()
    fit(tmp_path, *([ema, online] if first == "average" else [online, ema]))
    assert ema.steps == ema.updates == 12


def test_schedule_clipping_and_accumulation_go_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    online = merging()
    monitor = LearningRateMonitor("step")
    fit(
        tmp_path,
        online,
        monitor,
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    (group,) = online.optimizers[0].param_groups
    assert group["merge_step"] == 6
    assert group["lr"] == pytest.approx(0.05 * 0.9**6)
    assert list(monitor.lrs) == ["lr-OnDARE"]
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


@pytest.mark.parametrize("method", ["ondare", "onties"])
@pytest.mark.parametrize("from_file", [False, True])
def test_resumed_run_equals_uninterrupted_run(method: str, from_file: bool, tmp_path: Path) -> None:
    reference: Any = None
    if from_file:
        reference = str(tmp_path / "reference.ckpt")
        torch.save({"state_dict": values(Net())}, reference)
    settings: dict[str, Any] = {"reference": reference, "merge_every": 3}
    through = fit(tmp_path / "through", merging(method, **settings))
    saved = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path / "begun", merging(method, **settings), saved, max_epochs=1)
    # The module goes on from weights that are not the reference.
    resumed = fit(tmp_path / "resumed", merging(method, **settings), ckpt_path=tmp_path / "last.ckpt")
    assert not differing(through, resumed)
    assert ("lightning_merge.online" in read(tmp_path / "last.ckpt")) != from_file


def test_a_file_loads_and_resumes_without_the_callback(tmp_path: Path) -> None:
    fit(tmp_path, merging(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1)
    Net().load_state_dict(read(tmp_path / "last.ckpt")["state_dict"])
    fit(tmp_path, ckpt_path=tmp_path / "last.ckpt")


class LoRAParts(NetParts):
    """Trains a low-rank correction of a frozen layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.full((1, 4), 0.3))
        self.lora_b = nn.Parameter(torch.full((1, 1), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + x @ self.lora_a.T @ self.lora_b

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.lora_a, self.lora_b], lr=0.1)


def test_adapters_are_their_own_difference(tmp_path: Path) -> None:
    online = OnlineMerging("ondare", "zero", alpha=0.1)
    fit(tmp_path, online, module=of(LoRAParts)())
    assert {name: kept.values.tolist() for name, kept in online.optimizers[0].tau.items()} == {
        "lora_a": pytest.approx([0.3] * 4),
        "lora_b": pytest.approx([0.2]),
    }


def test_the_selection_says_what_is_merged(tmp_path: Path) -> None:
    online = merging(selection=Selection(exclude=("net.2.*",)))
    fit(tmp_path, online)
    assert list(online.optimizers[0].tau) == ["net.0.weight", "net.0.bias"]


class ManualParts(NetParts):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_merges_too(tmp_path: Path) -> None:
    online = merging()
    fit(tmp_path, online, module=of(ManualParts)())
    assert online.optimizers[0].param_groups[0]["merge_step"] == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dare"}, "`method` must be one of 'ondare', 'onties', got 'dare'"),
        ({"pretrained": None}, "`pretrained` must be the model that the reference was fine-tuned from"),
        ({"density": 2.0}, r"`density` must be in \(0, 1\], got 2.0"),
        ({"alpha": -1.0}, r"`alpha` must be in \[0, 1\], got -1.0"),
        ({"method": "onties", "tau_every": 5}, "`tau_every` must be 1 for 'onties'.*got 5"),
        ({"tau_dtype": "int8"}, "`tau_dtype` must be 'float32' or 'bfloat16', got 'int8'"),
    ],
)
def test_bad_input_is_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineMerging(**({"pretrained": "zero"} | settings))


def test_a_pretrained_model_without_difference_is_refused_at_fit_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is 0 everywhere, so merging would do nothing"):
        fit(tmp_path, OnlineMerging(pretrained=values(Net())))
