"""Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` by their own names and arguments."""

from dataclasses import dataclass, field
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_merge._checks import flag, number, whole
from lightning_merge.callbacks._weight_merging import WeightMerging
from lightning_merge.compat._custom_mean import AvgFn, CustomMean, MultiAvgFn, check_functions
from lightning_merge.compat._device import checked_device, refuse_device
from lightning_merge.rules import ExponentialMean, Mean, Rule
from lightning_merge.schedules import Moment, RunLength, Schedule
from lightning_merge.selections import Selection


class WeightAveraging(WeightMerging):
    """Lightning's ``WeightAveraging``: the uniform mean, or ``avg_fn``, after the steps that ``should_update`` names.

    Override ``should_update`` as there. What differs in the numbers is in ``docs/migrating.md``.

    Args:
        device: ``None``, or the device of the model. The average lives beside the model.
        use_buffers: ``True`` averages floating-point buffers, ``False`` copies them; integers are always copied.
        avg_fn: ``average, weights, number averaged so far -> new average``, per tensor; not called for the first.
        multi_avg_fn: The same for lists of tensors, in place.
        name: Of the average, as in ``WeightMerging``.

    Raises:
        TypeError: If an argument has no equivalent.
        ValueError: If both functions are given, or at fit start if ``device`` is not that of the model.

    Example:
        >>> WeightAveraging(use_buffers=False).name
        'average'
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        name: str = "average",
        **kwargs: Any,
    ) -> None:
        _refuse(type(self).__name__, kwargs, "They are passed to torch's AveragedModel, which is not used here.")
        check_functions(avg_fn=avg_fn, multi_avg_fn=multi_avg_fn)
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("give `avg_fn` or `multi_avg_fn`, not both.")
        custom = avg_fn is not None or multi_avg_fn is not None
        self._set_up(CustomMean(avg_fn, multi_avg_fn) if custom else Mean(), device, use_buffers, name)

    def _set_up(self, rule: Rule, device: torch.device | str | int | None, use_buffers: bool, name: str) -> None:
        use_buffers = flag("use_buffers", use_buffers)
        super().__init__(
            rule,
            schedule=_Asked(self),
            selection=Selection(buffers="average" if use_buffers else "copy"),
            name=name,
        )
        self.device = checked_device(device)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights are taken in after this step, or at the end of this epoch; both count from 0."""
        return step_idx is not None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses another device than the model's."""
        refuse_device(type(self).__name__, self.device, pl_module.device)
        super().on_fit_start(trainer, pl_module)


class EMAWeightAveraging(WeightAveraging):
    """Lightning's ``EMAWeightAveraging``: an exponential moving average that starts as a copy at its first update.

    Args:
        device: ``None``, or the device of the model.
        use_buffers: ``True`` averages floating-point buffers, ``False`` copies them; integers are always copied.
        decay: Share of the old average kept at each update, in [0, 1), whatever lies between two updates.
        update_every_n_steps: Update where this divides the index of the step; at least 0 (0: never by steps). Steps
            are the applied steps of the first optimizer, not Lightning's ``global_step``.
        update_starting_at_step: Index of the first step that may update.
        update_starting_at_epoch: Also update at the end of every epoch from this index on.
        name: Of the average, as in ``WeightMerging``.

    Raises:
        TypeError: If an argument has no equivalent.
        ValueError: If one is out of its range, or at fit start if ``device`` is not that of the model.

    Example:
        >>> EMAWeightAveraging(decay=0.99).rule.decay
        0.99
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        name: str = "ema",
        **kwargs: Any,
    ) -> None:
        _refuse(type(self).__name__, kwargs, "`avg_fn` and `multi_avg_fn` belong to WeightAveraging.")
        self.update_every_n_steps = whole("update_every_n_steps", update_every_n_steps, 0)
        first = {
            "update_starting_at_step": update_starting_at_step,
            "update_starting_at_epoch": update_starting_at_epoch,
        }
        checked = {key: None if value is None else whole(key, value, 0) for key, value in first.items()}
        self.update_starting_at_step = checked["update_starting_at_step"]
        self.update_starting_at_epoch = checked["update_starting_at_epoch"]
        self._set_up(ExponentialMean(number("decay", decay, "[0, 1)")), device, use_buffers, name)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """See the arguments of the class."""
        if step_idx is not None:
            every, first = self.update_every_n_steps, self.update_starting_at_step or 0
            return every > 0 and step_idx >= first and step_idx % every == 0
        first_epoch = self.update_starting_at_epoch
        return epoch_idx is not None and first_epoch is not None and epoch_idx >= first_epoch


@final
@dataclass(frozen=True)
class _Asked(Schedule):
    """When the callback's ``should_update`` says so; the average starts with the first such moment."""

    callback: WeightAveraging = field(repr=False)

    def started(self, moment: Moment) -> bool:
        return moment.step > 0 and self.due(moment)

    def due(self, moment: Moment) -> bool:
        if moment.epoch_end:
            return self.callback.should_update(epoch_idx=moment.epoch - 1)
        return self.callback.should_update(step_idx=moment.step - 1)

    def resolve(self, run: RunLength) -> "_Asked":
        return self


def _refuse(owner: str, kwargs: dict[str, Any], why: str) -> None:
    if kwargs:
        raise TypeError(f"{owner} takes no argument `{next(iter(kwargs))}`. {why}")
