"""Activations of a merged network given the spread of its members'."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_merge._moments import Moments
from lightning_merge.calibration import repair


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.Flatten(), nn.Linear(12, 5)
    ).double()


def members(count: int = 3) -> list[dict[str, Tensor]]:
    return [{name: each.clone() for name, each in network().state_dict().items()} for _ in range(count)]


def mean(models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}


def spreads(net: nn.Module, weights: dict[str, Tensor], batch: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each channel behind each layer."""
    found: dict[str, Any] = {}
    net.load_state_dict(weights)
    with torch.no_grad():
        for name, part in net.named_children():
            batch = part(batch)
            if list(part.parameters()):
                moments = Moments.of(batch)
                found[name] = (moments.mean, moments.variance(unbiased=False).sqrt())
    return found


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(16, 2, 4, 4, dtype=torch.float64)


def test_channels_have_the_mean_and_the_spread_of_the_members(batch: Tensor) -> None:
    net, models = network(), members()
    found = repair(net, mean(models), models, [batch], net)
    parts = [spreads(net, model, batch) for model in models]
    repaired = spreads(net, found, batch)
    for name in repaired:
        means = torch.stack([part[name][0] for part in parts]).mean(0)
        deviations = torch.stack([part[name][1] for part in parts]).mean(0)
        torch.testing.assert_close(repaired[name][1], deviations)
        if name != "2":  # a layer without a bias is not moved
            torch.testing.assert_close(repaired[name][0], means)
    assert (repaired["2"][0] - torch.stack([part["2"][0] for part in parts]).mean(0)).abs().max() > 1e-3


def test_equal_members_change_nothing_and_the_module_is_left_as_it_was(batch: Tensor) -> None:
    net, (model, *_) = network(), members()
    before = {name: each.clone() for name, each in net.state_dict().items()}
    found = repair(net, model, [model, model], [batch, batch.flip(0)], net)
    torch.testing.assert_close(found, model, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
    assert net.training


def test_a_constant_channel_is_moved_and_stays_finite(batch: Tensor) -> None:
    net, models = network(), members(2)
    models[1]["0.weight"][0] = -models[0]["0.weight"][0]
    found = repair(net, mean(models), models, [batch], net)
    assert all(bool(each.isfinite().all()) for each in found.values())


def test_last_axes_of_sequences_are_channels() -> None:
    net = nn.Linear(3, 2).double()
    models = [{name: torch.randn_like(each) for name, each in net.state_dict().items()} for _ in range(2)]
    sequences = torch.randn(4, 5, 3, dtype=torch.float64)
    rows = repair(net, mean(models), models, [sequences.flatten(0, 1)], net)
    torch.testing.assert_close(repair(net, mean(models), models, [sequences], net), rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": members(1)}, "`members` must hold at least 2 .* got 1"),
        ({"batches": []}, "`batches` must hold at least one batch"),
        ({"members": [{"0.weight": torch.zeros(1)}] * 2}, "member 1 of `members` is another model"),
        (
            {
                "module": nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)),
                "merged": {"0.weight": torch.zeros(1, 1)},
                "members": [{"0.weight": torch.zeros(1, 1)}] * 2,
            },
            "no BatchNorm layers, and has `1`",
        ),
        (
            {
                "module": nn.LayerNorm(2),
                "merged": {"weight": torch.ones(2)},
                "members": [{"weight": torch.ones(2)}] * 2,
            },
            "must hold weights of linear layers",
        ),
        ({"forward": lambda batch: None}, "`forward` must call linear layers"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str, batch: Tensor) -> None:
    net, models = network(), members()
    given = {"module": net, "merged": mean(models), "members": models, "batches": [batch], "forward": net, **change}
    with pytest.raises(ValueError, match=message):
        repair(**given)


def test_transposed_convolutions_are_left_and_what_follows_is_repaired() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    members = [{name: torch.randn_like(each) for name, each in net.named_parameters()} for _ in range(2)]
    merged = {name: (each + members[1][name]) / 2 for name, each in members[0].items()}
    found = repair(net, merged, members, [torch.randn(32, 4, 3)], net)
    assert torch.equal(found["0.weight"], merged["0.weight"])
    assert (found["3.weight"] != merged["3.weight"]).any()
