"""The loss of a module on one batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Loss:
    """A loss on one batch.

    Args:
        head: Tensors of the module that are the task's own.
        inputs: What the module is called with, on a device.
        of: From its outputs to one number.
        said: What the batch is, in words.
    """

    head: Mapping[str, Tensor]
    inputs: Callable[[torch.device], Any]
    of: Callable[[Any], Tensor]
    said: str

    def value(self, module: nn.Module, live: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """That of the module with these tensors in the place of its own.

        Raises:
            ValueError: If the module cannot be called with the batch, or its outputs do not go with the labels.
        """
        head = {name: tensor.to(device) for name, tensor in self.head.items()}
        try:
            return self.of(functional_call(module, {**live, **head}, (self.inputs(device),)))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            kinds = sorted({str(t.dtype).removeprefix("torch.") for t in live.values() if t.is_floating_point()})
            raise ValueError(
                f"`module`, with weights of {' and '.join(kinds)}, has no loss on {self.said}: {error}"
            ) from error


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Each submodule in eval mode, and as it was afterwards."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode
