"""What a merge takes in, what it carries along, and what it refuses by name: one answer for all of the library.

Merged is what ``weights.is_averaged``: plain floating-point and complex numbers. Carried along, as one model has it,
are counters: single whole numbers, and those of 64 bits. All else only looks like numbers: tensors of a class of their
own, 8-bit floats, whose scale is another tensor, and shorter whole numbers and flags, which are quantised weights,
packed codes or masks. That may stay as it is where it is the same everywhere; so may infinities, of which masks of
attention are made.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_merge._checks import instance, sequence
from lightning_merge.weights import is_averaged, is_sharded

_FACTORS = re.compile(r"lora_(?:embedding_)?(A|a|down)(?=\.|_|$)")
_PARTNERS = {"A": "B", "a": "b", "down": "up"}


def named(argument: str, value: Any) -> Mapping[str, Tensor]:
    """The value, if it is named tensors.

    Raises:
        TypeError: If it is not.
    """
    instance(argument, value, Mapping, "named tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"`{argument}` must be named tensors, got {type(tensor).__name__} under {name!r}.")
    return value  # type: ignore[no-any-return]


def several_named(argument: str, values: Any) -> list[Mapping[str, Tensor]]:
    """The models, if each is named tensors.

    Raises:
        TypeError: If one is not.
    """
    return [named(argument, each) for each in sequence(argument, values, "models, each as named tensors")]


def why_not(tensor: Tensor) -> str | None:
    """What it is and what to do, in words, of a tensor that only looks like numbers; ``None`` of any other."""
    if tensor.is_meta:
        return "is on the meta device, where tensors have no values: load them first"
    if is_averaged(tensor) and tensor.layout is not torch.strided:
        return f"is laid out as {tensor.layout}: hand in `tensor.to_dense()`"
    if is_averaged(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.dtype.itemsize == 1 and (type(tensor.data) is Tensor or is_sharded(tensor)):
        return f"is {tensor.dtype}, whose scale is in another tensor: convert it to a wider type, scale applied"
    return (
        f"is a {type(tensor).__name__}, a class of its own whose numbers need not be what they look like: hand in a"
        " plain tensor (`tensor.as_subclass(torch.Tensor)`, or what dequantises it)"
    )


def refuse_without_values(argument: str, models: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises a ``ValueError`` that names the first tensor that has no values to merge, or is not laid out densely."""
    for i, model in enumerate(models, 1):
        for name, tensor in model.items():
            if is_averaged(tensor) and (reason := why_not(tensor)):
                raise ValueError(f"`{name}` of model {i} of `{argument}` {reason}.")


def carried(name: str, tensors: Iterable[Tensor], differing: list[str] | None = None) -> Tensor:
    """A copy of the last of the tensors of one name, none of which is merged.

    Args:
        name: Theirs.
        tensors: Of all models; two at a time are held.
        differing: Gets the name if these are counters that differ, unless it is a single number that counts.

    Raises:
        ValueError: If they differ, and are no counters.
    """
    waiting = iter(tensors)
    last, differs = next(waiting), False
    for tensor in waiting:
        differs = differs or not _same(last, tensor)
        last = tensor
    if differs and not is_counter(last):
        reason = why_not(last) or (
            f"holds whole numbers or flags ({str(last.dtype).removeprefix('torch.')}), as quantised weights, packed"
            " codes and masks do, of which there is no mean: convert it to floating point first, scale applied"
        )
        raise ValueError(f"`{name}` {reason}. It may stay as it is only where it is the same in all models.")
    if differs and differing is not None and not (last.numel() == 1 and last.dtype.itemsize == 8):
        differing.append(name)
    return last.clone()


def is_counter(tensor: Tensor) -> bool:
    """Whether it may be that of one model beside means of the others: a single whole number or flag, or of 64 bits."""
    whole = not (tensor.is_floating_point() or tensor.is_complex()) and why_not(tensor) is None
    return whole and (tensor.numel() <= 1 or tensor.dtype in (torch.int64, torch.uint64))


def refuse_lora_factors(names: Iterable[str], count: int, tensor: Callable[[int, str], Tensor]) -> None:
    """Raises a ``ValueError`` if both factors of a LoRA layer differ between models.

    The mean of their products is not the product of their means; where one factor is shared it is.

    Args:
        names: Of the tensors.
        count: How many models are merged.
        tensor: That of a model, by its place and a name.
    """
    for name, partner in lora_factors(names):
        differ = [any(not _same(tensor(0, each), tensor(i, each)) for i in range(1, count)) for each in (name, partner)]
        if all(differ):
            raise ValueError(
                f"`{name}` and `{partner}` are factors of a LoRA layer, and the mean of products is not the product of"
                " means. Merge the adapters into the weights of each model first (peft: `merge_and_unload()`), or hand"
                " in their products."
            )


def lora_factors(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of both factors of each LoRA layer: what is applied first, and what comes after it."""
    known = dict.fromkeys(names)
    pairs = [
        (name, _FACTORS.sub(lambda found: found[0][: -len(found[1])] + _PARTNERS[found[1]], name)) for name in known
    ]
    return [(name, partner) for name, partner in pairs if partner != name and partner in known]


def weight_of_factor(first: str) -> str:
    """The name of the weight that a LoRA layer adds to, from that of its first factor."""
    found = _FACTORS.search(first)
    return first if found is None else f"{first[: found.start()]}weight"


def refuse_lora_in(models: Sequence[Mapping[str, Tensor]]) -> None:
    """``refuse_lora_factors`` of models in memory."""
    if models:
        refuse_lora_factors(models[0], len(models), lambda index, name: models[index][name])


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    try:
        if a.dtype.itemsize == 1 and a.is_floating_point():
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        return bool(torch.equal(a, b.to(a.device)))
    except (RuntimeError, NotImplementedError, TypeError):  # a class that compares nothing
        return False


def put_constants(merged: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Puts infinities that all inputs have in the same places, as masks of attention have them, into their merge.

    Returns:
        Whether every other number of the merge is finite.
    """
    first = inputs[0].to(merged)
    constant = first.isinf()
    for other in inputs[1:]:
        constant = constant & (other.to(merged) == first)
    merged.copy_(torch.where(constant, first, merged))
    return bool((merged.isfinite() | constant).all())
