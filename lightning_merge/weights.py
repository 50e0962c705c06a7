"""Weights: the named tensors of a module, and the few operations that merging needs on them.

Everything that touches many tensors at once lives here, so the rules read like their formulas. Names are canonical:
the prefixes that ``torch.compile`` and wrappers insert are removed, so a name means the same in every run and file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_merge._checks import one_of, whole
from lightning_merge.inventory import canonical as canonical
from lightning_merge.inventory import is_metric as is_metric
from lightning_merge.inventory import laid_out_as, view
from lightning_merge.inventory import named_buffers as named_buffers
from lightning_merge.inventory import named_parameters as named_parameters
from lightning_merge.inventory import named_tensors as named_tensors
from lightning_merge.inventory import state_dict_names as state_dict_names
from lightning_merge.inventory import submodules as submodules

Weights: TypeAlias = dict[str, Tensor]
"""Named tensors. A rule never writes to the weights it is handed."""

State: TypeAlias = dict[str, Any]
"""What a rule remembers: tensors, numbers, strings, lists and dicts of them.

``torch.load(weights_only=True)`` reads it.
"""

_CHUNK = 2**17
"""Numbers that are mixed at a time in host memory: as many of every set fit into a core's cache."""


def is_averaged(tensor: Tensor) -> bool:
    """Whether a mean of such tensors means something: floating point or complex numbers, not integers or flags.

    Nor what only says it is floating point: packed tensors (quantised ones of torchao, say), which are classes of their
    own, and 8-bit floats, whose scale is somewhere else.
    """
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype.itemsize > 1 and _is_plain(tensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, of which this process may hold a part only."""
    return hasattr(
        tensor, "to_local"
    )  # not by its class: importing that takes a second, which most runs need not spend


@torch.no_grad()
def local(weights: Mapping[str, Tensor]) -> Weights:
    """What is here of each tensor, sharing its memory; of one that is not sharded that is the tensor."""
    return {name: _part(t) if is_sharded(t) else t for name, t in weights.items()}


def average_dtype(tensor: Tensor) -> torch.dtype:
    """The precision an average of such tensors is kept in: float32, or wider if the tensor is.

    In bfloat16 an exponential mean with decay 0.999 stops moving at a quarter of the way.
    """
    return torch.promote_types(tensor.dtype, torch.float32) if is_averaged(tensor) else tensor.dtype


def clone(weights: Mapping[str, Tensor]) -> Weights:
    """A copy of its own storage, in the precision averages are kept in."""
    return {
        name: t.detach().to(average_dtype(t), copy=True, memory_format=torch.preserve_format)
        for name, t in weights.items()
    }


def copies(weights: Mapping[str, Tensor]) -> Weights:
    """A copy of its own storage, in the precision the tensors have."""
    return {name: t.detach().clone() for name, t in weights.items()}


def to_devices(value: Any, devices: "Mapping[str, torch.device] | torch.device", device: Any = None) -> Any:
    """A state with every tensor on the device that its name has in ``devices``, or all on one device."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        chosen = {key: devices.get(key, device) if isinstance(devices, Mapping) else devices for key in value}
        return {key: to_devices(item, devices, chosen[key]) for key, item in value.items()}
    if isinstance(value, list):
        return [to_devices(item, devices, device) for item in value]
    return value


def zeros(weights: Mapping[str, Tensor]) -> Weights:
    """Zeros of the same shapes, in the precision averages are kept in."""
    return {name: torch.zeros_like(t, dtype=average_dtype(t)) for name, t in weights.items()}


@torch.no_grad()
def lerp_(target: Weights, source: Mapping[str, Tensor], weight: float) -> None:
    """``target <- target + weight * (source - target)``, in place and in the target's precision; at 1 a copy."""
    if weight == 1:
        copy_(target, source)  # nothing of the target remains, not even a NaN
        return
    for targets, sources in _pairs(target, source):
        torch._foreach_lerp_(targets, sources, weight)


@torch.no_grad()
def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """``target <- source``, in place; dtypes and devices may differ."""
    if target:  # torch refuses empty lists
        torch._foreach_copy_(list(target.values()), [source[name] for name in target])


@torch.no_grad()
def zero_(weights: Weights) -> None:
    """Sets every number to zero, in place."""
    if weights:
        torch._foreach_zero_(list(weights.values()))


@torch.no_grad()
def add_(target: Weights, source: Mapping[str, Tensor], factor: float = 1.0) -> None:
    """``target <- target + factor * source``, in place and in the target's precision."""
    for targets, sources in _pairs(target, source):
        torch._foreach_add_(targets, sources, alpha=factor)


@torch.no_grad()
def scaled(weights: Weights, factor: float) -> Weights:
    """``factor * weights``; at 1 the weights themselves."""
    if factor == 1 or not weights:
        return weights
    return dict(zip(weights, torch._foreach_mul(list(weights.values()), factor), strict=True))


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


def empty(weights: Mapping[str, Tensor]) -> Weights:
    """Memory for such weights, in the precision averages are kept in; what is in it is undefined."""
    return {
        name: torch.from_numpy(np.empty(t.shape, np.float32))  # NumPy's comes in large pages: three times as fast
        if type(t) is Tensor and t.device.type == "cpu" and average_dtype(t) == torch.float32 and t.is_contiguous()
        else torch.empty_like(t, dtype=average_dtype(t))
        for name, t in weights.items()
    }


def _is_flat(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_contiguous()


@torch.no_grad()
def compensated_lerp_(target: Weights, compensation: Weights, source: Mapping[str, Tensor], weight: float) -> None:
    """``lerp_`` that keeps in ``compensation`` what rounding loses, so steps below the resolution add up (Kahan)."""
    for name, value in target.items():
        carried = compensation[name]
        if weight == 1:
            value.copy_(source[name])
            carried.zero_()
            continue
        step = source[name].to(value).sub(value).sub_(carried).mul_(weight).add_(carried)
        before = value.clone()
        value.add_(step)
        carried.copy_(step.sub_(before.neg_().add_(value)))


@torch.no_grad()
def nonfinite(weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    averaged = {name: t for name, t in weights.items() if is_averaged(t) and t.numel()}
    # One number per tensor and one synchronisation per dtype and device: a norm of finite numbers can only overflow to
    # infinity, so a finite norm proves the tensor finite and the exact test runs on the rare rest.
    if all(bool(torch.stack(norms).isfinite().all()) for norms in _norms(list(averaged.values()))):
        return set()
    return {name for name, t in averaged.items() if not bool(t.isfinite().all())}


@torch.no_grad()
def all_below(weights: Mapping[str, Tensor], limit: float) -> bool:
    """Whether a cheap bound proves all magnitudes of real numbers to be below a limit of at least 1."""
    tensors = [t for t in weights.values() if t.numel()]
    return all(bool((torch.stack(norms) < limit).all()) for norms in _norms(tensors))  # or squares, which are larger


@torch.no_grad()
def largest(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude of each tensor of real numbers; 0 of an empty one."""
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    found = dict.fromkeys(weights, 0.0)
    for name, tensor in weights.items():
        if tensor.numel():
            groups.setdefault((tensor.dtype, tensor.device), []).append(name)
    for names in groups.values():  # one synchronisation per dtype and device
        norms = torch._foreach_norm([weights[name] for name in names], float("inf"))
        found |= zip(names, torch.stack(norms).tolist(), strict=True)
    return found


def _norms(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """A norm of each tensor, in lists of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        # On a CPU BLAS reads a large tensor faster than torch does, on both cores; small ones are all dispatch.
        large = [t for t in group if _is_for_blas(t)]
        small = [t for t in group if not _is_for_blas(t)]
        norms = [torch.dot(flat, flat) for flat in (t.view(-1) for t in large)]
        if small:
            norms += torch._foreach_norm(small, dtype=average_dtype(small[0]))
        yield norms


def _is_for_blas(tensor: Tensor) -> bool:
    plain = tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous()
    return plain and tensor.device.type == "cpu" and tensor.numel() >= 1 << 16


@torch.no_grad()
def weighted_mean(sets: Sequence[Mapping[str, Tensor]], shares: Sequence[float], out: Weights | None = None) -> Weights:
    """``sum(share * set)`` of sets of the same names; new tensors, in the precision averages are kept in.

    A set whose share is 0 is not read, so it may hold NaN. Equal sets give just these weights, without rounding.

    Args:
        sets: At least one.
        shares: One per set, at least 0; their sum is 1.
        out: Where to write them instead of to new tensors.
    """
    mean = {n: torch.empty_like(t, dtype=average_dtype(t)) for n, t in sets[0].items()} if out is None else out
    start, chain = _chain(shares)
    for name, target in mean.items():  # whole tensors: a piece at a time takes longer, at three sets
        _mean_into(target, [tensors[name] for tensors in sets], start, chain)
    return mean


@torch.no_grad()
def mix_(sets: Sequence[Mapping[str, Tensor]], matrix: Sequence[Sequence[float]]) -> None:
    """``set j <- sum over i of matrix[j][i] * set i``, in place: every number is read once and written once.

    Args:
        sets: Tensors of the same names, shapes and strides.
        matrix: A row per set, of numbers of at least 0 that sum to 1. A set whose share is 0 is not read, so it may
            hold NaN. A row that keeps its set as it is writes nothing.
    """
    changing: dict[tuple[float, ...], list[int]] = {}
    for j, row in enumerate(map(tuple, matrix)):
        if row[j] != 1:
            changing.setdefault(row, []).append(j)
    # What is the same for all can be computed in the place of one of them, unless that is too narrow.
    alike = len(changing) == 1
    work = [(*_chain(row, members[0]), members) for row, members in changing.items()]
    for pieces in _pieces(sets):
        in_place = alike and pieces[0].dtype == average_dtype(pieces[0])
        mixed = []
        for start, chain, members in work:
            target = pieces[members[0]] if in_place else torch.empty_like(pieces[0], dtype=average_dtype(pieces[0]))
            _mean_into(target, pieces, start, chain)
            mixed.append(target)
        for target, (_, _, members) in zip(mixed, work, strict=True):
            for j in members:
                if pieces[j] is not target:
                    pieces[j].copy_(target)


def like(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Weights:
    """The weights in the dtype and on the device of ``reference``; a tensor that fits already is not copied."""
    return {name: t.to(reference[name]) for name, t in weights.items()}


@torch.no_grad()
def exchange(
    parameters: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    before: Weights | None = None,
    ties: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> Weights:
    """Makes each parameter use the storage of the tensor of its name, and returns the storage it used before.

    No data moves: about a microsecond per tensor whatever its size. Parameter objects stay the same, so optimizers,
    DDP buckets and compiled graphs stay valid. What is written to a parameter afterwards is written to that tensor.
    FSDP has views of a sharded parameter's storage, so there values are copied, and a copy of those before is returned.
    Handing in ``before`` fills it as the exchange goes on, so a caller that is interrupted can undo what was done.

    Args:
        parameters: Live tensors by name.
        weights: What takes their place; of the same shapes.
        before: Is filled with what was there before.
        ties: By name, further tensors over the same numbers: they move along, as views in their own shape.
    """
    before = {} if before is None else before
    for name, tensor in weights.items():
        parameter = parameters[name]
        if is_sharded(parameter):
            part = _part(parameter)
            before[name] = part.clone()
            part.copy_(tensor)
        else:
            before[name] = parameter.data
            _move(parameter, tensor, ties.get(name, ()))
    return before


@torch.no_grad()
def put_back(
    parameters: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    ties: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> None:
    """Undoes an exchange."""
    for name, tensor in before.items():
        parameter = parameters[name]
        if is_sharded(parameter):
            _part(parameter).copy_(tensor)
        else:
            _move(parameter, tensor, ties.get(name, ()))


def _move(parameter: Tensor, tensor: Tensor, tied: Sequence[Tensor]) -> None:
    """Makes a parameter, and what is the same numbers, use the storage of a tensor."""
    if tied:
        tensor = laid_out_as(tensor, parameter)
        for other in tied:
            other.data = view(tensor, parameter, other)
    parameter.data = tensor


def mean_over_ranks_(weights: Weights) -> None:
    """Replaces floating-point tensors by their mean over all ranks; one all-reduce, none on a single process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    # In one order everywhere: that of a set of names differs between processes.
    floats = [weights[name] for name in sorted(weights) if weights[name].is_floating_point()]
    if not floats:
        return
    flat = torch.cat([t.reshape(-1).float() for t in floats])
    dist.all_reduce(flat)
    parts = torch.split(flat.div_(dist.get_world_size()), [t.numel() for t in floats])
    torch._foreach_copy_(floats, [part.view_as(t) for part, t in zip(parts, floats, strict=True)])


def flatten(weights: Mapping[str, Tensor]) -> Tensor:
    """All numbers in one new tensor, in the widest precision that an average of any of them is kept in."""
    dtypes = {average_dtype(t) for t in weights.values()}
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in weights.values()])


def unflatten(flat: Tensor, reference: Mapping[str, Tensor]) -> Weights:
    """The parts of ``flatten``'s result, in its precision and in the shapes of ``reference``."""
    parts = torch.split(flat, [t.numel() for t in reference.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, reference.items(), strict=True)}


def first_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes, in words; ``None`` if there is none."""
    for name, tensor in expected.items():
        if name not in found:
            return f"`{name}` of shape {tuple(tensor.shape)} is missing"
        if found[name].shape != tensor.shape:
            return f"`{name}` has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
    extra = next((name for name in found if name not in expected), None)
    return None if extra is None else f"`{extra}` of shape {tuple(found[extra].shape)} is not part of this model"


def _pairs(target: Weights, source: Mapping[str, Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Tensors of one dtype and device in one group; those that need a conversion one by one, to hold one at a time."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for name, value in target.items():
        other = source[name]
        if other.dtype != value.dtype or other.device != value.device:
            yield [value], [other.to(value)]
        else:
            targets, sources = groups.setdefault((value.dtype, value.device), ([], []))
            targets.append(value)
            sources.append(other)
    yield from groups.values()


def _chain(shares: Sequence[float], first: int = 0) -> tuple[int, list[tuple[int, float]]]:
    """A mean as a chain of lerps, which leaves equal sets as they are: where it starts, then set and weight of each.

    It starts with ``first`` if that has a share, so that the result may take the place of that set.
    """
    order = [i for i in (first, *range(first), *range(first + 1, len(shares))) if shares[i]]
    total = shares[order[0]]
    chain = []
    for i in order[1:]:
        total += shares[i]
        chain.append((i, shares[i] / total))
    return order[0], chain


def _mean_into(target: Tensor, pieces: Sequence[Tensor], start: int, chain: Sequence[tuple[int, float]]) -> None:
    mean = pieces[start] if pieces[start].dtype == target.dtype else pieces[start].to(target.dtype)
    if not chain:
        target.copy_(mean)
    for i, weight in chain:
        piece = pieces[i] if pieces[i].dtype == target.dtype else pieces[i].to(target.dtype)
        mean = torch.lerp(mean, piece, weight, out=target)


def _pieces(sets: Sequence[Mapping[str, Tensor]]) -> Iterator[list[Tensor]]:
    """The same part of every set, one after the other: what is read stays in a cache until it is written."""
    for name, first in sets[0].items():
        flat = [_flat(tensors[name]) for tensors in sets]
        if first.device.type != "cpu" or any(t.dim() != 1 for t in flat):
            yield flat
        else:
            yield from map(list, zip(*(torch.split(t, _CHUNK) for t in flat), strict=True))


def _flat(tensor: Tensor) -> Tensor:
    """The numbers in the order they have in memory, if they are dense; else the tensor as it is."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return tensor


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are in its storage as its dtype says, here or in parts."""
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    (part,) = local({"": tensor}).values()
    return type(part.data) is Tensor


def _part(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local()  # differentiable, and fast without gradients: callers turn them off, once for all
    return part
