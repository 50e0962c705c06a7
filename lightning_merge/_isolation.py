"""Isolation: running a module without leaving a trace of it."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_merge._attributes import Attributes
from lightning_merge._copies_before_writing import CopiesBeforeWriting, has_values
from lightning_merge.weights import is_metric


@final
@dataclass
class Trace:
    """What a run has left behind that could not be put back; known once the run is over.

    Attributes:
        attributes: Names of attributes of the module.
    """

    attributes: list[str] = field(default_factory=list)


@contextmanager
def isolated(module: nn.Module, seed: int = 0, *, attributes: bool = True) -> Iterator[Trace]:
    """Inside, the module is in eval mode, random numbers come from a seed, and no gradients are kept.

    At the end the module is what it was, see ``untouched``, and so are all random states, also after an exception.

    Args:
        module: What is run inside.
        seed: Seed of Python, NumPy and torch (on the CPU and on the module's devices); at least 0.
        attributes: Whether plain attributes are put back too.
    """
    # Not inference mode, which may be on outside: its tensors could not be trained on or copied into buffers later.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _eager(),
        _random_numbers(seed, module),
        untouched(module, attributes=attributes) as trace,
    ):
        # Flags rather than eval(), which some modules extend: LoRA layers that merge their weights, for one.
        for each in module.modules():
            each.training = False
        yield trace


@contextmanager
def untouched(module: nn.Module, *, attributes: bool = True) -> Iterator[Trace]:
    """At the end the module is what it was, also after an exception, and the tensors are the same objects.

    That is: modes, parameters and what requires gradients, gradients, buffers, torchmetrics metrics, and plain
    attributes with what lies in them (counters, lists, memories, random states), unless told not to. It takes a copy
    of the buffers, of those metric states that are not lists, and of what of everything else is written to inside.
    """
    plain = Attributes(module) if attributes else None
    modules = list(module.modules()) if plain is None else plain.modules
    parameters = _Parameters(modules)
    trace = Trace()
    watched = [*parameters.tensors(), *(() if plain is None else plain.tensors)]
    with _restored(modules), CopiesBeforeWriting(watched):
        try:
            yield trace
        finally:
            parameters.put_back()
            if plain is not None:
                trace.attributes = plain.restore()


@final
class _Parameters:
    """Which parameters modules have, and their gradients; not their values."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        dicts: list[dict[str, Any]] = [
            own
            for each in modules
            if not isinstance(each, torch.jit.ScriptModule)
            for own in (each._parameters, each._modules)
        ]
        self._owned = [(own, dict(own)) for own in dicts]
        known = {id(p): p for each in modules for p in each.parameters(recurse=False)}
        self._all = [(p, p.requires_grad, p.grad) for p in known.values() if has_values(p)]

    def tensors(self) -> list[Tensor]:
        return [tensor for p, _, grad in self._all for tensor in (p, grad) if tensor is not None]

    def put_back(self) -> None:
        for live, own in self._owned:
            if list(live) != list(own) or any(live[name] is not each for name, each in own.items()):
                live.clear()
                live.update(own)
        for parameter, requires_grad, grad in self._all:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad


@contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    modes = {each: each.training for each in modules}
    buffers = {each: dict(each._buffers.items()) for each in modules}
    # A metric keeps its state in plain attributes. Containers are copied, so that what is appended later is dropped.
    metrics = {each: tree_map(_same, dict(vars(each))) for each in modules if is_metric(each)}
    owned = [tensor for own in (*buffers.values(), *metrics.values()) for tensor in own.values()]
    tensors = {id(tensor): tensor for tensor in owned if isinstance(tensor, Tensor) and has_values(tensor)}
    values = {key: tensor.clone() for key, tensor in tensors.items()}
    try:
        yield
    finally:
        for each, attributes in metrics.items():
            vars(each).update(attributes)
            for name in vars(each).keys() - attributes.keys():
                del vars(each)[name]
        for each, mode in modes.items():
            each.training = mode
        for each, own in buffers.items():
            if not isinstance(each, torch.jit.ScriptModule):  # whose buffers are never other objects
                each._buffers.clear()
                each._buffers.update(own)
        # In inference mode, since validation may have made a metric's state an inference tensor.
        with torch.inference_mode():
            for key, tensor in tensors.items():
                tensor.copy_(values[key])


def _same(leaf: Any) -> Any:
    return leaf


@contextmanager
def _random_numbers(seed: int, module: nn.Module) -> Iterator[None]:
    generators = [torch.default_generator]
    for device in {tensor.device for tensor in (*module.parameters(), *module.buffers())}:
        # Not torch.manual_seed: it would seed every device, those of other modules too.
        of_this_type = getattr(getattr(torch, device.type, None), "default_generators", ())
        generators += [of_this_type[device.index]] if of_this_type else []
    states = [generator.get_state() for generator in generators]
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def _eager() -> Iterator[None]:
    """Runs compiled functions eagerly: every hook that comes or goes would have them compiled again."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield  # nothing is compiled, and setting the stance would import dynamo, which takes a second
