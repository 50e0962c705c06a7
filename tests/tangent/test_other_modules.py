"""Modules of other people's styles: what leaves their forward pass is linear, and what cannot be is named."""

from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.utils.checkpoint import checkpoint

from lightning_merge.tangent import linearize


@dataclass
class Output:
    logits: Tensor
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor


class Pair(NamedTuple):
    logits: Tensor
    rows: int


class Net(nn.Module):
    """Returns something made of its logits, or keeps it as an attribute."""

    def __init__(self, made: Callable[[Tensor], Any], kept: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.made, self.keep, self.kept = made, kept, None

    def forward(self, x: Tensor) -> Any:
        logits = self.last(self.first(x).tanh())
        if self.keep is not None:
            self.kept = self.keep(logits)
        return self.made(logits)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda found: found),
    "dict in list": (lambda x: [{"a": x}, 1], lambda found: found[0]["a"]),
    "named tuple": (lambda x: Pair(x, len(x)), lambda found: found.logits),
    "dataclass": (Output, lambda found: found.logits),
    "dataclass with slots": (Frozen, lambda found: found.logits),
    "object": (lambda x: SimpleNamespace(inner=SimpleNamespace(a=x)), lambda found: found.inner.a),
    "mapping": (lambda x: UserDict(a=x), lambda found: found["a"]),
    "deque": (lambda x: deque([x]), lambda found: found[0]),
    "largest": (lambda x: x.max(dim=0), lambda found: found.values),
    "distribution": (
        lambda x: Independent(Normal(x, torch.ones_like(x), validate_args=False), 1, validate_args=False),
        lambda found: found.mean,
    ),
}


def on_a_line(net: nn.Module, read: Callable[[], Tensor]) -> None:
    """Outputs at w0, w0 + v and w0 + 2 v, and the gradient at the last one, which is that at w0."""
    start = {name: each.detach().clone() for name, each in net.named_parameters()}
    read().sum().backward()  # type: ignore[no-untyped-call]
    expected = [each.grad for each in net.parameters()]
    net.zero_grad()
    linearize(net)
    found = [read()]
    generator = torch.Generator().manual_seed(1)
    change = {name: 0.1 * torch.randn(each.shape, generator=generator).double() for name, each in start.items()}
    for i in (1, 2):
        net.load_state_dict({name: start[name] + i * change[name] for name in start})
        found.append(read())
    assert (found[1] != found[0]).any()
    torch.testing.assert_close(found[2] - found[1], found[1] - found[0])
    found[2].sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close([each.grad for each in net.parameters()], expected)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("where", ["returned", "kept"])
def test_what_leaves_is_linear_and_has_a_gradient(name: str, where: str) -> None:
    make, read = OUTPUTS[name]
    if where == "kept" and name in ("object", "mapping", "deque", "distribution"):
        pytest.skip("objects in attributes are not looked into")
    torch.manual_seed(0)
    net = Net(make if where == "returned" else lambda _: None, None if where == "returned" else make).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def found() -> Tensor:
        returned = net(x)
        return read(returned if where == "returned" else net.kept)

    on_a_line(net, found)


def test_lists_and_objects_keep_their_identity() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> list[Tensor]:
        kept.append(x)
        return kept

    net = Net(lambda x: x, keep)
    linearize(net)
    net(torch.randn(2, 3))
    assert net.kept is kept
    assert kept[0].requires_grad


def test_a_generator_is_refused() -> None:
    net = Net(lambda x: (each for each in [x]))
    linearize(net)
    with pytest.raises(TypeError, match="generator of results would run after"):
        net(torch.randn(2, 3))


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (lambda x: checkpoint(torch.tanh, x, use_reentrant=False), "activations are checkpointed inside"),
        (lambda x: checkpoint(torch.tanh, x, use_reentrant=True), "`Net` has no forward-mode rule"),
        (Negated.apply, "`Net` has no forward-mode rule .*jvp"),
        (lambda x: torch.func.jvp(torch.tanh, (x,), (x,))[1], "Nested forward mode AD"),
    ],
)
def test_what_cannot_be_linear_is_named(last: Callable[[Tensor], Tensor], message: str) -> None:
    net = Net(last)
    linearize(net)
    with pytest.raises(NotImplementedError, match=f"Net cannot be linearised: .*{message}"):
        net(torch.randn(2, 3))


def test_checkpointing_and_saving_around_it_are_well() -> None:
    net, x = Net(torch.tanh).double(), torch.randn(5, 3, dtype=torch.float64)
    on_a_line(net, lambda: checkpoint(net, x, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        loss = net(x).sum()
    loss.backward()


def test_a_forward_pass_that_writes_to_weights_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(4, 3, max_norm=0.1), nn.Linear(3, 2))
    linearize(net)
    with pytest.raises(ValueError, match=r"its forward pass writes to `0.weight`, as `max_norm`"):
        net(torch.arange(4))


def test_hooks_inside_are_warned_of_once() -> None:
    net = Net(torch.tanh)
    net.first.register_forward_hook(lambda *_: None)
    linearize(net)
    with pytest.warns(UserWarning, match="`first` in it has a forward hook") as said:
        net(torch.randn(2, 3))
    net(torch.randn(2, 3))  # warnings are errors here
    assert len(said) == 1
