"""A loader for each branch: each trains as if it were alone, whatever the lengths, and goes on where it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from tiny import Net, NetParts, batches, differing, of, trainer, validation
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lightning_merge.branches import Average, WeightedAverage
from lightning_merge.callbacks import Branching, RandomState
from lightning_merge.schedules import EveryNSteps


def own(count: int = 2, every: int = 2, **settings: Any) -> Branching:
    return Branching(Average(), EveryNSteps(every), count, batches="own", **settings)


def weights_of(callback: Branching) -> list[dict[str, Tensor]]:
    """The tensors of every branch after a fit."""
    there, raw = callback._running.branches, callback.raw_weights()
    return [{n: raw[n] for n in there.live} if j == there.active else there.weights(j) for j in there.own]


def streams(*lengths: int) -> list[DataLoader[Any]]:
    """Loaders of so many batches, of different data."""
    return [batches(n, size=3 + seed, seed=seed + 5) for seed, n in enumerate(lengths)]


def alone(module: Any, parts: list[list[Any]], every: int, shares: tuple[float, ...]) -> list[Any]:
    """Independent modules that take their part of each group, or nothing, and meet in a plain loop."""
    modules = [copy.deepcopy(module) for _ in shares]
    optimizers = [each.configure_optimizers() for each in modules]
    for number, group in enumerate(parts):
        for own, optimizer, batch in zip(modules, optimizers, group, strict=True):
            if batch is not None:
                optimizer.zero_grad()
                own.loss(batch).backward()
                optimizer.step()
        if (number + 1) % every == 0:
            for parameters in zip(*(each.parameters() for each in modules), strict=True):
                mean = sum(share * p.detach() for share, p in zip(shares, parameters, strict=True))
                for parameter in parameters:
                    parameter.data.copy_(mean)
    return modules


EPOCHS: dict[str, tuple[Any, list[tuple[int | None, int | None]]]] = {
    "equal": (lambda a, b: [a, b], [(0, 0), (1, 1), (2, 2)]),
    "dict": (lambda a, b: {"x": a, "y": b}, [(0, 0), (1, 1), (2, 2)]),
    "min_size": (lambda a, b: CombinedLoader([a, b], "min_size"), [(0, 0), (1, 1), (2, 2)]),
    "max_size_cycle": (
        lambda a, b: CombinedLoader((a, b), "max_size_cycle"),
        [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4)],
    ),
    "max_size": (
        lambda a, b: CombinedLoader({"x": a, "y": b}, "max_size"),
        [(0, 0), (1, 1), (2, 2), (None, 3), (None, 4)],
    ),
    "max_size, first longer": (
        lambda a, b: CombinedLoader([b, a], "max_size"),
        [(0, 0), (1, 1), (2, 2), (3, None), (4, None)],
    ),
}
"""How two loaders, the second one of five batches if lengths differ, are given, and which batches groups are of."""


@pytest.mark.parametrize("inactive", ["device", "cpu"])
@pytest.mark.parametrize("kind", EPOCHS)
def test_each_branch_trains_on_its_loader_as_if_alone(kind: str, inactive: Any, tmp_path: Path) -> None:
    given, numbers = EPOCHS[kind]
    short, long = streams(3, 3 if kind in ("equal", "dict") else 5)
    first, second = (long, short) if "first longer" in kind else (short, long)
    data = [list(first), list(second)]
    groups = [[None if n is None else part[n] for n, part in zip(row, data, strict=True)] for row in numbers]
    module = Net()
    expected = alone(module, groups * 2, every=2, shares=(0.25, 0.75))
    callback = Branching(WeightedAverage((1, 3)), EveryNSteps(2), 2, batches="own", inactive=inactive)
    run = trainer(tmp_path, [callback], max_epochs=2)
    run.fit(module, given(short, long), validation())
    assert run.global_step == callback.groups == 2 * len(numbers)
    assert callback.steps == 2 * sum(batch is not None for row in groups for batch in row)
    for replica, branch in zip(expected, weights_of(callback), strict=True):
        for name, parameter in replica.named_parameters():
            torch.testing.assert_close(branch[name], parameter.detach(), rtol=0, atol=1e-6)


# ---- it goes on where it was


@pytest.mark.parametrize("settings", [{"buffers": "average"}, {"optimizer_state": "average", "inactive": "cpu"}])
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_a_resumed_run_equals_the_uninterrupted_one_from_every_file(
    mode: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def fit(folder: str, ckpt_path: Path | None = None) -> tuple[Any, Branching]:
        torch.manual_seed(3)
        loaders = [stateful(each.dataset, 4, shuffle=True) for each in streams(2, 4)]
        checkpoint = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callback, module = own(**settings), of(NetParts)(norm=True)
        run = trainer(tmp_path, [callback, RandomState(), checkpoint], max_epochs=2)
        run.fit(module, CombinedLoader(loaders, mode), ckpt_path=ckpt_path, weights_only=False)
        return module, callback

    whole, first = fit("whole")
    files = sorted((tmp_path / "whole").glob("step=*.ckpt"))
    assert len(files) == first.groups >= 4
    for file in files:
        again, second = fit(file.stem, file)
        assert not differing(whole, again), file
        assert (first.steps, first.groups, first.merges) == (second.steps, second.groups, second.merges)
        for one, other in zip(weights_of(first), weights_of(second), strict=True):
            assert not differing(one, other)


class Told(RandomSampler):
    """A sampler that is told the epoch."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


def test_samplers_of_all_branches_are_told_the_epoch(tmp_path: Path) -> None:
    samplers = [Told(each.dataset) for each in streams(3, 3)]
    loaders = [DataLoader(each.data_source, 4, sampler=each) for each in samplers]
    trainer(tmp_path, [own()], max_epochs=3).fit(Net(), loaders)
    for each in samplers:
        assert list(dict.fromkeys(each.told)) == [0, 1, 2]


def test_a_mean_over_an_epoch_weighs_each_branch_by_its_own_samples(tmp_path: Path) -> None:
    class LoggedParts(NetParts):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.log("size", float(len(batch[0])), on_step=False, on_epoch=True)
            return self.loss(batch)

    loaders = [batches(2, size=2), batches(2, size=6)]
    run = trainer(tmp_path, [own()], max_epochs=1)
    run.fit(of(LoggedParts)(), loaders)
    assert run.callback_metrics["size"].item() == (2 * 2 + 6 * 6) / 8


def test_rates_that_a_module_moves_itself_move_once_per_group_also_where_the_first_branch_waits(tmp_path: Path) -> None:
    rates: list[float] = []

    class HalvingParts(NetParts):
        def __init__(self) -> None:
            super().__init__(lr=0.8)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    callback = own()
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.fit(of(HalvingParts)(), CombinedLoader(streams(2, 4), "max_size"))
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2, 0.1]
    assert run.global_step == callback.groups == 4


# ---- what is refused


class TogetherParts(NetParts):
    """A module that puts the parts together before it moves them."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [torch.cat(parts) for parts in zip(*batch, strict=True)] + [None]


def combined(mode: Any) -> CombinedLoader:
    return CombinedLoader(streams(3, 5), mode)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one loader": (
        lambda: batches(3),
        TypeError,
        r"a list or a dict of 2 loaders, one for each branch.*got DataLoader",
    ),
    "one in a combination": (lambda: CombinedLoader(batches(3)), TypeError, "one for each branch.*got CombinedLoader"),
    "too few": (lambda: streams(3), ValueError, "of 2 loaders, one for each branch.*got 1 of DataLoader"),
    "too many": (lambda: dict(zip("abc", streams(3, 3, 3), strict=True)), ValueError, "of 2 loaders.*got 3"),
    "none": (lambda: [], ValueError, "of 2 loaders.*got 0 of nothing"),
    "nested": (lambda: [batches(3), streams(3, 3)], ValueError, "of 2 loaders.*got 2 of DataLoader, list"),
    "no policy": (lambda: streams(3, 5), ValueError, "have 3, 5 batches. Say what an epoch is.*'min_size'.*'max_size'"),
    "no policy, unknown": (
        lambda: [batches(3), iter([])],
        ValueError,
        "have 3, an unknown number of batches. Say what",
    ),
}


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_loaders_that_do_not_fit_the_branches_are_refused_at_fit_start(
    case: str, as_module: bool, tmp_path: Path
) -> None:
    given, error, message = REFUSED[case]
    data = given()
    if as_module:
        data = LightningDataModule()
        data.train_dataloader = given  # type: ignore[method-assign]
    run = trainer(tmp_path, [own()], max_epochs=1)
    with pytest.raises(error, match=message):
        run.fit(Net(), data)
    assert run.global_step == 0
    assert "dataloader" not in vars(run.fit_loop._data_source)


@pytest.mark.parametrize(
    "settings", [{"accumulate_grad_batches": 2}, {"callbacks": [GradientAccumulationScheduler({1: 2})]}]
)
def test_a_branch_that_waits_does_not_accumulate(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"max_epochs": 1, **settings, "callbacks": [own(), *settings.get("callbacks", ())]}
    with pytest.raises(ValueError, match=r"mode 'max_size' would lose the gradients.*do not accumulate"):
        trainer(tmp_path, **settings).fit(Net(), combined("max_size"))
    trainer(tmp_path, **settings | {"callbacks": [own(), *settings["callbacks"][1:]]}).fit(Net(), combined("min_size"))


def test_parts_that_a_module_has_put_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"batches of 2 parts.*got list. Leave them apart in `on_before_batch_transfer`"
    ):
        trainer(tmp_path, [own()], max_epochs=1).fit(of(TogetherParts)(), streams(3, 3))
