"""The Fisher information of a module: mean squared gradients of the loss of single samples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_merge.callbacks._lightning._batch_copies import BatchCopy
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._user_step import (
    WAYS,
    Way,
    first_way_that_runs,
    names_in_eval,
    outside_training,
    running,
    training_step,
    why_not_alone,
)
from lightning_merge.importance._model_labels import ModelLabels
from lightning_merge.importance._samples import Samples
from lightning_merge.importance._squared import Squared, refuse_not_finite, squared_gradients


@final
@dataclass(frozen=True)
class FisherPass:
    """A pass of the user's step over single samples, outside training.

    Args:
        title: Who asks for it.
        argument: How the user asked for it, as messages show it.
        cure: What to do where the step gives no loss of a sample.
        labels: Whether the loss is of the data's own labels, or of some that the model draws.
    """

    title: str
    argument: str
    cure: str
    labels: str = "true"

    def prepare(
        self,
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
        if reason := why_not_alone(module):
            raise ValueError(
                f"{self.argument} takes the loss of single samples from `training_step`, which {reason}. {self.cure}"
            )

        def attempt(copy: BatchCopy) -> None:
            if parameters := held(module):
                recent.way = self._way(trainer, module, parameters, copy)

        recent.trial = attempt

    def measured(
        self, trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches, samples: int
    ) -> Squared:
        """Mean over samples of squared gradients of their loss, over all processes; training notices nothing of it.

        Samples whose step fails are left out, which is said.

        Args:
            trainer: The Trainer.
            module: The module; it runs in eval mode if it gives a loss there.
            held: The parameters whose information is asked for.
            recent: The batches. The most recent samples are taken.
            samples: At most so many in this process; at least 1.

        Raises:
            ValueError: If the module's step was not tried before, and does not give the loss of a sample.
        """
        if not held:
            return Squared({})
        copies = recent.on(trainer.strategy.root_device)
        if recent.way is None and copies:
            recent.way = self._way(trainer, module, held, BatchCopy.of(recent.batches[-1]))
        in_eval = names_in_eval(module) if module.training else frozenset()
        with outside_training(trainer, module):
            found = squared_gradients(
                held,
                reversed(copies),
                lambda batch: self._loss(module, batch),
                samples,
                lambda: _alone(trainer, module, recent.way, in_eval),
            )
        if found.first is not None:
            rank_zero_warn(
                f"{self.title}: Fisher information is of {found.samples} samples; {found.left_out} more gave none, the"
                f" first since {type(found.first).__name__}: {found.first}"
            )
        return found

    def _way(self, trainer: Any, module: LightningModule, held: Mapping[str, Tensor], copy: BatchCopy) -> Way:
        in_eval = names_in_eval(module) if module.training else frozenset()

        def attempt(way: Way) -> bool:
            batch = copy.on(trainer.strategy.root_device)
            singles = Samples(batch)
            few = [singles[index] for index in range(min(singles.count, 4))]
            with outside_training(trainer, module), _alone(trainer, module, way, in_eval):
                losses = [self._loss(module, sample) for sample in few]
                for loss in losses:
                    refuse_not_finite(torch.autograd.grad(loss, list(held.values()), allow_unused=True))
                alone = max(abs(float(loss.detach())) for loss in losses)
                if len(few) > 1 and alone < 1e-6 * abs(whole := float(self._loss(module, batch).detach())):
                    raise ValueError(
                        f"the loss of {singles.count} samples is {whole:.3g}, and 0 of each alone: it compares them"
                        " with each other, as a contrastive one, so samples have no information of their own"
                    )
            return True

        found = first_way_that_runs(tuple(way for way in WAYS if way.gradients), attempt)
        if isinstance(found, Exception):
            raise ValueError(
                f"{self.argument} takes the loss of single samples from `training_step`, which does not give it"
                f" outside training: {type(found).__name__}: {found}. {self.cure}"
            ) from found
        return found

    def _loss(self, module: LightningModule, batch: Any) -> Tensor:
        with ModelLabels() if self.labels == "model" else nullcontext() as drawing:
            output: Any = training_step(module, batch)
        if drawing is not None and not drawing.drawn:
            raise ValueError(
                "`labels='model'` draws the targets of `cross_entropy`, `nll_loss` or"
                " `binary_cross_entropy_with_logits`, and the step called none of them: take `labels='true'`"
            )
        loss: Any = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"it returned no loss, but {type(output).__name__}")
        return loss


@contextmanager
def _alone(trainer: Any, module: LightningModule, way: Way, in_eval: frozenset[str]) -> Iterator[None]:
    """A step of one sample with gradients, which nothing scales: those of float16 would vanish, so it is float32."""
    with running(trainer, module, way, in_eval):
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            yield
            return
        with torch.autocast(trainer.strategy.root_device.type, enabled=False):
            yield
