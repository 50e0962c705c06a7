"""Task vectors: what training added to a base, and arithmetic on them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge._checks import number
from lightning_merge._mergeable import named, why_not
from lightning_merge.weights import Weights, average_dtype, first_mismatch, is_sharded, nonfinite


@torch.no_grad()
def task_vector(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Weights:
    """``weights - base`` in float32 (wider if they are), without the integer tensors, which no sum can merge.

    Infinities that both have in the same places, as in masks of attention, differ by 0.

    Args:
        weights: What training ended with.
        base: What the tasks have in common, same names and shapes.

    Raises:
        TypeError: If an argument is not named tensors.
        ValueError: If names or shapes differ, the difference holds a NaN or an infinity, or a tensor holds complex
            numbers or what only looks like numbers (8-bit floats, tensors of a class of its own); the first is named.

    Example:
        >>> import torch
        >>> task_vector({"w": torch.tensor([1.5, 2.0])}, base={"w": torch.tensor([1.0, 2.0])})
        {'w': tensor([0.5000, 0.0000])}
    """
    named("weights", weights)
    named("base", base)
    if (difference := first_mismatch(base, weights)) is not None:
        raise ValueError(f"the weights are not those of the base: {difference}.")
    for argument, tensors in (("weights", weights), ("base", base)):
        refuse_unfit(tensors, f"of `{argument}`")
    vector = {
        name: tensor.detach().to(average_dtype(tensor)) - base[name].detach().to(tensor.device, average_dtype(tensor))
        for name, tensor in weights.items()
        if tensor.is_floating_point()
    }
    mended = {name: _without_constants(vector[name], weights[name], base[name]) for name in nonfinite(vector)}
    vector |= mended
    if damaged := nonfinite(mended):
        first = next(name for name in vector if name in damaged)
        raise ValueError(f"`{first}` holds a NaN or an infinity in the weights or in the base.")
    return vector


def _without_constants(difference: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return difference.masked_fill(one.isinf() & (one == other.to(one)), 0.0)


@torch.no_grad()
def add_vector(base: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> Weights:
    """``base + vector`` in the dtypes and on the devices of the base; tensors without a part in the vector are copied.

    Args:
        base: The weights that the vector was measured against, by name.
        vector: The task vector, for some or all of the base's names.

    Raises:
        TypeError: If an argument is not named tensors.
        ValueError: If the vector has a name that the base has not, or another shape, or the sum is too large for the
            base's type.

    Example:
        >>> import torch
        >>> add_vector({"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}, {"w": torch.tensor([0.5, 0.0])})
        {'w': tensor([1.5000, 2.0000]), 'steps': tensor(7)}
    """
    named("base", base)
    named("vector", vector)
    for name, tensor in vector.items():
        if name not in base or base[name].shape != tensor.shape:
            raise ValueError(f"`{name}` of shape {tuple(tensor.shape)} in the task vector is not in the base.")
    merged = {
        name: (tensor.detach().to(vector[name]) + vector[name].to(tensor.device)).to(tensor)
        if name in vector
        else tensor.detach().clone()
        for name, tensor in base.items()
    }
    for name in nonfinite({name: merged[name] for name in vector}):
        if not nonfinite({"base": base[name], "vector": vector[name]}):
            raise ValueError(f"`{name}` is too large for {base[name].dtype}, the base's type, with the vector added.")
    return merged


def negate(vector: Mapping[str, Tensor], scale: float = 1.0) -> Weights:
    """``-scale * vector``: added to the base, it makes the model worse at that task and leaves others mostly alone.

    Args:
        vector: The task to forget.
        scale: How far, above 0: the largest for which a control task keeps its score.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``scale`` is not a positive number.

    Example:
        >>> import torch
        >>> negate({"w": torch.tensor([0.5, -1.0])}, scale=2.0)
        {'w': tensor([-1.,  2.])}

    References:
        Ilharco et al., "Editing models with task arithmetic", ICLR 2023, section 3.
    """
    named("vector", vector)
    scale = number("scale", scale, "(0, inf)", "a positive number")
    return {name: tensor * -scale for name, tensor in vector.items()}


def analogy(a: Mapping[str, Tensor], b: Mapping[str, Tensor], c: Mapping[str, Tensor]) -> Weights:
    """``c + (b - a)``: a vector for task d, without its data, if "a is to b as c is to d".

    Args:
        a: A task vector.
        b: A task vector of the same names and shapes.
        c: Another one.

    Raises:
        TypeError: If an argument is not named tensors.
        ValueError: If names or shapes differ.

    Example:
        >>> import torch
        >>> analogy(a={"w": torch.tensor([1.0])}, b={"w": torch.tensor([3.0])}, c={"w": torch.tensor([10.0])})
        {'w': tensor([12.])}

    References:
        Ilharco et al., "Editing models with task arithmetic", ICLR 2023, section 5.
    """
    for argument, tensors in (("a", a), ("b", b), ("c", c)):
        named(argument, tensors)
    for other in (b, c):
        if (difference := first_mismatch(a, other)) is not None:
            raise ValueError(f"the task vectors are not of one model: {difference}.")
    return {name: c[name] + (b[name] - a[name]) for name in a}


def check_vector(vector: Weights, expected: Mapping[str, Tensor], task: int | str) -> None:
    """Refuses a vector of other names or shapes than expected, or of anything but whole tensors of real numbers."""
    named("vector", vector)
    if (difference := first_mismatch(expected, vector)) is not None:
        raise ValueError(f"the vector of task {task} does not fit the others: {difference}.")
    for name, tensor in vector.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"`{name}` in the vector of task {task} is {tensor.dtype}; task vectors hold real floating-point"
                " numbers: leave it out (`task_vector` does)."
            )
        if is_sharded(tensor):
            raise ValueError(
                f"`{name}` in the vector of task {task} is sharded (a DTensor), and combiners need whole tensors, to"
                " rank entries and take norms: use `tensor.full_tensor()`."
            )
        if reason := why_not(tensor):
            raise ValueError(f"`{name}` in the vector of task {task} {reason}.")


def refuse_unfit(weights: Mapping[str, Tensor], where: str) -> None:
    """Raises a ``ValueError`` that names the first tensor that no task vector holds, and that is no whole number."""
    for name, tensor in weights.items():
        if tensor.is_complex():
            raise ValueError(
                f"`{name}` {where} holds complex numbers, which have no order and no sign to merge by: leave it out, or"
                " hand in `torch.view_as_real(tensor)`, and `torch.view_as_complex` what comes back."
            )
        if reason := why_not(tensor):
            raise ValueError(f"`{name}` {where} {reason}. Or leave it out.")


def check_finite(vector: Weights, task: int | str) -> None:
    """Refuses a vector with a NaN or an infinity, which would stay in every later merge."""
    if damaged := nonfinite(vector):
        first = next(name for name in vector if name in damaged)
        raise ValueError(f"`{first}` in the vector of task {task} holds a NaN or an infinity: it cannot be merged.")


def checked_vector(argument: str, vector: Mapping[str, Tensor]) -> Weights:
    """A task vector, if it is one: whole tensors of finite real numbers by name. The first that is not is named."""
    checked = dict(named(argument, vector))
    refuse_unfit(checked, f"of `{argument}`")
    for name, tensor in checked.items():
        if not tensor.is_floating_point() or is_sharded(tensor):
            kind = "sharded" if is_sharded(tensor) else tensor.dtype
            raise ValueError(f"`{name}` of `{argument}` must be a whole tensor of floating-point numbers, got {kind}.")
    if damaged := nonfinite(checked):
        raise ValueError(f"`{min(damaged)}` of `{argument}` holds a NaN or an infinity.")
    return checked
