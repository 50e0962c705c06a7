"""Data that ``soup`` by a gradient takes: as the run's own steps would get them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge._commands._task_scores import _loaders

IMAGES = torch.arange(12.0).view(6, 2)


class Model(pl.LightningModule):
    """Builds itself late, and scales inputs in a hook."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Linear(2, 2)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [(dataloader_idx + 1) * 100 * batch[0]]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.net(batch[0]).sum())


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES), batch_size=3)


class Bench:
    """What ``_runs.Bench`` is, without a file."""

    def __init__(self, loaders: Any) -> None:
        self.model, self.loaders = Model(), loaders
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        self.trainer = pl.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)

    def set_up(self) -> None:
        self.trainer.validate(self.model, self.loaders, verbose=False)

    def validation_loader(self) -> Any:
        return self.loaders


@pytest.mark.parametrize(
    ("loaders", "count"),
    [
        (loader, 1),
        (lambda: [loader(), loader()], 2),
        (lambda: {"a": loader(), "b": loader()}, 2),
        (lambda: pl.utilities.CombinedLoader([loader(), loader()], "sequential"), 2),
    ],
    ids=["one", "list", "dict", "combined"],
)
def test_batches_are_those_of_the_steps(loaders: Any, count: int) -> None:
    found = _loaders(Bench(loaders()), labelled=False, seed=0)
    assert len(found) == count
    for number, batches in enumerate(found):
        torch.testing.assert_close(torch.cat([batch[0] for batch in batches]), (number + 1) * 100 * IMAGES)


CONFIG = """\
trainer: {accelerator: cpu, limit_val_batches: 1}
model: {class_path: test_task_data.Late}
data: {class_path: lightning_merge.recipes.Digits}
"""


class Late(pl.LightningModule):
    """Has no layers before the Trainer asks for them."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


SEARCHED = ["--budget", 4, "--base", "base.pt", "--rule"]


@pytest.mark.parametrize("how", [[*SEARCHED, "adamerging"], [*SEARCHED, "evolutionary"], ["--align"]], ids=str)
def test_a_model_that_builds_itself_late_is_built(
    how: list[Any], run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    for file in ("base.pt", "a.pt", "b.pt"):
        model = Late()
        model.configure_model()
        torch.save({"state_dict": model.state_dict()}, file)
    code, _, err = run("soup", "a.pt", "b.pt", "--config", "config.yaml", *how, "--out", "m.pt")
    assert code == 0, err
