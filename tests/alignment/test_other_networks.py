"""Networks of other people's styles: what ``align`` may not move keeps its order, and the function stays the same."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from lightning_merge.alignment import align, units

ROWS, TOKENS, IMAGES, VOLUMES = (2, 6), (2, 4, 6), (2, 3, 8, 8), (2, 3, 3, 4, 4)


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Masked(nn.Linear):
    mask: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class Summing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(-1)


class NormAct(nn.BatchNorm2d):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.act = nn.PReLU(size)

    def forward(self, x: Tensor) -> Any:
        return self.act(super().forward(x))


def two(last: nn.Module, run: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    """A layer with several inputs."""
    return Net(lambda m, x: run(m.last, m.a(x), m.b(x)), a=nn.Linear(6, 8), b=nn.Linear(6, 8), last=last)


def hooked(layer: int, pre: bool = False) -> Any:
    net = perceptron()
    places = torch.arange(8.0)
    if pre:
        net[layer].register_forward_pre_hook(lambda _, given: (given[0] * places,))
    else:
        net[layer].register_forward_hook(lambda _, given, found: found * places)
    return net


def perceptron(kind: Callable[[int, int], nn.Module] = nn.Linear, again: nn.Module | None = None) -> Any:
    middle = kind(8, 8) if again is None else again
    return nn.Sequential(kind(6, 8), nn.ReLU(), middle, nn.ReLU(), again or nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def pruned() -> Any:
    net = perceptron()
    prune.l1_unstructured(net[2], "weight", 0.5)  # type: ignore[no-untyped-call]
    return net


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 8), norm, nn.ReLU(), nn.Linear(8, 2))


def tied_decoder(m: Any, x: Tensor) -> Any:
    hidden = functional.linear(m.b(m.a(x).relu()).relu(), m.b.weight.t(), m.bias).relu()
    return functional.linear(hidden, m.a.weight.t())


def image_net(*end: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *end)


def with_reader(read: Callable[[Any], Tensor]) -> nn.Module:
    return Net(
        lambda m, x: m.last(m.norm(m.a(x))) + (read(m) * torch.arange(8.0)).sum(),
        a=nn.Linear(6, 8),
        norm=nn.BatchNorm1d(8),
        last=nn.Linear(8, 2),
    )


def heads(m: Any, x: Tensor) -> Any:
    hidden = m.a(x).relu()
    return m.b(hidden) + m.c(hidden) if m.training else m.b(hidden)


def of(last: nn.Module, end: Callable[[Tensor], Tensor], first: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.last(end(m.first(x).relu())), first=first, last=last)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bilinear": (lambda: two(nn.Bilinear(8, 8, 4), lambda last, a, b: last(a.relu(), b.relu())), ROWS),
    "attention to another": (
        lambda: two(nn.MultiheadAttention(8, 2, batch_first=True), lambda last, a, b: last(a, b, b)[0]),
        TOKENS,
    ),
    "similarity": (lambda: two(nn.CosineSimilarity(), lambda last, a, b: last(a, b)), ROWS),
    "memory of a decoder": (
        lambda: two(nn.TransformerDecoderLayer(8, 2, 8, 0.0, batch_first=True), lambda last, a, b: last(a, b)),
        TOKENS,
    ),
    "tokens flattened": (lambda: of(nn.Linear(32, 2), lambda x: x.flatten(1), nn.Linear(6, 8)), TOKENS),
    "tokens flattened by a layer": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)),
        TOKENS,
    ),
    "flattened from the third axis": (lambda: image_net(nn.Flatten(2), nn.Linear(64, 2)), IMAGES),
    "examples laid in a row": (lambda: of(nn.Linear(512, 2), lambda x: x.view(1, -1), nn.Conv2d(3, 4, 1)), IMAGES),
    "pool along tokens' units": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 2)),
        TOKENS,
    ),
    "pool along features": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.AvgPool1d(3, 1, 1), nn.Linear(8, 2)),
        ROWS,
    ),
    "mean of a part of a volume": (
        lambda: of(nn.Linear(4, 2), lambda x: x.mean((-2, -1)), nn.Conv3d(3, 4, (3, 1, 1), padding=(1, 0, 0))),
        (2, 3, 4, 4, 4),
    ),
    "mean over channels last": (
        lambda: of(nn.Linear(8, 2), lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8), nn.Linear(8, 8)),
        IMAGES,
    ),
    "masked layer": (lambda: perceptron(Masked), ROWS),
    "layer with a forward of its own": (lambda: perceptron(Summing), ROWS),
    "norm with an activation of its own": (
        lambda: image_net(NormAct(4), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        IMAGES,
    ),
    "spectral norm by hooks": (lambda: perceptron(lambda *n: nn.utils.spectral_norm(nn.Linear(*n))), ROWS),
    "pruned": (pruned, ROWS),
    "hook": (lambda: hooked(0), ROWS),
    "hook before": (lambda: hooked(2, pre=True), ROWS),
    "weights read again": (lambda: with_reader(lambda m: m.a.weight.sum(1)), ROWS),
    "statistics read": (lambda: with_reader(lambda m: m.norm.running_var), ROWS),
    "tied decoder": (
        lambda: Net(tied_decoder, a=nn.Linear(6, 8), b=nn.Linear(8, 5), bias=nn.Parameter(torch.rand(8))),
        ROWS,
    ),
    "a norm passed twice": (shared_norm, ROWS),
    "a layer passed twice": (lambda: perceptron(again=nn.Linear(8, 8)), ROWS),
    "a head in training alone": (lambda: Net(heads, a=nn.Linear(6, 8), b=nn.Linear(8, 2), c=nn.Linear(8, 2)), ROWS),
    "transposed": (lambda: image_net(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)), IMAGES),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(4, 2)),
        VOLUMES,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_the_same_or_the_network_is_refused(name: str) -> None:
    make, shape = CASES[name]
    torch.manual_seed(0)
    net, inputs = make(), torch.randn(shape)
    net.eval()
    with torch.no_grad():
        for each in (*net.parameters(), *net.buffers()):
            if each.dim() == 1:  # no two units alike
                each.uniform_(0.5, 1.5)
    modes = [part.training for part in net.modules()]
    weights = {key: each.clone() for key, each in net.state_dict().items()}
    trained = {key for key, _ in net.named_parameters()}
    other = {key: torch.randn_like(each) if key in trained else each for key, each in weights.items()}
    found = weights
    with suppress(ValueError):
        found = align(net, weights, to=other)
    assert [part.training for part in net.modules()] == modes
    for training in (False, True):
        outputs = []
        for state in (weights, found):
            net.load_state_dict(state)
            torch.manual_seed(0)
            outputs.append(net.train(training)(inputs))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_what_is_known_is_moved_beside_what_is_not() -> None:
    """So that caution leaves something to do: the parts of these networks that are plain."""
    kinds = {"hook": 2, "spectral norm by hooks": 1, "a norm passed twice": 1, "a layer passed twice": 1, "volumes": 1}
    torch.manual_seed(0)
    assert {name: len(units(CASES[name][0]())) for name in kinds} == kinds
