"""Which layers make what a loss is taken of, read off the graph that autograd keeps of it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

# Operations whose outputs sum over what they take: matrix products, convolutions, distances, look-ups.
_SUMS = re.compile(r"([mM]m|[mM]v|Dot|Conv\w*|[lL]inear|[dD]ist|Embedding\w*|Rnn\w*|Attention\w*)Backward")
_TAKES_LOGITS = re.compile(r"Softmax|NllLoss|BinaryCrossEntropy|Logsumexp|LogSigmoid|Margin")
_LEAF = "AccumulateGrad"


@final
@dataclass(frozen=True)
class LastLayer:
    """A layer with none after it on the way to the loss.

    Attributes:
        names: Its parameters.
        makes_logits: Whether a softmax or a loss of classes takes what it makes.
        has_rows: Whether an output is a row of its weight, as of ``nn.Linear`` and convolutions; else it is a column,
            as of transposed convolutions.
    """

    names: tuple[str, ...]
    makes_logits: bool
    has_rows: bool


@final
class LossGraph:
    """The graph of a loss, as it is before ``backward``.

    Args:
        loss: What ``backward`` would be called on.
        parameters: By name; those that are in no graph are not seen.

    Attributes:
        used: Names of the parameters that the loss depends on.
        layers: The layers closest to the loss, each once.
        after_logits: Names of parameters between the layers that make logits and what takes these: a temperature, say.
        choices: The fewest classes that a softmax on the way chooses among; ``None`` without one.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> loss = torch.nn.functional.cross_entropy(net(torch.ones(1, 2)), torch.tensor([1]))
        >>> LossGraph(loss, dict(net.named_parameters())).layers
        [LastLayer(names=('2.weight',), makes_logits=True, has_rows=True)]
    """

    def __init__(self, loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._dimensions = {name: parameter.dim() for name, parameter in parameters.items()}
        root: Any = loss.grad_fn
        self._sums_below: dict[Any, bool] = {}
        self.used: set[str] = set()
        self.layers: list[LastLayer] = []
        self.after_logits: list[str] = []
        self.choices: int | None = None
        if root is not None:
            self._look_below(root)
            self._search(root)

    def _look_below(self, root: Any) -> None:
        """Finds out of each operation whether it, or one that leads to it, sums."""
        stack = [(root, False)]
        while stack:
            node, is_done = stack.pop()
            if is_done:
                below = (self._sums_below[child] for child in _children(node))
                self._sums_below[node] = self._sums(node) or any(below)
            elif node not in self._sums_below:
                self._sums_below[node] = False
                if (name := self._name_of(node)) is not None:
                    self.used.add(name)
                stack.append((node, True))
                stack.extend((child, False) for child in _children(node) if child not in self._sums_below)

    def _search(self, root: Any) -> None:
        """Walks from the loss to the first operation on every way that sums over a parameter."""
        stack, seen = [(root, False)], set()
        while stack:
            node, is_logits = stack.pop()
            if (node, is_logits) in seen:
                continue
            seen.add((node, is_logits))
            if is_logits and (name := self._name_of(node)) is not None and name not in self.after_logits:
                self.after_logits.append(name)
            if not self._sums(node):
                self._count_choices(node)
                is_logits = is_logits or _TAKES_LOGITS.search(node.name()) is not None
            elif (found := self._layer(node, is_logits)) is not None:
                self._add(found)
                continue
            else:
                is_logits = False  # similarities of features, say: what it takes are no logits
            stack.extend((child, is_logits) for child in reversed(list(_children(node))))

    def _count_choices(self, node: Any) -> None:
        if (
            "LogSoftmax" in node.name()
            and (result := getattr(node, "_saved_result", None)) is not None
            and result.dim()
        ):
            # The dimension is saved as a number without a sign.
            place = int(getattr(node, "_saved_dim", 1))
            number = result.shape[place if place < result.dim() else place - 2**64]
            self.choices = number if self.choices is None else min(self.choices, number)

    def _layer(self, node: Any, is_logits: bool) -> LastLayer | None:
        """The layer that an operation is, if it sums over a parameter or over what is made of one."""
        takes = [(place, child) for place, (child, _) in enumerate(node.next_functions) if child is not None]
        plain = [each for each in takes if not self._sums_below[each[1]]]
        computed = [each for each in takes if self._sums_below[each[1]] and _is_computed(self._leaves(each[1]))]
        for place, child in plain + computed[-1:]:  # an activation comes before the weight
            names = sorted(self._leaves(child), key=list(self._dimensions).index)
            if any(self._dimensions[name] >= 2 for name in names):
                # `x @ weight` takes the parameter itself, `nn.Linear` its transpose.
                transposed = (
                    place == len(node.next_functions) - 1
                    and "mm" in node.name().lower()
                    and child.name().endswith(_LEAF)
                ) or bool(getattr(node, "_saved_transposed", False))
                return LastLayer(tuple(names), is_logits, not transposed)
        return None

    def _leaves(self, node: Any) -> Iterable[str]:
        found, stack, seen = set(), [node], set()
        while stack:
            each = stack.pop()
            if each not in seen:
                seen.add(each)
                if (name := self._name_of(each)) is not None:
                    found.add(name)
                stack.extend(_children(each))
        return found

    def _add(self, found: LastLayer) -> None:
        for number, layer in enumerate(self.layers):
            if layer.names == found.names:
                if found.makes_logits and not layer.makes_logits:
                    self.layers[number] = found
                return
        self.layers.append(found)

    @staticmethod
    def _sums(node: Any) -> bool:
        # What a function of the user's own does is not known.
        return _SUMS.search(node.name()) is not None or isinstance(node, BackwardCFunction)

    def _name_of(self, node: Any) -> str | None:
        return self._names.get(id(node.variable)) if node.name().endswith(_LEAF) else None


def _is_computed(names: Iterable[str]) -> bool:
    """Whether all of it is what weights are computed from, be it by sums as spectral norm's."""
    return all(".parametrizations.weight." in name or name.endswith("weight_orig") for name in names)


def _children(node: Any) -> Iterator[Any]:
    return (child for child, _ in node.next_functions if child is not None)
