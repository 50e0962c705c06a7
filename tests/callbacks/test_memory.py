"""What updating and exchanging weights allocates, by counting bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import batches, trainer, validation
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD, WeightMerging


class Wide(pl.LightningModule):
    """Tensors of several sizes, the largest 256 kB; small buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 256), nn.BatchNorm1d(256), nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 1)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


LARGEST = 256 * 256 * 4


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most memory that was allocated at one time beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    live = peak = 0
    for event in watched.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_the_counter_sees_allocations() -> None:
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) in range(8000, 16000)


def fitted(average: WeightMerging, root: Path, measure: Callable[[], int], **settings: Any) -> list[int]:
    """What ``measure`` gives at the end of each of three batches."""
    found = []

    class Probe(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if average.updates:
                found.append(measure())

    run = trainer(root, [average, Probe()], max_epochs=2, limit_train_batches=3, **settings)
    run.fit(Wide(), batches(3))
    assert found
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_update_allocates_at_most_one_tensor(precision: Any, tmp_path: Path) -> None:
    ema = EMA(decay=0.9)
    peaks = fitted(
        ema,
        tmp_path,
        lambda: peak_bytes(lambda: ema._publisher._after_step(ema._module.optimizers().optimizer, (), {})),
        precision=precision,
    )
    assert max(peaks) <= LARGEST * 1.05


def test_exchanging_weights_allocates_only_the_buffers(tmp_path: Path) -> None:
    ema = EMA(decay=0.9)

    def swap() -> None:
        with ema._publisher.swapped(ema):
            pass

    assert max(fitted(ema, tmp_path, lambda: peak_bytes(swap))) <= LARGEST / 10


@pytest.mark.parametrize("average", [lambda: EMA(decay=0.9), lambda: SWA(start_epoch=1)], ids=["ema", "swa"])
def test_an_average_takes_one_float32_copy(average: Callable[[], WeightMerging], tmp_path: Path) -> None:
    callback = average()
    numbers = sum(p.numel() for p in Wide().parameters())
    fitted(callback, tmp_path, lambda: 0)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in callback.merged_weights().values()}
    assert sum(held.values()) <= numbers * 4 * 1.05
    assert all(t.dtype == torch.float32 for t in callback.merged_weights().values() if t.is_floating_point())


def held_copies(average: WeightMerging) -> float:
    """Float32 copies of the parameters that its state keeps alive."""
    tensors = [leaf for leaf in tree_leaves(average._state) if isinstance(leaf, torch.Tensor)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values()) / sum(4 * p.numel() for p in Wide().parameters())


@pytest.mark.parametrize("store", ["device", "cpu"])
def test_lawa_holds_k_copies(store: Any, tmp_path: Path) -> None:
    lawa = LAWA(k=2, every_n_steps=1, store=store)
    assert max(fitted(lawa, tmp_path, lambda: held_copies(lawa))) == pytest.approx(2)


def test_lawa_on_disk_holds_none(tmp_path: Path) -> None:
    lawa = LAWA(k=2, every_n_steps=1, store="disk", directory=str(tmp_path / "window"))
    assert max(fitted(lawa, tmp_path, lambda: held_copies(lawa))) == 0


def test_swad_holds_at_most_eight_copies_at_defaults(tmp_path: Path) -> None:
    swad = SWAD("val/loss", stop=False)
    held: list[float] = []

    class Probe(pl.Callback):
        def on_validation_end(self, *args: Any) -> None:
            held.append(held_copies(swad))

    run = trainer(tmp_path, [swad, Probe()], max_epochs=14, limit_train_batches=3, val_check_interval=1)
    run.fit(Wide(), batches(3), validation())
    assert len(held) >= 42
    assert 6 < max(held) <= 8.001


def test_batches_kept_for_batch_statistics_stay_under_their_limit() -> None:
    from lightning_merge.callbacks._lightning._recent_batches import RecentBatches

    recent = RecentBatches(batches=4, bytes=1000)
    for size in (10, 20, 100, 100, 500):
        recent.hold([torch.zeros(size), {"label": torch.zeros(1)}])
        recent.keep()
    assert [batch[0].numel() for batch in recent.batches] == [500]
    for size in (10, 20, 30, 40, 50):
        recent.hold([torch.zeros(size)])
        recent.keep()
    assert [batch[0].numel() for batch in recent.batches] == [20, 30, 40, 50]
    resumed = RecentBatches(recent.batches, batches=4, bytes=4 * 120)
    resumed.hold([torch.zeros(30)])
    resumed.keep()
    assert [batch[0].numel() for batch in resumed.batches] == [40, 50, 30]
    assert RecentBatches().bytes <= 256 * 2**20
