"""A run that is killed goes on where its last file says, and ends as if nothing had happened."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripts
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_merge.callbacks import EMA, RandomState

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "resume.py"


def test_killed_runs_resume_to_the_bit_identical_end(tmp_path: Path) -> None:
    """Two points per method, of two of the three kinds; the whole sweep is the benchmark's own command."""
    options = ["--points", 2, "--seed", 1, "--part"]
    halves = [scripts.start(BENCHMARK, *options, f"{part}/2", folder=tmp_path, log=f"{part}.txt") for part in (1, 2)]
    for half in halves:
        code, printed = half.finish(600)
        assert code == 0, printed
        assert "resumed runs equal the uninterrupted one bit for bit" in printed


def test_a_truncated_file_is_named_together_with_a_good_one(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    tiny.trainer(tmp_path, [EMA(decay=0.5), files], max_epochs=1).fit(tiny.Net(), tiny.batches())
    good, cut = tmp_path / "step=2.ckpt", tmp_path / "step=4.ckpt"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="not a complete checkpoint") as error:
        tiny.trainer(tmp_path, [EMA(decay=0.5)], max_epochs=2).fit(tiny.Net(), tiny.batches(), ckpt_path=cut)
    assert str(cut) in str(error.value)
    assert str(good) in str(error.value)
    tiny.trainer(tmp_path, [EMA(decay=0.5)], max_epochs=2).fit(tiny.Net(), tiny.batches(), ckpt_path=good)


def test_random_state_comes_back_from_a_file(tmp_path: Path) -> None:
    callback = RandomState()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    callback.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


class Noisy(tiny.Net):  # type: ignore[misc]
    """Dropout, noise in training and validation, and hooks that draw numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[float] = []

    def on_train_start(self) -> None:
        torch.rand(3)

    def on_train_epoch_start(self) -> None:
        torch.rand(2)

    def on_train_epoch_end(self) -> None:
        torch.rand(1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.orders.append(batch[0].sum().item())
        return super().training_step([nn.functional.dropout(batch[0]), *batch[1:]], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        noise = random.random() + np.random.rand() + torch.rand(1).item()
        return super().validation_step([batch[0] + noise, *batch[1:]], batch_idx)


AT_TRAIN_END: dict[str, Any] = {}
AFTER_VALIDATION = {"save_on_train_epoch_end": False}
SITUATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], bool]] = {
    # options of ModelCheckpoint, of the Trainer and of the loader; whether there is validation
    "the default": (AT_TRAIN_END, {}, {}, True),
    "no validation": (AT_TRAIN_END, {}, {}, False),
    "after validation": (AFTER_VALIDATION, {}, {}, True),
    "a sanity check": (AT_TRAIN_END, {"num_sanity_val_steps": 1}, {}, True),
    "validation in every second epoch": (AT_TRAIN_END, {"check_val_every_n_epoch": 2}, {}, True),
    "accumulated gradients": (AT_TRAIN_END, {"accumulate_grad_batches": 2}, {}, True),
    "a loader that is made anew": (AT_TRAIN_END, {"reload_dataloaders_every_n_epochs": 1}, {}, True),
    "a loader that is made anew now and then": (AT_TRAIN_END, {"reload_dataloaders_every_n_epochs": 2}, {}, True),
    "a loader with a generator": (AT_TRAIN_END, {}, {"generator": True}, True),
    "a sampler with a generator": (AT_TRAIN_END, {}, {"sampler": True}, True),
    "a loader with a generator that remembers": (AT_TRAIN_END, {}, {"generator": True, "remembers": True}, True),
    "a loader that remembers": (AT_TRAIN_END, {}, {"remembers": True}, True),
    "a loader that remembers, after validation": (AFTER_VALIDATION, {}, {"remembers": True}, True),
}


@pytest.mark.parametrize("averages", [(), (EMA,)], ids=["plain", "EMA"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_from_any_epochs_end_a_run_with_random_numbers_is_the_uninterrupted_one(
    situation: str, averages: Any, tmp_path: Path
) -> None:
    files, options, loading, validates = SITUATIONS[situation]
    data = next(iter(tiny.batches(1, size=24)))

    def run(root: Path, path: Path | None = None) -> tuple[Any, list[float]]:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        loader: Any = DataLoader
        if loading.get("remembers"):
            loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        module = Noisy()
        saved = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1, **files)
        callbacks = [*(average(decay=0.9) for average in averages), RandomState(), saved]
        dataset, given = TensorDataset(*data), torch.Generator().manual_seed(5)
        order: dict[str, Any] = {"shuffle": True, "generator": given if loading.get("generator") else None}
        if loading.get("sampler"):
            order = {"sampler": RandomSampler(dataset, generator=given)}
        module.train_dataloader = lambda: loader(dataset, batch_size=8, **order)
        module.val_dataloader = lambda: tiny.validation() if validates else []
        fit = tiny.trainer(root, callbacks, max_epochs=4, **options)
        fit.fit(module, ckpt_path=path, weights_only=False)
        return module, module.orders

    whole, order = run(tmp_path / "whole")
    written = sorted((tmp_path / "whole").glob("epoch=*.ckpt"))[:-1]
    assert written
    for path in written:
        again, order_again = run(tmp_path / path.stem, path)
        assert order_again == order[-len(order_again) :]
        assert tiny.differing(tiny.values(whole), tiny.values(again)) == []


def test_a_fit_leaves_the_loops_as_they_were_and_a_state_that_no_fit_used_is_forgotten(tmp_path: Path) -> None:
    random_state, module = RandomState(), tiny.Net()
    run = tiny.trainer(tmp_path, [random_state, ModelCheckpoint(tmp_path)], max_epochs=1)
    run.fit(module, tiny.batches(), tiny.validation())
    assert "on_advance_start" not in vars(run.fit_loop)
    assert "on_run_start" not in vars(run.fit_loop.epoch_loop)
    random_state.load_state_dict(random_state.state_dict())
    random_state.setup(run, module, "fit")
    random_state.on_exception(run, module, KeyboardInterrupt())
    torch.manual_seed(0)
    random_state.on_train_start(run, module)
    assert torch.initial_seed() == 0
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state())
