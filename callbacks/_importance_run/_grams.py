"""Gram matrices of the inputs of a module's layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge.callbacks._lightning._batch_copies import BatchCopy
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._user_step import (
    WAYS,
    Way,
    calibration,
    first_way_that_runs,
    has_calibration_step,
    names_in_eval,
    outside_training,
    running,
    takes_iterator,
    why_not_alone,
)
from lightning_merge.importance._grams import InputGrams
from lightning_merge.importance._samples import Samples


@final
@dataclass(frozen=True)
class GramPass:
    """Forward passes over the last batches, outside training.

    Args:
        argument: How the user asked for it, as messages show it.
        most_inputs: Layers with more inputs are left out. ResNet-18 has 4608, at 81 MiB for a matrix.
    """

    argument: str
    most_inputs: int = 4608

    def prepare(self, trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches) -> None:
        """Refuses what cannot be measured, or has the step tried with the first batch that is trained on.

        Args:
            trainer: The Trainer.
            module: The module.
            held: The parameters whose matrices are asked for.
            recent: Where batches are kept.

        Raises:
            ValueError: If no layer is measured, or ``training_step`` cannot be run for its forward pass alone; later,
                if it does not run outside training, or one cannot tell the samples of a batch apart.
        """
        reason = why_not_alone(module)
        if reason and (takes_iterator(module) or not has_calibration_step(module)):
            raise ValueError(
                f"{self.argument} takes the forward pass from `training_step`, which {reason}. Define"
                f" `calibration_step(self, batch)` on {type(module).__name__}, which runs the forward pass, and take"
                " batches one by one."
            )
        looked = InputGrams(module, held, self.most_inputs)
        if not looked.found:
            name, why = next(iter(looked.left_out.items()), ("", "no parameter is trained"))
            raise ValueError(
                f"{self.argument} measures the inputs of trained linear layers and convolutions (Conv1d, Conv2d), and"
                f" {type(module).__name__} has none: `{name}` is {why}."
            )

        def attempt(copy: BatchCopy) -> None:
            recent.way = self._way(trainer, module, lambda: copy.on(trainer.strategy.root_device))

        recent.trial = attempt

    def measured(
        self, trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches, samples: int
    ) -> tuple[InputGrams, int]:
        """The matrices, and over how many samples of this process; training notices nothing of it.

        Args:
            trainer: The Trainer.
            module: The module; it runs in eval mode if it can.
            held: The parameters whose matrices are asked for.
            recent: The batches, whole ones, newest first.
            samples: Batches are taken until there are so many in this process; at least 1.
        """
        copies = recent.on(trainer.strategy.root_device)
        in_eval = names_in_eval(module) if module.training else frozenset()
        found, count = InputGrams(module, held, self.most_inputs), 0
        if recent.way is None and copies:
            recent.way = self._way(trainer, module, copies[-1])
        with outside_training(trainer, module), found:
            for make in reversed(copies):
                if count >= samples:
                    break
                count += _forward(trainer, module, make, recent.way, in_eval)
        return found, count

    def _way(self, trainer: Any, module: LightningModule, make: Callable[[], Any]) -> Way:
        in_eval = names_in_eval(module) if module.training else frozenset()

        def attempt(way: Way) -> bool:
            with outside_training(trainer, module):
                return bool(_forward(trainer, module, make, way, in_eval))

        found = first_way_that_runs(WAYS, attempt)
        if isinstance(found, Exception):
            step = "calibration_step" if has_calibration_step(module) else "training_step"
            raise ValueError(
                f"{self.argument} takes the forward pass from `{step}`, which does not run outside training:"
                f" {type(found).__name__}: {found}. Define `calibration_step(self, batch)` on {type(module).__name__},"
                " which runs the forward pass."
            ) from found
        return found


def _forward(trainer: Any, module: LightningModule, make: Callable[[], Any], way: Way, in_eval: frozenset[str]) -> int:
    """Runs the forward pass of a batch; how many samples are in it."""
    batch = make()
    count = Samples(batch).count
    with running(trainer, module, way, in_eval):
        calibration(module, batch)
    return count
