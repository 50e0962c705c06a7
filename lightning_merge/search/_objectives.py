"""What coefficients are searched by when a loss has a gradient: entropy without labels, cross entropy with few."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_merge._checks import LISTED, sequence, whole
from lightning_merge._mergeable import several_named
from lightning_merge.search._groups import Per
from lightning_merge.search._loss import Loss
from lightning_merge.search._measured import Measured, Objective
from lightning_merge.search._merged_module import MergedModule
from lightning_merge.search._spaces import Coefficients
from lightning_merge.search._subject import subject_of
from lightning_merge.weights import Weights


class _OnBatches(Objective):
    """The sum over data sets of a loss of ``module`` under ``base + sum of coefficients x vectors``."""

    _labelled: ClassVar[bool]

    def __init__(
        self,
        module: nn.Module,
        base: Mapping[str, Tensor],
        vectors: Sequence[Mapping[str, Tensor]],
        data: Sequence[Iterable[Any]],
        *,
        heads: Sequence[Mapping[str, Tensor]] = (),
        per: Per = "model",
        limit: int = 64,
    ) -> None:
        limit = whole("limit", limit, 1, LISTED)
        self.merged_module = MergedModule(module, base, vectors, per)
        sets = sequence("data", data, "data sets, each batches of one task")
        self._heads = several_named("heads", heads) or [{} for _ in sets]
        if not sets or len(self._heads) != len(sets):
            raise ValueError(f"`heads` must be one for each of the {len(sets)} sets of `data`, got {len(self._heads)}.")
        self._data = [[self._taken(index, batch) for batch in islice(each, limit)] for index, each in enumerate(sets)]
        for index, batches in enumerate(self._data):
            if not batches:
                raise ValueError(f"`data` of task {index} must yield at least one batch, got none.")
        self.merged_module.refuse_unknown("heads", self._heads)
        self._subject: str | None = None

    @property
    def subject(self) -> str:
        if self._subject is None:
            named = [*self.merged_module.parts(), *self._heads]
            batches = [[tensor for batch in each for tensor in batch] for each in self._data]
            self._subject = subject_of(type(self).__name__, named, batches)
        return self._subject

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of what is searched, for ``search(..., tensors=...)``."""
        return self.merged_module.tensors

    def weights(self, coefficients: Sequence[float]) -> Weights:
        """The merged weights.

        Args:
            coefficients: All of a search; counters are those of the base, BatchNorm statistics the mean of the tasks'.

        Raises:
            ValueError: If they are not as many as there are vectors and groups.
        """
        return self.merged_module.weights(coefficients)

    def measure(self, coefficients: Coefficients, number: int) -> Measured:
        found, _, gradient = self.merged_module.slopes(coefficients, self._losses(number))
        value = math.fsum(found) if all(map(math.isfinite, found)) else math.nan
        if math.isnan(value) or not all(map(math.isfinite, gradient)):
            return Measured(math.nan)
        return Measured(value, gradient, tuple(found))

    def under(
        self, coefficients: Sequence[float], mask: Mapping[str, Tensor], number: int
    ) -> tuple[float, Weights, Coefficients]:
        """The loss under a mask of what the vectors add up to, its gradient by weights and that by coefficients."""
        found, of_weights, gradient = self.merged_module.slopes(coefficients, self._losses(number), mask)
        return sum(found), of_weights, gradient

    def _losses(self, number: int) -> list[Loss]:
        losses = []
        for index, (head, batches) in enumerate(zip(self._heads, self._data, strict=True)):
            inputs, *labels = batches[number % len(batches)]
            kinds = ", ".join(
                f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}" for t in (inputs, *labels)
            )
            said = f"`data` of task {index} ({kinds})"
            losses.append(Loss(head, inputs.to, partial(self._of, labels), said))
        return losses

    def _of(self, labels: Sequence[Tensor], outputs: Any) -> Tensor:
        if not isinstance(outputs, Tensor) or outputs.dim() < 2:
            found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(f"`module` must give logits of shape (examples, classes, ...), got {found}.")
        return self._loss(outputs, *labels)

    @abstractmethod
    def _loss(self, logits: Tensor, *labels: Tensor) -> Tensor: ...

    def _taken(self, index: int, batch: Any) -> tuple[Tensor, ...]:
        """What is used of a batch, in host memory."""
        parts = list(batch) if isinstance(batch, tuple | list) else [batch]
        count = 2 if self._labelled else 1
        says = "(inputs, labels)" if self._labelled else "inputs, or begin with them"
        if len(parts) < count or not all(isinstance(part, Tensor) for part in parts[:count]):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"`data` of task {index} must yield tensors, {says}; got {kinds}.")
        if not parts[0].is_floating_point() and parts[0].dim() < 2:
            raise ValueError(
                f"`data` of task {index} must yield {says}; got {str(parts[0].dtype).removeprefix('torch.')} of shape"
                f" {tuple(parts[0].shape)} first, which are labels, not inputs."
            )
        with torch.inference_mode(False):  # of a tensor that was made in it nothing is learned
            return tuple(part.clone() if part.is_inference() else part.detach().cpu() for part in parts[:count])


@final
class Entropy(_OnBatches):
    """``sum over tasks of mean -sum softmax(z) log softmax(z)`` of logits, without labels: AdaMerging's objective.

    Each evaluation takes the next batch of each task, and begins again after the last. With ``Adam``, ``Free(0.0,
    1.0)``, ``mode="min"`` and ``per="model"`` that is task-wise AdaMerging, with ``per="tensor"`` layer-wise.

    Memory: the vectors as they are given (a copy of the weights for each task), two more copies and the gradient of the
    weights, and the batches, in host memory. Time: a forward and a backward pass for each task.

    Args:
        module: Called with the inputs of a batch, gives logits with the classes in dimension 1. Its own weights are
            left alone.
        base: What all tasks were fine-tuned from, under the names of its ``state_dict``.
        vectors: What each task added to it (``task_vector``), of the same names.
        data: For each data set its batches: inputs, or a tuple that begins with them. They have to be the same each
            time a search is continued: no shuffling, or a seeded one.
        heads: For each data set the tensors that are its own, as its last layer; none by default. Shapes may differ.
        per: What shares a coefficient.
        limit: So many batches of each are kept; at least 1.

    Raises:
        TypeError: If an argument is of the wrong type, or a batch holds no tensors.
        ValueError: If vectors are not of the base or of the module, hold a NaN or what has no task vectors (quantised
            weights, factors of LoRA layers), or a batch begins with labels.

    Example:
        >>> from lightning_merge.search import Adam, Free, search
        >>> module = nn.Linear(2, 2, bias=False)
        >>> base = {"weight": torch.zeros(2, 2)}
        >>> vectors = [{"weight": torch.eye(2)}, {"weight": torch.zeros(2, 2)}]
        >>> score = Entropy(module, base, vectors, [[torch.eye(2)]])
        >>> found = search(score, 2, Adam(0.1), space=Free(0.0, 1.0), mode="min", budget=20)
        >>> [round(a, 3) for a in found.coefficients]
        [1.0, 0.3]

    References:
        Yang et al., "AdaMerging: adaptive model merging for multi-task learning", ICLR 2024, equations 4 and 5.
    """

    _labelled = False

    def _loss(self, logits: Tensor, *labels: Tensor) -> Tensor:
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


@final
class CrossEntropy(_OnBatches):
    """``sum over data sets of the mean cross entropy`` of few labelled examples: the objective of aTLAS.

    With ``Adam(start=0.0)``, ``Free(-10.0, 10.0)``, ``mode="min"`` and ``per="tensor"`` that is aTLAS for all tensors,
    biases and norms included. Memory and time as of ``Entropy``.

    Args:
        module: Called with the inputs of a batch, gives logits with the classes in dimension 1. Its own weights are
            left alone.
        base: What all tasks were fine-tuned from, under the names of its ``state_dict``.
        vectors: What each task added to it (``task_vector``), of the same names.
        data: For each data set its batches, each inputs and labels; mostly one data set, of the task that is wanted.
        heads: For each data set the tensors that are its own, as its last layer; none by default. Shapes may differ.
        per: What shares a coefficient.
        limit: So many batches of each are kept; at least 1.

    Raises:
        TypeError: If an argument is of the wrong type, or a batch holds no tensors.
        ValueError: If vectors are not of the base or of the module, hold a NaN or what has no task vectors (quantised
            weights, factors of LoRA layers), or a batch begins with labels.

    Example:
        >>> from lightning_merge.search import Adam, Free, search
        >>> module = nn.Linear(2, 2, bias=False)
        >>> base, vectors = {"weight": torch.zeros(2, 2)}, [{"weight": torch.eye(2)}]
        >>> score = CrossEntropy(module, base, vectors, [[(torch.eye(2), torch.tensor([1, 0]))]])
        >>> found = search(score, 1, Adam(0.1, start=0.0), space="free", mode="min", budget=20)
        >>> round(found.coefficients[0], 3)
        -1.0

    References:
        Zhang et al., "Knowledge composition using task vectors with learned anisotropic scaling" (aTLAS), NeurIPS 2024.
    """

    _labelled = True

    def _loss(self, logits: Tensor, *labels: Tensor) -> Tensor:
        labels_ = labels[0].to(logits.device)
        return cross_entropy(logits, labels_ if labels_.is_floating_point() else labels_.long())
