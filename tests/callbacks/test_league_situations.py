"""A league on other people's modules and in odd runs: what is measured, saved and held are the same weights."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from test_identity import MODULES, Awkward, FrozenBackbone
from tiny import differing, read, trainer
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD, BestK, Doctor, League, PostHocEMA


def validation() -> Any:
    return tiny.batches(2, size=8, seed=2)


def contestants(**settings: Any) -> list[Any]:
    settings = {"validate": "raw"} | settings
    return [EMA(decay=0.6, **settings), SWA(start_epoch=0, **settings), LAWA(k=2, **settings)]


class WithNorm(Awkward):
    """BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4))


class Unfreezing(FrozenBackbone):
    """Its first layer trains from the second epoch on, with a rate of its own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)


class Freezing(WithNorm):
    """Its first layers stop to train after the first epoch, statistics included."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch > 0:
            self.net[:2].requires_grad_(False).eval()


class Tied(Awkward):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].weight = self.net[0].weight


class Compiled(WithNorm):
    """A compiled part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


class Lazy(Awkward):
    """A layer whose size the first batch tells."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 4))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net(torch.zeros(1, 4))
        return super().configure_optimizers()


class OwnAverage(WithNorm):
    """Keeps an average of its own, by which it validates."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch: list[Tensor]) -> Tensor:
        network = self.net if self.training else self.slow
        return nn.functional.mse_loss(network(batch[0]).sum(1, keepdim=True), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.slow.state_dict().values(), self.net.state_dict().values(), strict=True):
                slow.lerp_(fast, 0.5) if slow.is_floating_point() else slow.copy_(fast)


class Adversarial(WithNorm):
    """Two networks and two optimizers, of which the second steps every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.automatic_optimization = False

    def loss(self, batch: list[Tensor]) -> Tensor:
        penalty: Tensor = self.other(batch[0]).square().mean()
        return super().loss(batch) + penalty

    def calibration_step(self, batch: list[Tensor]) -> None:
        self.loss(batch)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        first, second = optimizers
        loss = self.loss(batch)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if batch_idx % 3 == 1:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.05) for each in (self.net, self.other)]


class Rarely(WithNorm):
    """Steps with every third batch only, of four; BatchNorm sees each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        if batch_idx == 1:
            self.optimizers().step()  # type: ignore[union-attr]

    def calibration_step(self, batch: list[Tensor]) -> None:
        self.loss(batch)


class TwoLoaders(WithNorm):
    """Validates on two sets of data."""

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.loss(batch) * (1 + dataloader_idx), batch_size=len(batch[0]))


class EveryStep(WithNorm):
    """Logs per step and per epoch, and another metric as an object."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), on_step=True, on_epoch=True)


class Case(NamedTuple):
    """A module, and what is otherwise than usual about its run."""

    module: Callable[[], Any]
    monitor: str = "val/loss"
    contestants: Callable[[], list[Any]] = contestants
    beside: Callable[[Path], list[Any]] = lambda root: []
    settings: Mapping[str, Any] = MappingProxyType({})
    loaders: int = 1


def every_kind() -> list[Any]:
    how: dict[str, Any] = {"validate": "raw"}
    return [
        SWAD("val/loss", n_converge=1, n_tolerance=2, stop=False, **how),
        PostHocEMA(every=2, **how),
        BestK("val/loss", 2, **how),
        LAWA(k=2, every_n_steps=2, store="cpu", **how),
        EMA(half_life="20%", compensated=True, **how),
    ]


CASES: dict[str, Case] = {
    **{kind.__name__: Case(kind) for kind in (*MODULES, FrozenBackbone)},
    "BatchNorm": Case(WithNorm),
    "unfreezing": Case(Unfreezing),
    "freezing": Case(Freezing),
    "tied": Case(Tied),
    "compiled": Case(Compiled),
    "lazy": Case(Lazy),
    "an average of its own": Case(OwnAverage),
    "two optimizers": Case(Adversarial),
    "two optimizers, the second": Case(Adversarial, contestants=lambda: contestants(optimizer=1)),
    "rare steps": Case(Rarely),
    "rare steps, validated in between": Case(Rarely, settings={"val_check_interval": 3, "max_epochs": 2}),
    "two loaders": Case(TwoLoaders, "val/loss/dataloader_idx_1", loaders=2),
    "steps and epochs": Case(EveryStep, "val/loss_epoch"),
    "every kind": Case(WithNorm, contestants=every_kind),
    "merged at every validation": Case(WithNorm, contestants=lambda: contestants(validate="merged")),
    "both": Case(WithNorm, contestants=lambda: contestants(validate="both")),
    "beside an average before it": Case(WithNorm, beside=lambda root: [EMA(0.9, name="other", validate="both")]),
    "beside a doctor": Case(WithNorm, beside=lambda root: [Doctor(points=1)]),
    "accumulated gradients": Case(WithNorm, settings={"accumulate_grad_batches": 3}),
    "validated amid accumulation": Case(WithNorm, settings={"accumulate_grad_batches": 3, "val_check_interval": 2}),
    "the end amid an epoch": Case(WithNorm, settings={"max_steps": 6}),
    "never validated": Case(WithNorm, settings={"check_val_every_n_epoch": 9}),
    "half precision": Case(WithNorm, settings={"precision": "bf16-true"}),
    "stopped early": Case(
        WithNorm,
        beside=lambda root: [EarlyStopping("val/loss", patience=1, min_delta=10.0)],
        settings={"max_epochs": 9},
    ),
    "a file by a key of a contestant": Case(
        WithNorm,
        contestants=lambda: contestants(validate="both"),
        beside=lambda root: [ModelCheckpoint(root / "own", monitor="lawa/val/loss")],
    ),
    "a search for the rate": Case(
        WithNorm,
        beside=lambda root: [LearningRateFinder(num_training_steps=2, early_stop_threshold=None, update_attr=False)],
    ),
    "beside averages on both sides": Case(
        WithNorm, beside=lambda root: [SWA(start_epoch=0, name="before", validate="raw"), EMA(0.9, name="other")]
    ),
}


def run(case: Case, root: Path, league: League | None) -> tuple[Any, Any]:
    module = case.module()
    callbacks = [] if league is None else [*(beside := case.beside(root))[:1], league, *beside[1:]]
    saved = ModelCheckpoint(root, filename="last")
    fit = trainer(root, [*callbacks, saved], **{"max_epochs": 3, **case.settings})
    loaders = [validation() for _ in range(case.loaders)]
    fit.fit(module, tiny.batches(4), loaders if case.loaders > 1 else loaders[0])
    return module, fit


def score(case: Case, weights: dict[str, Tensor]) -> float:
    """The metric of a fresh module with these weights, in which they fit without a word."""
    fresh = case.module()
    fresh.load_state_dict(weights, strict=True)
    precision = case.settings.get("precision", "32-true")
    loaders = [validation() for _ in range(case.loaders)]
    run = pl.Trainer(
        precision=precision, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    found = run.validate(fresh, loaders if case.loaders > 1 else loaders[0], verbose=False)
    return float(next(each[case.monitor] for each in found if case.monitor in each))


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_measured_saved_and_held_are_the_same_weights(name: str, mode: Any, tmp_path: Path) -> None:
    case = CASES[name]
    league = League(case.contestants(), case.monitor, mode)
    module, fit = run(case, tmp_path, league)

    scores = {each: standing.score for each, standing in league.standings.items()}
    in_it = [each.name for each in fit.callbacks if hasattr(each, "merged_weights")]
    assert list(scores) == ["raw", *in_it]
    assert set(in_it) >= {each.name for each in league.contestants}
    assert all(value == value for value in scores.values()), scores
    best = {"min": min, "max": max}[mode](scores.values())
    assert scores[str(league.winner)] == best

    file = read(str(league.path))
    assert file["lightning_merge"]["holds"] == league.winner
    assert file["lightning_merge"]["measured"]
    assert score(case, file["state_dict"]) == pytest.approx(best, rel=1e-5)
    for each in league.contestants:
        saved = read(str(each.final_path))
        assert score(case, saved["state_dict"]) == pytest.approx(scores[each.name], rel=1e-5), each.name
    primary = next(each for each in fit.callbacks if hasattr(each, "merged_weights"))
    assert differing(module.state_dict(), read(str(primary.final_path))["state_dict"]) == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "stopped" not in name])
def test_training_is_that_of_a_run_without_a_league(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    league = League(case.contestants(), case.monitor, "min")
    torch.manual_seed(0)
    run(case, tmp_path / "with", league)
    torch.manual_seed(0)
    plain, _ = run(case, tmp_path / "without", None)
    expected = {key.replace("_orig_mod.", ""): tensor for key, tensor in plain.state_dict().items()}
    raw = league.contestants[0].raw_weights()
    shared = [key for key in raw if key in expected]
    assert shared or name == "OwnStateDict"
    assert differing({key: raw[key] for key in shared}, {key: expected[key] for key in shared}) == []
