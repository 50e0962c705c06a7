"""Isolation: running a module without leaving a trace of it."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_merge.weights import is_metric


@contextmanager
def isolated(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Inside, the module is in eval mode, random numbers come from a seed, and no gradients are kept.

    At the end the module's modes, buffers and torchmetrics metrics and all random states are what they were, also
    after an exception. The tensors stay the same objects. It takes a copy of the buffers and of those metric states
    that are not lists.

    Args:
        module: What is run inside. Parameters are not restored.
        seed: Seed of Python, NumPy and torch (on the CPU and on the module's devices); at least 0.
    """
    # Not inference mode, which may be on outside: its tensors could not be trained on or copied into buffers later.
    with torch.inference_mode(False), torch.no_grad(), _eager(), _random_numbers(seed, module), _restored(module):
        # Flags rather than eval(), which some modules extend: LoRA layers that merge their weights, for one.
        for each in module.modules():
            each.training = False
        yield


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    modes = {each: each.training for each in module.modules()}
    buffers = {each: dict(each._buffers) for each in module.modules()}
    # A metric keeps its state in plain attributes. Containers are copied, so that what is appended later is dropped.
    metrics = {each: tree_map(_same, dict(vars(each))) for each in module.modules() if is_metric(each)}
    owned = [tensor for own in (*buffers.values(), *metrics.values()) for tensor in own.values()]
    tensors = {id(tensor): tensor for tensor in owned if isinstance(tensor, Tensor)}
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
