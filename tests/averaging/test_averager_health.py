"""What ``Averager.health`` says is what the callbacks log on the same steps, and what the weights are."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NetParts, batches, differing
from torch import Tensor, nn

from lightning_merge import Averager
from lightning_merge.rules import BiasCorrectedMean, ExponentialMean, Interpolation, Mean, Rule, WindowMean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection

RULES: list[Rule] = [ExponentialMean(0.9), BiasCorrectedMean(), Mean(), WindowMean(3), Interpolation(0.5)]


class Net(NetParts, nn.Module):
    """The network without a Trainer."""


def made(rule: Rule = ExponentialMean(0.5), **options: Any) -> tuple[Any, torch.optim.Optimizer, Averager]:  # noqa: B008
    module = Net(norm=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return module, optimizer, Averager(module, optimizer, rule, **options)


def train(module: Any, optimizer: torch.optim.Optimizer, said: Callable[[], Any] = int) -> list[Any]:
    found = []
    module.train()
    for batch in batches():
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
        found.append(said())
    return found


def distance(averager: Averager) -> float:
    """By hand, in double precision, of parameters alone."""
    merged, raw = averager.merged_weights() or {}, averager.raw_weights()
    names = [name for name in raw if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    return float(sum((merged[name].double() - raw[name].double()).square().sum() for name in names)) ** 0.5


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_it_says_what_the_callback_logs(rule: Rule, tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    from lightning_merge.callbacks import WeightMerging

    kept: list[dict[str, float]] = []

    class Kept(loggers.CSVLogger):  # type: ignore[misc, name-defined]
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            kept.append({key: float(value) for key, value in metrics.items() if key.startswith("merged/")})

    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: dict[str, Any] = {**quiet, "max_epochs": 1, "log_every_n_steps": 1, "accelerator": "cpu"}
    callback = WeightMerging(rule, EveryNSteps(2))
    run = pl.Trainer(callbacks=[callback], logger=Kept(str(tmp_path)), default_root_dir=tmp_path, **settings)
    run.fit(type("Net", (NetParts, pl.LightningModule), {})(norm=True), batches())
    module, optimizer, averager = made(rule, schedule=EveryNSteps(2))
    said = train(module, optimizer, averager.health)
    assert len([each for each in said if each]) > 1
    assert said == [{}, *[each for each in kept if each]]


def test_the_numbers_are_those_of_the_weights() -> None:
    module, optimizer, averager = made()
    assert averager.health() == {}
    found = train(module, optimizer, lambda: (averager.health("ema"), distance(averager)))
    for index, (health, by_hand) in enumerate(found, start=1):
        assert list(health) == ["ema/updates", "ema/start_share", "ema/decay", "ema/distance"]
        assert health["ema/distance"] == pytest.approx(by_hand, rel=1e-5)
        assert (health["ema/updates"], health["ema/decay"]) == (index, 0.5)
        assert health["ema/start_share"] == 0.5**index


SITUATIONS: dict[str, Callable[[Averager, Any], Any]] = {
    "in the block": lambda averager, module: averager.merged(),
    "in evaluation": lambda averager, module: module.eval() and nullcontext(),
    "without gradients": lambda averager, module: torch.no_grad(),
    "in inference mode": lambda averager, module: torch.inference_mode(),
    "frozen since": lambda averager, module: module.requires_grad_(False) and nullcontext(),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_it_is_the_same_wherever_it_is_asked_and_training_goes_on(name: str) -> None:
    module, optimizer, averager = made()
    train(module, optimizer)
    before, raw = averager.health(), {n: t.clone() for n, t in averager.raw_weights().items()}
    with SITUATIONS[name](averager, module):
        assert averager.health() == before
    assert before["merged/distance"] > 0
    assert differing(raw, averager.raw_weights()) == []
    module.requires_grad_(True)
    train(module, optimizer)
    assert averager.health()["merged/updates"] == 2 * before["merged/updates"]


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"selection": Selection(("net.0.*",))}], ids=str)
def test_a_part_is_measured_as_a_part(options: dict[str, Any]) -> None:
    module, optimizer, averager = made(**options)
    train(module, optimizer)
    assert averager.health()["merged/distance"] == pytest.approx(distance(averager), rel=1e-5)


def test_a_step_that_leaves_a_nan_is_seen_in_the_counts() -> None:
    module, optimizer, averager = made()
    train(module, optimizer)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.warns(UserWarning, match="holds a NaN"):
        optimizer.step()
    health = averager.health()
    assert health["merged/updates"] == averager.updates == 4
    assert health["merged/distance"] != health["merged/distance"]  # the raw weights are no numbers


def test_a_resumed_average_stands_as_it_did() -> None:
    module, optimizer, averager = made()
    train(module, optimizer)
    again, _, resumed = made()
    again.load_state_dict(module.state_dict())
    resumed.load_state_dict(averager.state_dict())
    assert resumed.health() == averager.health()


def test_a_name_that_cannot_be_part_of_a_key_is_refused() -> None:
    _, _, averager = made()
    for wrong, error in (("raw", ValueError), ("a/b", ValueError), (3, TypeError)):
        with pytest.raises(error, match="`name` must be a word"):
            averager.health(wrong)  # type: ignore[arg-type]


def test_a_tensor_under_two_names_counts_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = Averager(model, optimizer, ExponentialMean(0.5))
    before: Tensor = model[0].weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    half = float((before - model[0].weight.detach()).norm()) / 2
    assert averager.health()["merged/distance"] == pytest.approx(half, rel=1e-5)
