"""Lightning's averaging callbacks by their own names and arguments, done by this library's."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_merge._checks import flag, function, number, one_of, whole
from lightning_merge._checks import real as checked_real
from lightning_merge.callbacks._swa import SWA, checked_rates
from lightning_merge.callbacks._weight_merging import WeightMerging
from lightning_merge.rules import ExponentialMean, Mean, Rule
from lightning_merge.schedules import EveryNEpochs, Moment, RunLength, Schedule
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights, clone, copy_

AvgFn = Callable[[Tensor, Tensor, Tensor], Tensor]
MultiAvgFn = Callable[[list[Tensor], list[Tensor], Tensor], None]


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
        _check_functions(avg_fn=avg_fn, multi_avg_fn=multi_avg_fn)
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError("give `avg_fn` or `multi_avg_fn`, not both.")
        custom = avg_fn is not None or multi_avg_fn is not None
        self._set_up(_CustomMean(avg_fn, multi_avg_fn) if custom else Mean(), device, use_buffers, name)

    def _set_up(self, rule: Rule, device: torch.device | str | int | None, use_buffers: bool, name: str) -> None:
        use_buffers = flag("use_buffers", use_buffers)
        super().__init__(
            rule,
            schedule=_Asked(self),
            selection=Selection(buffers="average" if use_buffers else "copy"),
            name=name,
        )
        self.device = _checked_device(device)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights are taken in after this step, or at the end of this epoch; both count from 0."""
        return step_idx is not None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses another device than the model's."""
        _refuse_device(type(self).__name__, self.device, pl_module.device)
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


class StochasticWeightAveraging(SWA):
    """Lightning's ``StochasticWeightAveraging``: the mean over the epochs of a tail at rate ``swa_lrs``.

    Args:
        swa_lrs: Learning rate of the tail, more than 0; a list has one for each parameter group.
        swa_epoch_start: The tail begins with the n-th epoch (an int of at least 1, counted from 1), or with epoch
            ``int(share * max_epochs)`` (a float in [0, 1]).
        annealing_epochs: Epochs over which the rate moves to ``swa_lrs``.
        annealing_strategy: ``"cos"`` or ``"linear"``.
        avg_fn: ``average, weights, number averaged so far -> new average``, per tensor, instead of the uniform mean.
        device: Where Lightning's keeps its average. Here it lives beside the model, whatever this says; one line at
            fit start tells it where the model is elsewhere.
        name: Of the average, as in ``WeightMerging``.

    Raises:
        ValueError: If an argument is out of its range, or at fit start if a share is asked of a run without
            ``max_epochs`` or the lists do not match the optimizer.

    Example:
        >>> StochasticWeightAveraging(swa_lrs=0.01).swa_lr
        0.01
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AvgFn | None = None,
        device: torch.device | str | int | None = "cpu",
        name: str = "swa",
    ) -> None:
        _check_functions(avg_fn=avg_fn)
        says = "a whole number of at least 1 or a share in [0, 1]"
        swa_epoch_start = checked_real("swa_epoch_start", swa_epoch_start, says)
        if isinstance(swa_epoch_start, int) and swa_epoch_start < 1:
            raise ValueError(f"`swa_epoch_start` must be at least 1 as a whole number, got {swa_epoch_start}.")
        if not 0 <= swa_epoch_start <= 1 and isinstance(swa_epoch_start, float):
            raise ValueError(f"`swa_epoch_start` must be in [0, 1] as a share, got {swa_epoch_start}.")
        super().__init__(
            swa_lr=checked_rates("swa_lrs", swa_lrs),
            anneal_epochs=whole("annealing_epochs", annealing_epochs, 0),
            anneal_strategy=one_of("annealing_strategy", annealing_strategy, ("cos", "linear")),
            name=name,
        )
        self.swa_epoch_start = swa_epoch_start
        self.device = _checked_device(device)
        if avg_fn is not None:
            self.rule = self._active_rule = _CustomMean(avg_fn)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turns the epoch that Lightning counts from 1, or rounds down from a share, into completed epochs."""
        if stage == "fit":
            start = self.swa_epoch_start
            if isinstance(start, float):
                if not trainer.max_epochs or trainer.max_epochs < 0:
                    raise ValueError(
                        f"`swa_epoch_start={start}` is a share of the run, but the Trainer has no `max_epochs`."
                    )
                start = int(start * trainer.max_epochs)
            self.schedule = EveryNEpochs(1, start=max(start - 1, 0))
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says it if the average is kept elsewhere than was asked."""
        if self.device is not None and torch.device(self.device).type != pl_module.device.type:
            rank_zero_info(f"{self.title}: the average is kept on {pl_module.device}, beside the model.")
        super().on_fit_start(trainer, pl_module)


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


@final
@dataclass(frozen=True)
class _CustomMean(Rule):
    """``average <- avg_fn(average, weights, n)``, per tensor or for lists of them; the first weights are copied."""

    callback: ClassVar[str] = "WeightMerging"

    avg_fn: AvgFn | None = None
    multi_avg_fn: MultiAvgFn | None = None

    def __repr__(self) -> str:
        # Without the address of the function: files are compared by it.
        given = self.avg_fn or self.multi_avg_fn
        return f"CustomMean({getattr(given, '__qualname__', type(given).__name__)})"

    def init(self, weights: Weights) -> State:
        return {"average": clone(weights), "updates": 0}

    @torch.no_grad()
    def update(self, state: State, weights: Weights) -> None:
        average, count = state["average"], torch.tensor(state["updates"])
        if state["updates"] == 0:
            copy_(average, weights)
        elif self.multi_avg_fn is not None:
            self.multi_avg_fn(list(average.values()), [weights[name] for name in average], count)
        elif self.avg_fn is not None:
            for name, value in average.items():
                value.copy_(self.avg_fn(value, weights[name].detach(), count.to(value.device)))
        state["updates"] += 1

    def stored(self, state: State) -> Weights | None:
        return state["average"] if state["updates"] else None


def _check_functions(**given: object) -> None:
    for argument, value in given.items():
        if value is not None:
            function(argument, value)


def _checked_device(device: Any) -> Any:
    if device is None or isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        return whole("device", device, 0, 127)  # more than torch counts
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be None or a device, got {device!r}: {error}") from None
    return device


def _refuse(owner: str, kwargs: dict[str, Any], why: str) -> None:
    if kwargs:
        raise TypeError(f"{owner} takes no argument `{next(iter(kwargs))}`. {why}")


def _refuse_device(owner: str, device: torch.device | str | int | None, of_model: torch.device) -> None:
    asked = (
        torch.device("cuda", device) if isinstance(device, int) else None if device is None else torch.device(device)
    )
    if asked is None or (asked.type == of_model.type and asked.index in (None, of_model.index)):
        return
    raise ValueError(
        f"`device` of {owner} must be None or the device of the model ({of_model}), got {device!r}: the average lives"
        " beside the model. Leave the argument out."
    )
