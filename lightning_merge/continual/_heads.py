"""Heads: what a classifier's last layer needs when classes come in tasks."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_merge._checks import instance, number, sequence, text, whole
from lightning_merge._checks import names as checked_names
from lightning_merge._mergeable import named
from lightning_merge.weights import Inventory, Weights, canonical, named_parameters, submodules


def only(logits: Tensor, classes: Sequence[int] | None) -> Tensor:
    """The logits with those of other classes at ``-inf``, so that softmax and argmax choose among ``classes``.

    Args:
        logits: Of shape (N, C).
        classes: Which columns stay; ``None`` for all.

    Raises:
        ValueError: If a class has no column.

    Example:
        >>> only(torch.tensor([[1.0, 3.0, 2.0]]), classes=(0, 2))
        tensor([[1., -inf, 2.]])
    """
    instance("logits", logits, Tensor, "a tensor")
    if classes is None:
        return logits
    classes = checked_classes(classes)
    if not 0 <= min(classes) <= max(classes) < logits.shape[1]:
        raise ValueError(
            f"`classes` must be in [0, {logits.shape[1]}), the logits of the head, got {list(classes)}. Grow the head"
            " first: `grow_head(head, classes)`."
        )
    masked = torch.full_like(logits, -torch.inf)
    index = torch.as_tensor(classes, device=logits.device)
    return masked.index_copy(1, index, logits.index_select(1, index))


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, classes: Sequence[int] | None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy among the classes of the current task: no other class's logit gets a gradient.

    Over all classes, every sample of the current task would push the logits of all earlier classes down, and a model
    without their samples has nothing to push back.

    Args:
        logits: Of shape (N, C).
        labels: Of shape (N,); each is among ``classes``.
        classes: Those of the current task; ``None`` for all.
        label_smoothing: Share of the target spread evenly over ``classes``, in [0, 1).

    Example:
        >>> masked_cross_entropy(torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([2]), classes=(0, 2))
        tensor(0.6931)
    """
    instance("logits", logits, Tensor, "a tensor")
    instance("labels", labels, Tensor, "a tensor")
    label_smoothing = number("label_smoothing", label_smoothing, "[0, 1)")
    if classes is None:
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)
    classes = checked_classes(classes)
    # The columns themselves rather than -inf in the others, whose share of the smoothed target would be infinite.
    return cross_entropy(
        logits[:, torch.as_tensor(classes, device=logits.device)],
        remapped(labels, classes),
        label_smoothing=label_smoothing,
    )


def remapped(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Labels as places in ``classes``: what a head with one output per class of the task is trained on.

    Args:
        labels: Class numbers, of any shape.
        classes: The classes in the order of the head's outputs.

    Raises:
        ValueError: If a label is not among them.

    Example:
        >>> remapped(torch.tensor([7, 3, 7]), classes=(3, 7))
        tensor([1, 0, 1])
    """
    instance("labels", labels, Tensor, "a tensor")
    classes = checked_classes(classes)
    order = torch.as_tensor(classes, device=labels.device)
    matches = labels.unsqueeze(-1) == order
    if not bool(matches.any(-1).all()):
        other = labels[~matches.any(-1)].flatten()[0].item()
        raise ValueError(f"`labels` must be among the classes of the task, {list(classes)}, got {other}.")
    return matches.long().argmax(-1)


def grow_head(head: nn.Linear, num_classes: int) -> nn.Linear:
    """A layer with ``num_classes`` outputs: the rows of ``head``, then fresh ones as ``nn.Linear`` makes them.

    Args:
        head: The last layer.
        num_classes: At least the outputs it has.

    Raises:
        ValueError: If it has more.

    Example:
        >>> old = nn.Linear(3, 2)
        >>> new = grow_head(old, 5)
        >>> new.weight.shape, torch.equal(new.weight[:2], old.weight)
        (torch.Size([5, 3]), True)
    """
    instance("head", head, nn.Linear, "an `nn.Linear`")
    num_classes = whole("num_classes", num_classes, most=10**8)
    if num_classes < head.out_features:
        raise ValueError(f"`num_classes` must be at least {head.out_features}, what the head has, got {num_classes}.")
    grown = nn.Linear(
        head.in_features, num_classes, head.bias is not None, device=head.weight.device, dtype=head.weight.dtype
    )
    with torch.no_grad():
        grown.weight[: head.out_features] = head.weight
        if head.bias is not None:
            grown.bias[: head.out_features] = head.bias
    return grown


def head_parameters(module: nn.Module, patterns: Sequence[str] | None, argument: str = "patterns") -> list[str]:
    """Canonical names of the head's parameters: what the patterns match, or those of the last ``nn.Linear``.

    Args:
        module: The whole module.
        patterns: Globs over parameter names; ``None`` to look for the last linear layer, in the order of definition,
            unless its weight is used elsewhere too, as by a tied embedding.
        argument: What to call them in messages.

    Raises:
        ValueError: If a pattern matches nothing.

    Example:
        >>> head_parameters(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)), None)
        ['2.weight', '2.bias']
    """
    instance("module", module, nn.Module, "a module")
    text("argument", argument)
    parameters = named_parameters(module)
    if patterns is None:
        linear: dict[nn.Module, str] = {}  # a layer under several names counts by its first, as its parameters do
        for name, layer in submodules(module):
            if isinstance(layer, nn.Linear):
                linear.setdefault(layer, name)
        path = f"{canonical(list(linear.values())[-1])}.".lstrip(".") if linear else None
        own = [name for name in parameters if path is not None and name.startswith(path)]
        has_matrix = any(parameters[name].dim() > 1 for name in own)
        return own if has_matrix and not is_used_elsewhere(module, own) else []
    for pattern in (patterns := checked_names(argument, patterns)):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            some = ", ".join(list(parameters)[-4:])
            raise ValueError(
                f"`{argument}` must match parameters, got {pattern!r}, which matches none; the last are: {some}."
            )
    return [name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_used_elsewhere(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a parameter is of several layers, or of one that comes more than once in a sequence.

    A layer that is only registered twice, as ``self.head`` and in ``self.net = nn.Sequential(body, head)``, is one.

    Args:
        module: The whole module.
        names: Canonical names of parameters.
    """
    inventory = Inventory(module)
    paths: dict[str, list[nn.Module]] = {}
    for name, layer in submodules(module):
        paths[canonical(name)] = [*paths.get(canonical(name.rpartition(".")[0]), [module]), layer]
    for name in names:
        if len(every := inventory.names_of(name)) > 1:
            routes = [paths.get(each.rpartition(".")[0], []) for each in every]
            if len({route[-1] if route else None for route in routes}) > 1 or any(map(_comes_again, routes)):
                return True
    return False


def _comes_again(route: Sequence[nn.Module]) -> bool:
    """Whether a sequence on the way has what comes next more than once."""
    return any(
        isinstance(parent, nn.Sequential | nn.ModuleList) and sum(child is each for each in parent) > 1
        for parent, child in pairwise(route)
    )


def checked_classes(classes: object, argument: str = "classes") -> list[int]:
    """Class numbers, at least one."""
    if isinstance(classes, Tensor):
        classes = classes.tolist()
    found = [whole(argument, each) for each in sequence(argument, classes, "class numbers")]
    if not found:
        raise ValueError(f"`{argument}` must hold at least one class, got none.")
    return found


@torch.no_grad()
def join_head(trained: Weights, before: Weights, classes: Sequence[int] | None) -> Weights:
    """The head after a task: rows of the task's classes as trained, all others as they were before it.

    Rows that were not there before stay as trained, and so does what has no rows: a temperature, say.

    Args:
        trained: The head's parameters now, one row per class.
        before: Those when the task began; it may have had fewer rows.
        classes: Of the task; ``None`` keeps all rows as trained.

    Example:
        >>> join_head({"w": torch.tensor([5.0, 6.0, 7.0])}, {"w": torch.tensor([1.0, 2.0])}, classes=(1,))
        {'w': tensor([1., 6., 7.])}
    """
    named("trained", trained)
    named("before", before)
    joined = {name: tensor.detach().clone() for name, tensor in trained.items()}
    if classes is not None:
        classes = checked_classes(classes)
        for name, old in before.items():
            if not old.dim() or name not in joined:
                continue
            others = [row for row in range(len(old)) if row not in classes]
            joined[name][others] = old[others].to(joined[name])
    return joined
