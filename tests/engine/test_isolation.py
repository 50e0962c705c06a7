"""Running a module without leaving a trace: what it keeps outside parameters and buffers is put back too."""

import itertools
import random
import threading
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import AverageMeter
from torch import nn
from torchmetrics import MeanMetric

from lightning_merge._isolation import isolated

Step = Callable[[Any], Any]


def _draw(kept: Any) -> None:
    kept.random() if hasattr(kept, "random") else kept.rand()


class Slotted:
    __slots__ = ("late", "seen", "total")

    def __init__(self, total: int, seen: list[int]) -> None:
        self.total, self.seen = total, seen


def _optimizing() -> list[Any]:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.Adam([weight], 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    return [optimizer, schedule]


KEPT: dict[str, tuple[Callable[[], Any], Step, Callable[[Any], Any]]] = {
    # what is kept, what a step does to it, what of it is compared
    "list": (lambda: [1], lambda kept: kept.append(2), list),
    "nested list": (lambda: {"a": [1]}, lambda kept: kept["a"].append(2), lambda kept: kept["a"][:]),
    "list in a tuple": (lambda: ([1],), lambda kept: kept[0].append(2), lambda kept: kept[0][:]),
    "dict": (lambda: {"a": 1}, lambda kept: kept.update(b=1), dict),
    "default dict": (lambda: defaultdict(list), lambda kept: kept["a"].append(1), dict),
    "ordered dict": (lambda: OrderedDict(a=1, b=2), lambda kept: kept.move_to_end("a"), lambda kept: list(kept)),
    "counter": (lambda: Counter("aab"), lambda kept: kept.update("a"), dict),
    "bounded queue": (lambda: deque([1, 2], maxlen=2), lambda kept: kept.append(3), list),
    "set": (lambda: {1}, lambda kept: kept.add(2), set),
    "array": (lambda: np.zeros(2), lambda kept: kept.__iadd__(1), lambda kept: kept.tolist()),
    "tensor": (lambda: torch.zeros(3), lambda kept: kept[1:].add_(1), lambda kept: kept.tolist()),
    "tensor written to by its data": (
        lambda: torch.zeros(3),
        lambda kept: kept.data.add_(1),
        lambda kept: kept.tolist(),
    ),
    "object": (
        lambda: SimpleNamespace(total=0, seen=[]),
        lambda kept: (vars(kept).update(total=1), kept.seen.append(1)),
        lambda kept: (kept.total, kept.seen[:]),
    ),
    "object with slots": (
        lambda: Slotted(0, []),
        lambda kept: (setattr(kept, "total", 1), kept.seen.append(1), setattr(kept, "late", 2)),
        lambda kept: (kept.total, kept.seen[:], hasattr(kept, "late")),
    ),
    "optimizer and its schedule": (
        lambda: _optimizing(),
        lambda kept: (kept[0].step(), kept[1].step()),
        lambda kept: str((kept[0].state_dict(), kept[1].state_dict())),
    ),
    "bytes": (lambda: bytearray(b"a"), lambda kept: kept.append(1), bytes),
    "array of Python": (lambda: array("d", [1.0]), lambda kept: kept.append(2.0), list),
    "random": (lambda: random.Random(0), _draw, lambda kept: kept.getstate()),
    "generator of NumPy": (
        lambda: np.random.default_rng(0),
        _draw,
        lambda kept: kept.bit_generator.state["state"]["state"],
    ),
    "random state of NumPy": (lambda: np.random.RandomState(0), _draw, lambda kept: kept.get_state()[2]),
    "generator of torch": (
        lambda: torch.Generator().manual_seed(0),
        lambda kept: torch.rand(1, generator=kept),
        lambda kept: kept.get_state().tolist(),
    ),
    "module in a list": (
        lambda: [nn.BatchNorm1d(2)],
        lambda kept: kept[0].train()(torch.randn(4, 2)),
        lambda kept: kept[0].running_mean.tolist(),
    ),
    "metric in a list": (lambda: [MeanMetric()], lambda kept: kept[0].update(3.0), lambda kept: kept[0]._update_count),
}


@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("at", ["the module", "a layer"])
def test_what_a_module_keeps_in_attributes_is_put_back(form: str, at: str) -> None:
    make, step, content = KEPT[form]
    module = nn.Sequential(nn.Linear(2, 2))
    owner: Any = module if at == "the module" else module[0]
    owner.kept = kept = make()
    before = content(kept)
    with isolated(module) as trace:
        step(owner.kept)
        assert content(owner.kept) != before
    assert owner.kept is kept
    assert content(kept) == before
    assert not trace.attributes


def test_attributes_that_are_assigned_anew_added_or_removed_are_put_back() -> None:
    module: Any = nn.Linear(2, 2)
    module.seen, module.gone = 1, "here"
    with isolated(module):
        module.seen += 1
        module.new = 3
        del module.gone
    assert (module.seen, module.gone, hasattr(module, "new")) == (1, "here", False)


@pytest.mark.parametrize(
    "write",
    [
        lambda module: module.weight.data.mul_(2),
        lambda module: torch._foreach_add_([module.weight.data, module.bias.data], 1.0),
        lambda module: module.weight.grad.zero_(),
        lambda module: setattr(module.weight, "grad", None),
        lambda module: setattr(module, "weight", nn.Parameter(torch.zeros(2, 2))),
        lambda module: module.weight.requires_grad_(False),
        lambda module: torch.add(module.weight.data, 1.0, out=module.weight.data),
        lambda module: nn.init.zeros_(module.weight[0]),
    ],
)
def test_parameters_and_gradients_that_are_written_to_are_put_back(write: Step) -> None:
    module = nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    weight, grad = module.weight, module.weight.grad
    assert grad is not None
    before = weight.detach().clone(), grad.clone()
    with isolated(module):
        write(module)
    assert module.weight is weight
    assert weight.grad is grad
    assert weight.requires_grad
    assert torch.equal(weight, before[0])
    assert torch.equal(grad, before[1])


@pytest.mark.parametrize(
    "kept",
    [iter([1, 2, 3]), (number for number in range(3)), itertools.count(), enumerate("abc"), map(str, "abc")],
    ids=lambda k: str(type(k)),
)
def test_what_cannot_be_put_back_is_named(kept: Any) -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2))
    module[0].source = kept
    next(kept)
    with isolated(module) as trace:
        pass
    assert not trace.attributes
    with isolated(module) as trace:
        next(module[0].source)
    assert trace.attributes == ["0.source"]


def test_a_lazy_and_a_scripted_module_are_put_back() -> None:
    module = nn.Sequential(nn.LazyLinear(2), torch.jit.script(nn.BatchNorm1d(2)))
    with isolated(module):
        pass
    module(torch.randn(4, 3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with isolated(module):
        module[1].train()
        module(torch.randn(4, 3))
        assert not torch.equal(module[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module[1].training


class Prefetched:
    """Works on its list in a thread of its own."""

    def __init__(self) -> None:
        self.lock, self.ready = threading.Lock(), [1]


def test_what_has_threads_of_its_own_is_left_alone() -> None:
    module: Any = nn.Linear(2, 2)
    module.prefetched = Prefetched()
    with isolated(module):
        module.prefetched.ready.append(2)
    assert module.prefetched.ready == [1, 2]


def test_a_change_of_an_object_of_a_library_is_named() -> None:
    module: Any = nn.Linear(2, 2)
    module.meter = AverageMeter()
    with isolated(module) as trace:
        module.meter.update(1.0)
    assert trace.attributes == ["meter"]
