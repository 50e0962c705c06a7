"""Sets of weights cut into parts that stay in the cache, joined into one tensor, seen as NumPy arrays."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge._checks import one_of, whole
from lightning_merge.weights._names import Weights
from lightning_merge.weights._precision import average_dtype


def on_host(weights: Mapping[str, Tensor]) -> bool:
    """How weights are walked: in pieces that stay in a cache, as ``parts`` cuts them, if some are on the CPU.

    On any other device each operation takes all tensors at once: what costs there is to launch one, and to wait for it.
    """
    return any(_is_host(tensor) for tensor in weights.values())


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def parts(weights: Mapping[str, Tensor], locality: str = "element", size: int = 2**17) -> Iterator[dict[str, slice]]:
    """Divides the weights into parts of about ``size`` numbers that stay in the cache while several operations run.

    Weights of which none is on the CPU are one part (``on_host``).

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
    if locality == "model" or (weights and not on_host(weights)):
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
    plain = type(tensor) in (Tensor, nn.Parameter) and _is_host(tensor) and tensor.dtype != torch.bfloat16
    return tensor.detach().numpy() if plain else tensor


def rows(weights: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """Names and numbers of tensors as rows of a matrix, for what is done to each tensor; one group after the other.

    On a CPU each tensor is a group, and not copied if it is contiguous. On other devices all of one size and dtype are
    one (``stacked``): a model has few sizes, so that an operation is launched a few times for hundreds of tensors.
    """
    if not on_host(weights):
        yield from stacked(weights)
        return
    for name in weights:
        yield [name], joined(weights, [name])


def stacked(weights: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """Names and numbers of the tensors of one size, dtype and device as rows of a new matrix; each such group in turn.

    Example:
        >>> list(stacked({"a": torch.ones(1, 2), "b": torch.ones(3), "c": torch.zeros(2)}))
        [(['a', 'c'], tensor([[1., 1.],
                [0., 0.]])), (['b'], tensor([[1., 1., 1.]]))]
    """
    groups: dict[tuple[int, torch.dtype, torch.device], list[str]] = {}
    for name, tensor in weights.items():
        groups.setdefault((tensor.numel(), tensor.dtype, tensor.device), []).append(name)
    for names in groups.values():
        yield names, torch.stack([weights[name].detach().reshape(-1) for name in names])


def matrices(weights: Mapping[str, Tensor], first: bool) -> Iterator[tuple[list[str], Tensor]]:
    """Names and numbers of tensors as matrices, for what is done to each row of a tensor; one group after the other.

    On a CPU each tensor is a group; on other devices all whose rows are of one size and dtype are.

    Args:
        weights: Any. What has one dimension or none is a single row.
        first: Whether a row is what belongs to an index of the first dimension, or what lies along the last one.

    Example:
        >>> [(names, tuple(m.shape)) for names, m in matrices({"a": torch.ones(2, 3, 4), "b": torch.ones(5)}, True)]
        [(['a'], (2, 12)), (['b'], (1, 5))]
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in weights.items():
        inner = tensor.shape[1:] if first else tensor.shape[-1:]
        numbers = tensor.numel() if tensor.ndim < 2 else math.prod(inner)
        alone = name if _is_host(tensor) else ""
        groups.setdefault((max(1, numbers), tensor.dtype, tensor.device, alone), []).append(name)
    for (numbers, *_), names in groups.items():
        flat = [weights[name].detach().reshape(-1, numbers) for name in names]
        yield names, flat[0] if len(flat) == 1 else torch.cat(flat)


def joined(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Tensors of one size as the rows of a matrix, to be read; a single one is not copied if it is contiguous."""
    flat = [weights[name].detach().reshape(1, weights[name].numel()) for name in names]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def worth_it(mask: Tensor) -> bool:
    """Whether any is set, where a look costs nothing; on other devices it is not looked at, and the answer is yes."""
    return not _is_host(mask) or bool(mask.any())


def side_by_side(weights: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """The names in order, and the numbers of all tensors one after the other in the only row of a new matrix."""
    names = sorted(weights)
    return names, torch.cat([weights[name].detach().reshape(1, weights[name].numel()) for name in names], dim=1)


def unstacked(rows: Tensor, names: Sequence[str], reference: Mapping[str, Tensor]) -> Weights:
    """What ``stacked`` and ``side_by_side`` made, as tensors in the shapes of ``reference``; they share its memory."""
    pieces = torch.split(rows.reshape(-1), [reference[name].numel() for name in names])
    return {name: piece.view(reference[name].shape) for name, piece in zip(names, pieces, strict=True)}


def in_threads(function: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Calls the function for every item, on as many threads as torch uses; the first exception is raised."""
    if torch.get_num_threads() == 1:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(function, items):
            pass


def slices(numbers: int, size: int = 2**16) -> Iterator[slice]:
    """Where pieces of this size lie, for what stays in the cache while several operations run."""
    return (slice(start, min(start + size, numbers)) for start in range(0, numbers, size))
