"""Two gloo processes under DDP merge what one process does."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny import differing, trainer, values
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_merge.callbacks import Anchor, ContinualMerging
from lightning_merge.recipes import Classifier

pytestmark = pytest.mark.multiprocess


class Shares(pl.LightningDataModule):
    """Batches of 8 in one process, of 4 in each of two: together the same samples per step."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(32, 4, generator=generator, dtype=torch.float64)
        self.data = TensorDataset(inputs, torch.arange(32) % 3)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        assert self.trainer is not None
        world = self.trainer.world_size
        sampler = DistributedSampler(self.data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(self.data, batch_size=8 // world, sampler=sampler)


def stream(root: Path, preset: str, world: int) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(0)
    module = Classifier(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
        3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
    ).double()
    cl = ContinualMerging(preset, root / "bank")
    for seed in range(2):
        torch.manual_seed(seed)  # adapters start from random numbers
        settings: dict[str, Any] = {"use_distributed_sampler": False}
        if world > 1:
            settings["strategy"] = DDPStrategy(start_method="fork", process_group_backend="gloo")
        file = ModelCheckpoint(root, f"{seed}")
        fit = trainer(root, [cl, Anchor(0.5, file=root / "anchor.pt"), file], max_epochs=2, devices=world, **settings)
        fit.fit(module, datamodule=Shares(seed))
    return values(module), cl


@pytest.mark.parametrize("preset", ["magmax", "dare", "ema", "lora-arithmetic"])
def test_two_processes_merge_what_one_does(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # If an earlier test has seeded everything, Lightning seeds the processes it starts again, and not a single one.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    two, cl_two = stream(tmp_path / "two", preset, world=2)
    one, cl_one = stream(tmp_path / "one", preset, world=1)
    assert cl_two.tasks == cl_one.tasks == ["task0", "task1"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-12, rtol=1e-9)
    for name, tensor in cl_one.merged_vector().items():
        torch.testing.assert_close(cl_two.merged_vector()[name], tensor, atol=1e-6, rtol=0)  # LoRA's are float32
    assert not differing(torch.load(tmp_path / "two" / "1.ckpt", weights_only=True)["state_dict"], two)
