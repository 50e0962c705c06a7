"""A learning-rate schedule."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_merge._checks import instance, whole


class WarmupCosine(LambdaLR):
    """The learning rate rises linearly for ``warmup_epochs``, then falls to 0 along half a cosine.

    timm's ``CosineLRScheduler`` does the same, but Lightning accepts torch's kind of scheduler only.

    Args:
        optimizer: Its rate is the highest one.
        epochs: Length of the run; at least 1.
        warmup_epochs: At least 0. In a run of fewer than twice as many epochs, half of them.
        last_epoch: Completed epochs less 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule, rates = WarmupCosine(optimizer, epochs=6, warmup_epochs=2), []
        >>> for _ in range(7):
        ...     rates.append(round(schedule.get_last_lr()[0], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0]
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warmup_epochs: int = 5, last_epoch: int = -1) -> None:
        instance("optimizer", optimizer, Optimizer, "a torch optimizer")
        epochs, warmup_epochs = whole("epochs", epochs, 1), whole("warmup_epochs", warmup_epochs, 0)
        last_epoch = whole("last_epoch", last_epoch, -1)
        super().__init__(optimizer, partial(_factor, epochs, min(warmup_epochs, epochs // 2)), last_epoch)


def _factor(epochs: int, warmup: int, epoch: int) -> float:
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / (epochs - warmup))))
