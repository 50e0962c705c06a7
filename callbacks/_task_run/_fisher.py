"""The empirical Fisher information of a module: mean squared gradients of the loss of single samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge.callbacks._lightning._batch_copies import BatchCopy
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
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
from lightning_merge.callbacks._task_run._samples import Samples
from lightning_merge.weights import Weights

_CURE = "Choose `importance='identity'`."


def prepare_fisher(
    trainer: Any,
    module: LightningModule,
    held: Callable[[LightningModule], Mapping[str, Tensor]],
    recent: RecentBatches,
) -> None:
    """Refuses a step that gives no loss of a sample, or has it tried with the first batch that is trained on.

    Args:
        trainer: The Trainer.
        module: The module.
        held: The parameters whose information is asked for, once there is a batch.
        recent: Where batches are kept.

    Raises:
        ValueError: If ``training_step`` steps optimizers or fetches its batches itself; later, if it does not run.
    """
    reason = "" if module.automatic_optimization else "steps optimizers under manual optimization"
    if takes_iterator(module):
        reason = "takes `dataloader_iter` and fetches its batches itself"
    if reason:
        raise ValueError(
            f"`importance='fisher'` takes the loss of single samples from `training_step`, which {reason}. {_CURE}"
        )

    def attempt(copy: BatchCopy) -> None:
        if parameters := held(module):
            recent.way = _way(trainer, module, parameters, recent, copy)

    recent.trial = attempt


def fisher_information(
    trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches, samples: int
) -> Weights:
    """Mean over samples of squared gradients of their loss, over all processes; training notices nothing of it.

    Args:
        trainer: The Trainer.
        module: The module; it runs in eval mode if it gives a loss there.
        held: The parameters whose information is asked for.
        recent: The batches. The most recent samples are taken.
        samples: At most so many; at least 1.

    Samples whose step fails are left out, which is said; so is that there is no information at all.

    Raises:
        ValueError: If the module's step was not tried before, and does not give the loss of a sample.
    """
    if not held:
        return {}
    total, count, left_out = weights.zeros(held), 0, _LeftOut()
    copies = recent.on(trainer.strategy.root_device)
    if recent.way is None and copies:
        recent.way = _way(trainer, module, held, recent, BatchCopy.of(recent.batches[-1]))
    in_eval = names_in_eval(module) if module.training else frozenset()
    with outside_training(trainer, module):
        for copy in reversed(copies):
            with left_out.counted():
                singles = Samples(copy())
                for index in range(min(singles.count, samples - count)):
                    with left_out.counted(), running(trainer, module, recent.way, in_eval):
                        loss = _loss(module, singles[index])
                        gradients = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
                        _refuse_not_finite(gradients)
                        for square, gradient in zip(total.values(), gradients, strict=True):
                            if gradient is not None:
                                square.addcmul_(gradient.to(square), gradient.to(square))
                        count += 1
    fisher = {name: square / max(1, count) for name, square in total.items()}
    weights.mean_over_ranks_(fisher)
    left_out.say(count)
    if fisher and not any(bool(information.any()) for information in fisher.values()):
        rank_zero_warn(
            f"Anchor: all Fisher information of the {count} samples is 0, so nothing of this task is held. A loss that"
            " is 0 for a sample alone, as a contrastive one, has none."
        )
    return fisher


class _LeftOut:
    """Samples that gave no information, and why: a task that is trained is not lost over them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Exception | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the user's step raises
            self.count += 1
            self.first = self.first or error

    def say(self, taken: int) -> None:
        if self.first is not None:
            rank_zero_warn(
                f"Anchor: Fisher information is of {taken} samples; {self.count} more gave none, the first since"
                f" {type(self.first).__name__}: {self.first}"
            )


def _way(
    trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches, copy: BatchCopy
) -> Way:
    in_eval = names_in_eval(module) if module.training else frozenset()

    def attempt(way: Way) -> bool:
        batch = copy.on(trainer.strategy.root_device)
        singles = Samples(batch)
        few = [singles[index] for index in range(min(singles.count, 4))]
        with outside_training(trainer, module), running(trainer, module, way, in_eval):
            losses = [_loss(module, sample) for sample in few]
            for loss in losses:
                _refuse_not_finite(torch.autograd.grad(loss, list(held.values()), allow_unused=True))
            alone = max(abs(float(loss.detach())) for loss in losses)
            if len(few) > 1 and alone <= 1e-6 * abs(whole := float(_loss(module, batch).detach())):
                raise ValueError(
                    f"the loss of {singles.count} samples is {whole:.3g}, and 0 of each alone: it compares them"
                    " with each other, as a contrastive one, so samples have no information of their own"
                )
        return True

    found = first_way_that_runs(tuple(way for way in WAYS if way.gradients), attempt)
    if isinstance(found, Exception):
        raise ValueError(
            "`importance='fisher'` takes the loss of single samples from `training_step`, which does not give it"
            f" outside training: {type(found).__name__}: {found}. {_CURE}"
        ) from found
    return found


def _loss(module: LightningModule, batch: Any) -> Tensor:
    output: Any = training_step(module, batch)
    loss: Tensor = output["loss"] if isinstance(output, dict) else output
    return loss


def _refuse_not_finite(gradients: Iterable[Tensor | None]) -> None:
    if not all(bool(each.isfinite().all()) for each in gradients if each is not None):
        raise ValueError(
            "the gradient of a sample's loss holds a NaN or an infinity: the loss may need several samples"
        )
