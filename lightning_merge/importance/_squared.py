"""Squared gradients of the loss of single samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge._ranks import gathered
from lightning_merge.importance._samples import Samples
from lightning_merge.weights import Weights


@dataclass
class Squared:
    """Squared gradients, and how they came about.

    Attributes:
        means: Their mean over the samples of all processes, by name.
        samples: How many those are.
        left_out: Samples of this process that gave none.
        first: Why the first of them did not.
    """

    means: Weights
    samples: int = 0
    left_out: int = 0
    first: Exception | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Whatever is raised in the block leaves a sample out: what is trained is not lost over it."""
        try:
            yield
        except Exception as error:  # whatever the user's step raises
            self.left_out += 1
            self.first = self.first or error


def squared_gradients(
    held: Mapping[str, Tensor],
    batches: Iterable[Callable[[], Any]],
    loss: Callable[[Any], Tensor],
    samples: int,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Squared:
    """The mean over the samples of all processes, all of which call it, of squared gradients of their loss.

    A backward pass per sample: the square of the gradient of a mean depends on how many samples it is of.

    Args:
        held: The parameters whose gradients are asked for.
        batches: What makes the batches. They are cut into samples.
        loss: The loss of a batch of one sample.
        samples: At most so many in this process; at least 1.
        within: Around the loss and the gradients of each sample.
    """
    found = Squared(weights.zeros(held))
    for make in batches:
        if found.samples >= samples:
            break
        with found.counted():
            singles = Samples(make())
            for index in range(min(singles.count, samples - found.samples)):
                with found.counted(), within():
                    gradients = torch.autograd.grad(loss(singles[index]), list(held.values()), allow_unused=True)
                    refuse_not_finite(gradients)
                    for square, gradient in zip(found.means.values(), gradients, strict=True):
                        if gradient is not None:
                            square.addcmul_(gradient.to(square), gradient.to(square))
                    found.samples += 1
    found.samples = mean_by_count_(found.means, found.samples)
    return found


def mean_by_count_(sums: Weights, count: int) -> int:
    """Divides sums of each process by the count of all; returns that. All processes must call this."""
    counts = gathered(count)
    for name, tensor in sums.items():  # one at a time: each is copied in float64
        weights.mean_over_ranks_({name: tensor})
        tensor /= max(1, sum(counts)) / len(counts)
    return sum(counts)


def refuse_not_finite(gradients: Iterable[Tensor | None]) -> None:
    """Raises if a gradient holds a NaN or an infinity.

    Raises:
        ValueError: If so.
    """
    if weights.nonfinite({str(at): each for at, each in enumerate(gradients) if each is not None}):
        raise ValueError(
            "the gradient of a sample's loss holds a NaN or an infinity: the loss may need several samples"
        )
