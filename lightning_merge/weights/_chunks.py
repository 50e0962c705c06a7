"""Sets of weights cut into parts that stay in the cache, joined into one tensor, seen as NumPy arrays."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge._checks import one_of, whole
from lightning_merge.weights._names import Weights
from lightning_merge.weights._precision import average_dtype


def parts(weights: Mapping[str, Tensor], locality: str = "element", size: int = 2**17) -> Iterator[dict[str, slice]]:
    """Divides the weights into parts of about ``size`` numbers that stay in the cache while several operations run.

    Args:
        weights: Any.
        locality: ``"element"`` cuts tensors, ``"tensor"`` keeps each in one part, ``"model"`` gives a single part.
        size: Numbers in a part; at least 1.

    Raises:
        TypeError: If ``size`` is not a whole number.
        ValueError: If an argument is out of range; before the first part is asked for.

    Example:
        >>> list(parts({"a": torch.zeros(5), "b": torch.zeros(1)}, "element", size=3))
        [{'a': slice(0, 3, None)}, {'a': slice(3, 5, None), 'b': slice(0, 1, None)}]
    """
    one_of("locality", locality, ("element", "tensor", "model"))
    return _parts(weights, locality, whole("size", size, 1))


def _parts(weights: Mapping[str, Tensor], locality: str, size: int) -> Iterator[dict[str, slice]]:
    if locality == "model":
        yield {name: slice(None) for name in weights}
        return
    collected: dict[str, slice] = {}
    room = size
    for name, tensor in weights.items():
        numbers = tensor.numel()
        if locality == "tensor" or not _is_flat(tensor):
            collected[name] = slice(None)
            room -= numbers
        else:
            start = 0
            while numbers - start > room:
                collected[name] = slice(start, start + room)
                start += room
                yield collected
                collected, room = {}, size
            collected[name] = slice(start, numbers)
            room -= numbers - start
        if room <= 0:
            yield collected
            collected, room = {}, size
    if collected:
        yield collected


def part(weights: Mapping[str, Tensor], where: Mapping[str, slice]) -> Weights:
    """Views of one of the ``parts``."""
    return {
        name: weights[name] if piece == slice(None) else weights[name].reshape(-1)[piece]
        for name, piece in where.items()
    }


def _is_flat(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_contiguous()


def flatten(weights: Mapping[str, Tensor]) -> Tensor:
    """All numbers in one new tensor, in the widest precision that an average of any of them is kept in."""
    dtypes = {average_dtype(t) for t in weights.values()}
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in weights.values()])


def unflatten(flat: Tensor, reference: Mapping[str, Tensor]) -> Weights:
    """The parts of ``flatten``'s result, in its precision and in the shapes of ``reference``."""
    parts = torch.split(flat, [t.numel() for t in reference.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, reference.items(), strict=True)}


def array(tensor: Tensor) -> Any:
    """The same numbers as a NumPy array if they are on the CPU and whole, else the tensor itself.

    On a CPU, NumPy compares and selects up to ten times as fast as torch, and without the lock of the interpreter, so
    several threads can. Much is written the same for either: ``abs(x)``, ``x += y``, ``x > y``, ``x.clip(0, None)``.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16
    return tensor.detach().numpy() if plain else tensor


def in_threads(function: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Calls the function for every item, on as many threads as torch uses; the first exception is raised."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(function, items):
            pass
