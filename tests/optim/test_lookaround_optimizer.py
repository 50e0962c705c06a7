"""Lookaround as an optimizer: the published run, the callback's steps, and what an optimizer has to be."""

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.optim import Lookaround

CURVATURES = torch.tensor([(1, 2, 0.5), (0.5, 1, 2), (2, 0.5, 1)], dtype=torch.float64)
CENTRES = torch.tensor([(0, 0, 0), (1, 1, 1), (-1, 2, 0)], dtype=torch.float64)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def two_groups(net: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}], lr=0.01)


BASES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda net: torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-3, nesterov=True),
    "two groups": two_groups,
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters(), 0.1),
}


def batch(number: int) -> list[Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return [x, x.sum(1, keepdim=True).sin()]


def train(net: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for number in range(first, last):
        optimizer.zero_grad()
        x, y = batch(number)
        (net(x) - y).square().mean().backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("closure", [False, True])
def test_quadratics_follow_the_published_run(closure: bool) -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = Lookaround(torch.optim.SGD([w], lr=0.1, momentum=0.9), branches=3, every_n_steps=2)
    losses = []
    for s in range(12):
        assert optimizer.branch == s % 3

        def loss(branch: int = s % 3) -> Tensor:
            optimizer.zero_grad()
            value = 0.5 * (CURVATURES[branch] * (w - CENTRES[branch]).square()).sum()
            value.backward()
            losses.append(value.item())
            return value

        if closure:
            assert optimizer.step(loss).item() == losses[-1]
        else:
            loss()
            optimizer.step()
    expected = [6.75, 8.5, 12.5, 4.995625, 6.205, 9.815]
    expected += [2.7476487847, 3.8881340278, 7.3630559028, 1.0214221914, 1.2534569444, 3.3243048715]
    assert losses == pytest.approx(expected, abs=1e-10)
    assert w.tolist() == pytest.approx([-0.2052222222, 0.2374583333, 0.8936395833], abs=1e-10)
    assert optimizer.merges == 2


@pytest.mark.parametrize("base", BASES)
def test_it_takes_the_steps_of_the_callback(base: str, tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from lightning_merge.callbacks import Lookaround as LookaroundCallback

    class Module(pl.LightningModule):
        """The same network under a Trainer."""

        def __init__(self, wrapped: bool) -> None:
            super().__init__()
            self.net = model()
            self.wrapped = wrapped

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = BASES[base](self.net)
            return Lookaround(optimizer, 3, 2) if self.wrapped else optimizer

    def fit(module: Module, *callbacks: Any) -> nn.Module:
        run = pl.Trainer(
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            max_epochs=1,
            accelerator="cpu",
            precision="64-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        run.fit(module, DataLoader([batch(number) for number in range(18)], batch_size=None))
        return module.net

    by_hand = model()
    train(by_hand, Lookaround(BASES[base](by_hand), 3, 2), 0, 18)
    in_trainer = fit(Module(wrapped=True))
    by_callback = fit(Module(wrapped=False), LookaroundCallback(3, 2, batches="turns"))
    for a, b, c in zip(by_hand.parameters(), in_trainer.parameters(), by_callback.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_one_branch_is_the_wrapped_optimizer_bit_for_bit(base: str) -> None:
    plain, branched = model(), model()
    train(plain, BASES[base](plain), 0, 6)
    train(branched, Lookaround(BASES[base](branched), 1, 2), 0, 6)
    assert same(plain, branched)


@pytest.mark.parametrize("inactive", ["device", "cpu"])
@pytest.mark.parametrize("base", BASES)
def test_a_state_goes_on_bit_for_bit_from_every_step(base: str, inactive: Any) -> None:
    whole = model()
    train(whole, Lookaround(BASES[base](whole), 3, 2, inactive=inactive), 0, 15)
    for cut in range(15):
        net = model()
        optimizer = Lookaround(BASES[base](net), 3, 2, inactive=inactive)
        train(net, optimizer, 0, cut)
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = model()
        resumed.load_state_dict(saved["net"])
        optimizer = Lookaround(BASES[base](resumed), 3, 2, inactive=inactive)
        optimizer.load_state_dict(saved["optimizer"])
        train(resumed, optimizer, cut, 15)
        assert same(whole, resumed), cut


def test_schedules_and_groups_are_those_of_the_wrapped_optimizer() -> None:
    net = model()
    optimizer = Lookaround(two_groups(net), 2, 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(net, optimizer, 0, 2)
    scheduler.step()
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.005, 0.01]
    assert optimizer.param_groups is optimizer.base.param_groups
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_no_turn(fused: bool) -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    # No momentum: torch leaves the buffer of a fused first step that is skipped uninitialised.
    optimizer = Lookaround(torch.optim.SGD([w], lr=0.5, fused=fused), 2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []
    for factor in (1.0, float("inf"), 1.0, 1.0):
        seen.append((optimizer.branch, w.item()))
        optimizer.zero_grad()
        scaler.scale((w * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert seen == [(0, 1.0), (1, 1.0), (1, 1.0), (0, 0.5)]
    assert optimizer.merges == 1


def test_the_mean_is_in_place_inside_averaged_also_after_an_error() -> None:
    w = nn.Parameter(torch.tensor(4.0))
    optimizer = Lookaround(torch.optim.SGD([w], lr=1.0), 2, 5)
    (w * 3).backward()
    optimizer.step()
    assert w.item() == 4.0
    seen = []

    def fail() -> None:
        with optimizer.averaged():
            seen.append(w.item())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (seen, w.item()) == ([2.5], 4.0)


def test_parameters_that_are_added_later_get_branches() -> None:
    net, more = model(), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Lookaround(torch.optim.SGD(net.parameters(), 0.1), 2, 2)
    optimizer.add_param_group({"params": [more], "lr": 1.0})
    seen = []
    for target in (1.0, 3.0) * 2:
        seen.append(more.item())
        optimizer.zero_grad()
        (more - target).square().sum().div(2).backward()
        optimizer.step()
    assert seen == [0.0, 0.0, 1.0, 3.0]
    assert more.item() == 2.0


def test_a_branch_that_diverged_is_left_out() -> None:
    w = nn.Parameter(torch.tensor(1.0))
    optimizer = Lookaround(torch.optim.SGD([w], lr=1.0), 3, 1)

    def steps(*factors: float) -> None:
        for factor in factors:
            optimizer.zero_grad()
            (w * factor).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"branches \[1\] hold a NaN"):
        steps(1.0, math.nan, 3.0)
    assert w.item() == -1.0
    with pytest.raises(RuntimeError, match="all 3 branches hold a NaN or an infinity after 2 steps"):
        steps(math.nan, math.nan, math.nan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"branches": 0}, ValueError, "`branches` must be at least 1, got 0"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1, got 0"),
        ({"inactive": "disk"}, ValueError, "`inactive` must be 'device' or 'cpu', got 'disk'"),
        ({"base_optimizer": torch.optim.SGD}, TypeError, "`base_optimizer` must be a torch optimizer, got <class"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Lookaround(**{"base_optimizer": BASES["momentum"](model()), **arguments})


def test_a_state_of_another_number_of_branches_is_refused() -> None:
    net = model()
    state = copy.deepcopy(Lookaround(BASES["momentum"](net), 3, 2).state_dict())
    with pytest.raises(ValueError, match="the state is of 3 branches, and `branches` is 2"):
        Lookaround(BASES["momentum"](net), 2, 2).load_state_dict(state)
