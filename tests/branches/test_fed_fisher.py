"""FedFisher: the official iteration, in both precisions of what is known, and what it takes."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_merge.branches import FedFisher, InTurn

WEIGHTS = [[1.0, -2.0, 0.5, 3.0], [-1.0, 0.4, 2.5, 3.5]]
INFORMATION = [[0.8, 0.02, 0.0, 1e-4], [0.2, 0.5, 0.0, 3e-4]]


def branches(optimizer: Any = torch.optim.Adam, betas: tuple[float, float] = (0.9, 0.0)) -> tuple[InTurn, nn.Linear]:
    """Two branches of the weights above, with an optimizer that has seen these squares of gradients."""
    net = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    adam = optimizer(net.parameters(), betas=betas)
    found = InTurn(net, [adam], count=2)
    for branch in (1, 0):
        found.activate(branch)
        with torch.no_grad():
            net.weight.copy_(torch.tensor([WEIGHTS[branch]], dtype=torch.float64))
        square = torch.tensor([INFORMATION[branch]], dtype=torch.float64) * (1 - betas[1] ** 3)
        adam.state[net.weight] = {"exp_avg_sq": square, "exp_avg": torch.zeros_like(square), "step": torch.tensor(3.0)}
    return found, net


@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.9, 0.99)])
def test_it_is_the_official_iteration(betas: tuple[float, float]) -> None:
    own, net = branches(betas=betas)
    FedFisher((1, 3), iterations=201).merge({}, own)
    # one_shot_fisher_diag of Divyansh03/FedFisher (ebea799), executed: 201 iterations, eta 0.01, float64
    expected = [0.6001826302304861, 0.3076978560214275, 2.0, 3.375]
    for branch in (0, 1):
        assert own.weights(branch)["weight"][0].tolist() == pytest.approx(expected, abs=1e-9)
    assert own.active == 0
    assert torch.equal(net.weight, own.weights(0)["weight"])


def test_it_goes_to_the_fisher_mean_and_stays_at_the_mean_where_nobody_knows_anything() -> None:
    own, _ = branches()
    FedFisher(iterations=20_000).merge({}, own)
    found = own.weights(0)["weight"][0].tolist()
    assert found[0] == pytest.approx((0.8 * 1.0 - 0.2 * 1.0) / 1.0, abs=1e-6)
    assert found[1] == pytest.approx((0.02 * -2.0 + 0.5 * 0.4) / 0.52, abs=1e-3)
    assert found[2] == 1.5


def test_a_branch_that_has_not_stepped_a_parameter_does_not_count() -> None:
    own, _ = branches()
    own.activate(1)
    own.optimizers[0].state.clear()
    FedFisher(iterations=20_000).merge({}, own)
    assert own.weights(0)["weight"][0, 0].item() == pytest.approx(1.0, abs=1e-6)


def test_what_it_cannot_do_is_refused() -> None:
    net = nn.Linear(1, 1)
    plain = InTurn(net, [torch.optim.SGD(net.parameters(), 0.1)], count=2)
    with pytest.raises(ValueError, match="`FedFisher` takes the second moments of an optimizer of Adam's kind"):
        FedFisher().merge({}, plain)
    own, _ = branches()
    with pytest.raises(ValueError, match="one entry for each of the 2 branches"):
        FedFisher((1, 2, 3)).merge({}, own)
    for settings, message in (({"rate": 0.0}, "`rate` must be more than 0"), ({"iterations": 0}, "at least 1, got 0")):
        with pytest.raises(ValueError, match=message):
            FedFisher(**settings)  # type: ignore[arg-type]
