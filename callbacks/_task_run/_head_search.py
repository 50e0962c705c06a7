"""Which parameters are the head: those that are named, those of earlier tasks, or those that make the logits."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge.callbacks._lightning._batch_copies import BatchCopy
from lightning_merge.callbacks._lightning._user_step import (
    WAYS,
    Way,
    first_way_that_runs,
    names_in_eval,
    outside_training,
    running,
    takes_iterator,
    training_step,
)
from lightning_merge.callbacks._task_run._heads import Head
from lightning_merge.continual import head_parameters
from lightning_merge.continual._heads import is_used_elsewhere
from lightning_merge.continual._last_layers import LastLayer, LossGraph

_ADAPTED = re.compile(r"\.(base_layer|lora_[AB]\.\w+)$")


@final
class HeadSearch:
    """Looks at what the first loss of a fit is made of.

    Args:
        head: What is known before; ``None`` if nothing is.
        is_named: Whether the user has named it.
        is_of_earlier_tasks: Whether earlier tasks have settled it.
        title: What messages call the callback.
        others: What becomes of the other parameters, in a word.

    Attributes:
        graphs: Of the losses seen so far.
        is_tried: Whether the step was tried before it trained.
    """

    def __init__(
        self,
        head: Head | None,
        is_named: bool = False,
        is_of_earlier_tasks: bool = False,
        title: str = "ContinualMerging",
        others: str = "merged",
    ) -> None:
        self._title, self._others = title, others
        self._head = head
        self._is_named = is_named
        self._is_of_earlier_tasks = is_of_earlier_tasks
        self.graphs: list[LossGraph] = []
        self.is_tried = False

    def attempt(self, trainer: Any, module: LightningModule, batch: Any) -> bool:
        """Runs the user's step on a copy of a batch, outside training; whether that gave a loss, in all processes."""
        self.is_tried = True
        if not module.automatic_optimization or takes_iterator(module):
            return False
        in_eval = names_in_eval(module)
        trained = [(p, p.requires_grad) for p in weights.named_parameters(module).values() if p.is_floating_point()]

        def run(way: Way) -> bool:
            copy = BatchCopy.of(batch).on(trainer.strategy.root_device)
            with outside_training(trainer, module), running(trainer, module, way, in_eval):
                for parameter, _ in trained:
                    parameter.requires_grad_()  # a frozen head makes the logits too
                output: Any = training_step(module, copy)
                self.graphs = [_graph(output["loss"] if isinstance(output, dict) else output, module)]
            return True

        try:
            found = first_way_that_runs(tuple(way for way in WAYS if way.gradients), run)
        finally:
            for parameter, requires in trained:
                parameter.requires_grad_(requires)
        if isinstance(found, Exception):
            self.graphs = []
        return not isinstance(found, Exception)

    def look(self, module: LightningModule, loss: Tensor) -> None:
        """Takes in a loss of training itself, where the step cannot be tried."""
        self.graphs.append(_graph(loss, module))

    def settled(self, module: LightningModule, mode: Any, needs_early: str, classes: Sequence[int] | None) -> Head:
        """The head.

        Args:
            module: The module.
            mode: What a task makes of it.
            needs_early: Why it had to be known before training, in words; empty if it had not.
            classes: Of the task, if they have rows of their own.

        Raises:
            ValueError: If one cannot tell which parameters it is, it is other than what was taken for it before, or the
                classes have no rows in it.
        """
        layers = [layer for graph in self.graphs for layer in graph.layers]
        layers = [layer for layer in layers if not is_used_elsewhere(module, layer.names)]
        logits = [layer for layer in layers if layer.makes_logits]
        if self._is_named and self._head is not None:
            head = self._head
        else:
            head = self._found(module, mode, needs_early, logits or layers)
        if mode != "grow" or classes is None or not head.names:
            return head
        if len(classes) == 1 and any(graph.choices == 1 for graph in self.graphs):
            rank_zero_info(
                f"`classes` should be at least two for this loss, got {list(classes)}: the cross-entropy among one"
                " class is 0 and trains nothing but weight decay. Give a task more classes, or a loss that knows"
                " others."
            )
        after = {name for graph in self.graphs for name in graph.after_logits}
        choices = min((graph.choices for graph in self.graphs if graph.choices is not None), default=0)
        return replace(head, by_class=_rows(module, head, logits or layers, after, classes, choices))

    def _found(self, module: LightningModule, mode: Any, needs_early: str, last: list[LastLayer]) -> Head:
        if not last:
            return self._head or Head(guessed_head(module, any(graph.used for graph in self.graphs), self._title), mode)
        owners = _owners(module, last)
        if needs_early:  # a layer that an adapter was put on is called as the user calls it
            owners = list(dict.fromkeys(_ADAPTED.sub("", owner) for owner in owners))
        if len(owners) > 1:
            if self._head is not None and self._is_of_earlier_tasks:
                return self._head
            first = [f"{owner}.*" for owner in owners]
            raise ValueError(
                f"{self._title} cannot tell which layer is the head: the loss is taken of what"
                f" {' and '.join(f'`{owner}`' for owner in owners)} make. Name the head's parameters with `head=`, as"
                f" `head={first[0]!r}` for one or `head={first!r}` for all; the others are {self._others},"
                f" and with `head=[]` all are."
            )
        names = self._parameters(module, last)
        if self._head is None or set(names) & set(self._head.names):
            return self._head or Head(names, mode)
        owner = owners[0]
        if self._is_of_earlier_tasks:
            raise ValueError(
                f"the logits of this task come from `{owner}`, and the head of the earlier tasks is"
                f" {self._head.names or 'none'}. For a head for each task name all of them with `head=`, from the first"
                " task on in a new `bank`."
            )
        raise ValueError(
            f"the logits come from `{owner}`, and {needs_early}, which took {self._head.names or 'nothing'} for the"
            f" head: pass `head='{owner}.*'`."
        )

    def _parameters(self, module: LightningModule, last: list[LastLayer]) -> list[str]:
        """The whole layers, those beside them in a list of heads, and what comes after them."""
        used = {name for graph in self.graphs for name in graph.used}
        after = [n for graph in self.graphs for n in graph.after_logits] if last[0].makes_logits else []
        chosen = {name for layer in last for name in layer.names} | set(after)
        by_owner = _by_owner(module)
        for layer in last:
            owner = _owner(layer.names[0])
            parent = owner.rpartition(".")[0]
            chosen |= set(by_owner[owner]) if _is_leaf(module, owner) else set()
            if isinstance(_module_at(module, parent), nn.ModuleList | nn.ModuleDict):
                chosen |= {name for name in weights.named_parameters(module) if _is_beside(name, parent, used)}
        return [name for name in weights.named_parameters(module) if name in chosen]


def guessed_head(module: nn.Module, is_seen: bool = False, title: str = "ContinualMerging") -> list[str]:
    """The last linear layer by definition, for want of a loss to look at.

    Args:
        module: The module.
        is_seen: Whether a loss was looked at that is made of no layer: then what comes after is no layer either.
        title: What messages call the callback.

    Raises:
        ValueError: If other parameters come after it.
    """
    names = head_parameters(module, None, "head")
    everything = list(weights.named_parameters(module))
    if names and not is_seen and (later := everything[everything.index(names[-1]) + 1 :]):
        owner = _owner(names[0])
        raise ValueError(
            f"{title} cannot tell which layer is the head: after `{owner}`, the last `nn.Linear`, the module"
            f" has `{later[-1]}`. Name the head's parameters with `head=`, as `head='{owner}.*'`, or `head=[]` if there"
            " is none."
        )
    return names


def _graph(loss: Any, module: LightningModule) -> LossGraph:
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        raise ValueError(f"`training_step` gave no loss with a gradient, but {type(loss).__name__}")
    with torch.no_grad():
        return LossGraph(loss, weights.named_parameters(module))


def _rows(
    module: nn.Module, head: Head, layers: list[LastLayer], after: set[str], classes: Sequence[int], choices: int
) -> tuple[str, ...]:
    """The names of the head that have a row for each class, be it a number for each as of a norm that comes after.

    Raises:
        ValueError: If there are none.
    """
    live = weights.named_parameters(module)
    traced = [layer for layer in layers if set(layer.names) & set(head.names)]
    if columns := [layer for layer in traced if not layer.has_rows]:
        raise ValueError(
            f"`heads='grow'` keeps rows of the head, and classes are columns of `{columns[0].names[0]}`: make it an"
            " `nn.Linear`, choose `heads='per_task'`, or give data without `classes`."
        )
    matrices = [name for name in head.names if live[name].dim() >= 2]
    if traced:
        owners = {_owner(layer.names[0]) for layer in traced}
        matrices = [name for name in matrices if _owner(name) in owners]
    else:
        matrices = [name for name in matrices if len(live[name]) > max(classes)] or matrices
    rows = min((len(live[name]) for name in matrices), default=0)
    if max(classes) >= rows:
        shapes = ", ".join(f"`{name}` {tuple(live[name].shape)}" for name in matrices or head.names)
        raise ValueError(
            f"`classes` must be rows of the head, in [0, {rows}), got {max(classes)}: the head is {shapes}. Grow it"
            " first (`grow_head`), name another with `head=`, choose `heads='per_task'`, or give data without"
            " `classes`."
        )
    if traced and traced[0].makes_logits and choices > max(len(live[name]) for name in matrices):
        raise ValueError(
            f"`heads='grow'` keeps rows of one head, and the loss chooses among {choices} classes, which"
            f" {' and '.join(f'`{name}`' for name in matrices[:4])} make together: make it one `nn.Linear`, choose"
            " `heads='per_task'`, or give data without `classes`."
        )
    owners = {_owner(name) for name in matrices}
    lengths = {len(live[name]) for name in matrices}
    return tuple(
        name
        for name in head.names
        if (_owner(name) in owners or name in after) and live[name].dim() and len(live[name]) in lengths
    )


def _owner(name: str) -> str:
    """The path of the layer of a parameter, for one under a parametrisation the layer that has it."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _by_owner(module: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in weights.named_parameters(module):
        found.setdefault(_owner(name), []).append(name)
    return found


def _owners(module: nn.Module, layers: list[LastLayer]) -> list[str]:
    """Where the layers are; one place for all in a list of heads."""
    found = list(dict.fromkeys(_owner(layer.names[0]) or layer.names[0] for layer in layers))
    parents = {owner.rpartition(".")[0] for owner in found}
    if len(found) > 1 and len(parents) == 1:
        (parent,) = parents
        if isinstance(_module_at(module, parent), nn.ModuleList | nn.ModuleDict):
            return [parent]
    return found


def _module_at(module: nn.Module, path: str) -> nn.Module | None:
    return next((each for name, each in weights.submodules(module) if path and weights.canonical(name) == path), None)


def _is_leaf(module: nn.Module, path: str) -> bool:
    owner = _module_at(module, path)
    inner = [] if owner is None else [weights.canonical(name) for name, _ in owner.named_parameters()]
    return owner is not None and all("." not in name or name.startswith("parametrizations.") for name in inner)


def _is_beside(name: str, parent: str, used: set[str]) -> bool:
    return name.startswith(f"{parent}.") and name not in used
