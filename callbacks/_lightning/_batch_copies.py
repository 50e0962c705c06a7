"""Copies of batches in host memory, whatever they are made of, and back on the device."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_merge._to_host import ToHost


@dataclass
class BatchCopy:
    """A copy of a batch in host memory.

    Attributes:
        batch: The copy; to be read after ``way.wait()``.
        size: Bytes of the tensors and arrays in it, those in objects too.
        on_host: Which of its tensors, in the order they are met, were in host memory beside others that were not.
        way: How it gets into host memory.
    """

    batch: Any
    size: int
    on_host: list[bool]
    way: ToHost = field(default_factory=ToHost)

    @classmethod
    def of(cls, batch: Any) -> "BatchCopy":
        """Copies a batch.

        Raises:
            ValueError: If it holds something that cannot be copied.
        """
        devices: list[torch.device] = []
        size = 0
        way = ToHost()

        def to_host(tensor: Tensor) -> Tensor:
            nonlocal size
            devices.append(tensor.device)
            size += tensor.numel() * tensor.element_size()
            return _marked_as(tensor, way.copy(tensor))

        copied, arrays = _copied(batch, to_host)
        way.sent()
        on_host = [device.type == "cpu" for device in devices]
        return cls(copied, size + arrays, [] if all(on_host) else on_host, way)

    def on(self, device: torch.device) -> Any:
        """A copy of the copy, on this device; what the step was given in host memory is given there again."""
        self.way.wait()
        left = iter(self.on_host)
        target = {True: torch.device("cpu"), False: device}
        return _copied(self.batch, lambda tensor: _another(tensor, target[next(left, False)]))[0]


def own_copy(batch: Any, title: str) -> Any:
    """A copy of a batch for another branch, on the devices where its tensors are.

    Args:
        batch: Whatever the loader gave.
        title: Who trains several branches on it.

    Raises:
        ValueError: If it holds something that cannot be copied.
    """
    try:
        return _converted(batch, lambda tensor: _another(tensor, tensor.device))[0]
    except Exception as error:
        raise ValueError(
            f"{title} trains several branches on each batch, and a step may write to it, but a batch"
            f" ({type(batch).__name__}) cannot be copied: {type(error).__name__}: {error}. Give its class a"
            " `__deepcopy__`, or take `batches='turns'`."
        ) from error


def is_plain(value: Any) -> bool:
    """Whether it is tensors, numbers, strings and ``None`` in dicts, lists and tuples, and of no other class."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) in (str, int) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (Tensor, bool, int, float, str)


def _copied(batch: Any, convert: Callable[[Tensor], Tensor]) -> tuple[Any, int]:
    """The batch with every tensor converted and all else copied, and the bytes of the arrays in it."""
    try:
        copied, memo = _converted(batch, convert)
    except Exception as error:
        raise ValueError(
            f"a batch ({type(batch).__name__}) cannot be copied: {type(error).__name__}: {error}. Batches are kept for"
            " measuring BatchNorm statistics again. Give its class a `__deepcopy__`, leave out of the batch what cannot"
            " be copied, or choose another `buffers`."
        ) from error
    return copied, sum(each.nbytes for each in memo.values() if isinstance(each, np.ndarray))


def _converted(batch: Any, convert: Callable[[Tensor], Tensor]) -> tuple[Any, dict[int, Any]]:
    if _is_simple(batch):
        return _simple(batch, convert), {}
    memo: dict[int, Any] = {}
    pairs: list[tuple[Tensor, Tensor]] = []

    def converted(tensor: Tensor) -> Tensor:
        new = convert(tensor)
        pairs.append((tensor, new))
        for key, value in getattr(tensor, "__dict__", {}).items():
            if key not in vars(new):  # what a user, or a class of their own, hung on it
                setattr(new, key, _walk(value, converted, memo))
        return new

    with _ConvertedTensors(converted):
        copied = _walk(batch, converted, memo)
    _share_memory(pairs)
    return copied, memo


def _is_simple(batch: Any) -> bool:
    """Whether it is plain, and its tensors have no memory in common and nothing hung on them, as of most loaders."""
    if not is_plain(batch):
        return False
    tensors = list(_tensors(batch))
    if any(each.layout is not torch.strided or vars(each) for each in tensors):
        return False
    return len(tensors) < 2 or len({each.untyped_storage()._cdata for each in tensors}) == len(tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    if type(value) is Tensor:
        yield value
    elif type(value) in (list, tuple, dict):
        for item in value.values() if type(value) is dict else value:
            yield from _tensors(item)


def _simple(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    kind = type(value)
    if kind is Tensor:
        return convert(value)
    if kind is dict:
        return {key: _simple(item, convert) for key, item in value.items()}
    return kind(_simple(item, convert) for item in value) if kind in (list, tuple) else value


def _walk(value: Any, convert: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    # Containers here and not by `deepcopy`, which hands tensors of a class of their own to that class.
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = convert(value)
        return memo[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_walk(item, convert, memo) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)._make(_walk(item, convert, memo) for item in value)  # type: ignore[attr-defined]
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _walk(item, convert, memo)) for key, item in value.items())
    return deepcopy(value, memo)


def _another(tensor: Tensor, device: torch.device) -> Tensor:
    return _marked_as(tensor, tensor.detach().to(device, copy=True))


def _marked_as(tensor: Tensor, new: Tensor) -> Tensor:
    # A loss that takes gradients of its inputs finds them marked.
    return new.requires_grad_() if tensor.requires_grad else new


def _share_memory(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Lays copies of tensors that overlap in memory over each other too: a step that writes to one writes to all."""
    groups: dict[Any, list[tuple[int, int, Tensor, Tensor]]] = {}
    for old, new in pairs:
        if type(old) is type(new) is Tensor and old.layout is torch.strided and old.numel() and not old.is_quantized:
            begin = int(old.storage_offset())
            end = begin + 1 + sum((size - 1) * step for size, step in zip(old.shape, old.stride(), strict=True))
            key = old.untyped_storage()._cdata, old.dtype, old.is_conj(), old.is_neg(), new.device
            groups.setdefault(key, []).append((begin, end, old, new))
    for group in groups.values():
        overlapping: list[tuple[int, int, Tensor, Tensor]] = []
        for each in sorted(group, key=lambda entry: entry[0]):
            if overlapping and each[0] >= max(end for _, end, _, _ in overlapping):
                _lay_over(overlapping)
                overlapping = []
            overlapping.append(each)
        _lay_over(overlapping)


def _lay_over(overlapping: list[tuple[int, int, Tensor, Tensor]]) -> None:
    if len(overlapping) < 2:
        return
    first, last = overlapping[0][0], max(end for _, end, _, _ in overlapping)
    _, _, old, new = overlapping[0]
    with torch.no_grad():
        common = old.detach().as_strided((last - first,), (1,), first).to(new.device, copy=True)
        for begin, _, old, new in overlapping:
            new.data = common.as_strided(old.shape, old.stride(), begin - first)


class _ConvertedTensors(TorchFunctionMode):
    """Inside, ``deepcopy`` converts each tensor, wherever in an object it lies."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._convert = convert

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = self._convert(tensor)
        return memo[id(tensor)]
