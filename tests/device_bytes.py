"""Counts what operations move through memory: with launches and reads, what a GPU takes for large tensors."""

from collections.abc import Iterator
from typing import Any

from device_counts import NOTHING
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OVERWRITES = ("copy_", "fill_", "zero_", "random_", "_foreach_copy_", "_foreach_zero_", "exponential_", "uniform_")
"""Operations that write to their first argument and do not read it."""


class Moved(TorchDispatchMode):
    """Counts bytes from here to the end of the ``with`` block, as if each operation moved all it takes and gives.

    Attributes:
        bytes: Read and written.
        made: Of new tensors, whether they are still there or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        result = func(*args, **kwargs)
        if name in NOTHING or func.is_view:
            return result
        given = [*args, *kwargs.values()]
        keys = [each.name for each in func._schema.arguments][: len(args)] + list(kwargs)
        changed = {each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write}
        for key, value in zip(keys, given, strict=True):
            only_written = key in changed and (name in OVERWRITES or key == "out")
            self.bytes += size(value) * ((key in changed) + (not only_written))
        if not changed:
            self.bytes += size(result)
            self.made += size(result)
        return result


def size(value: Any) -> int:
    """Bytes of the tensors in it."""
    return sum(tensor.nbytes for tensor in tensors_in(value))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
