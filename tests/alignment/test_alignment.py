"""Networks whose hidden units are put into another order."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_merge.alignment import align, units

Weights = dict[str, Tensor]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2)
    )


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + 0.5 * torch.relu(self.norm(self.depthwise(y)))
        return self.head(y.mean((2, 3)))


class Twice(nn.Module):
    """A layer that is used again, so that its inputs and outputs are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.again(torch.relu(self.again(self.first(x).relu())))))


class Branching(nn.Module):
    """With an attention in it, whose units are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.hidden, self.last = nn.Linear(4, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.relu(self.hidden(self.attention(y, y, y, need_weights=False)[0])))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 6)
        self.second.weight, self.final = self.first.weight, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.final(self.last(self.second(self.first(x).relu()).relu()).relu())


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "perceptron": (perceptron, ROWS, 2),
    "flattened": (flattened, IMAGES, 2),
    "depthwise": (Depthwise, IMAGES, 1),
    "twice": (Twice, ROWS, 1),
    "attention": (Branching, ROWS[:, None], 1),
    "tied": (Tied, torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), 1),
    "resnet-18": (lambda: timm.create_model("resnet18", num_classes=3), torch.randn(2, 3, 32, 32), 12),
    "efficientnet": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=3), torch.randn(2, 3, 32, 32), 24),
}


def made(name: str) -> tuple[nn.Module, Weights, Tensor]:
    make, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:  # scales, variances: no two alike
                tensor.uniform_(0.5, 1.5)
    return net, {key: each.clone() for key, each in net.state_dict().items()}, inputs


def shuffled(net: nn.Module, weights: Weights, seed: int = 1) -> Weights:
    """Every group of units in a random order."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(weights)
    for group in units(net):
        order = torch.randperm(group.size, generator=generator)
        for (name, axis), block in group.axes.items():
            places = (order[:, None] * block + torch.arange(block)).flatten()
            found[name] = found[name].index_select(axis, places)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_units_in_any_order_are_the_same_function(name: str) -> None:
    net, weights, inputs = made(name)
    assert len(units(net)) == NETWORKS[name][2]
    expected = net(inputs).detach()
    other = shuffled(net, weights)
    assert any((other[key] != weights[key]).any() for key in weights)
    net.load_state_dict(other)
    torch.testing.assert_close(net(inputs), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shuffled_network_is_found_again_bit_for_bit(name: str) -> None:
    net, weights, _ = made(name)
    found = align(net, shuffled(net, weights), to=weights)
    assert [key for key in weights if not torch.equal(found[key], weights[key])] == []


def test_the_order_is_the_best_of_all_for_one_group() -> None:
    from itertools import permutations

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    torch.manual_seed(1)
    one, two = ({name: torch.randn_like(each) for name, each in net.state_dict().items()} for _ in range(2))

    def likeness(found: Weights) -> float:
        return sum(float((found[name] * one[name]).sum()) for name in one)

    def ordered(order: tuple[int, ...]) -> Weights:
        rows = list(order)
        return {
            "0.weight": two["0.weight"][rows],
            "0.bias": two["0.bias"][rows],
            "2.weight": two["2.weight"][:, rows],
            "2.bias": two["2.bias"],
        }

    best = max(permutations(range(4)), key=lambda order: likeness(ordered(order)))
    found = align(net, two, to=one)
    assert all(torch.equal(found[name], each) for name, each in ordered(best).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n: t for n, t in w.items() if n != "0.bias"}, "`weights` must be of the architecture .*`0.bias`"),
        (lambda w: w | {"0.bias": torch.zeros(7)}, r"`0.bias` has shape \(7,\) instead of \(6,\)"),
        (lambda w: w | {"5.bias": torch.full((3,), float("nan"))}, "`weights` must be finite, and `5.bias`"),
    ],
)
def test_other_architectures_are_refused_by_the_first_difference(change: Any, message: str) -> None:
    net, weights, _ = made("perceptron")
    with pytest.raises(ValueError, match=message):
        align(net, change(weights), to=weights)


def test_weights_of_another_module_are_refused() -> None:
    net, weights, _ = made("perceptron")
    with pytest.raises(
        ValueError, match=r"`weights` must be of `module`, which has 6 units in `0.weight`: it is missing"
    ):
        align(net, {"w": weights["0.weight"]}, to={"w": weights["0.weight"]})


def test_a_forward_pass_that_branches_on_values_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="cannot be followed symbolically"):
        units(Net())


def test_a_network_without_hidden_units_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`module` must have hidden units .* Linear has none"):
        units(nn.Linear(2, 2))
