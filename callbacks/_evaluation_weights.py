"""EvaluationWeights: the second set of weights that some optimizers keep, measured and saved like an average."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, Unpack, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._averaging._second_sets import has_second_set
from lightning_merge._checks import function
from lightning_merge._whole_steps import hook_whole_steps, was_skipped
from lightning_merge.callbacks._publication._options import AverageOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import Rule
from lightning_merge.schedules import AtValidations
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights

Second: TypeAlias = Callable[[LightningModule], Mapping[str, Tensor]]
"""Gives the weights to evaluate, by parameter name; called with the weights in place that are trained."""


@final
@dataclass(frozen=True)
class _OfOptimizer(Rule):
    """Merges nothing: the optimizer has done that."""

    def init(self, weights: Weights) -> State:
        return {"updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        return

    def stored(self, state: State) -> Weights | None:
        return None


class EvaluationWeights(WeightMerging):
    """The weights that an optimizer gives for evaluation, where those it trains are others.

    For schedule-free optimizers and whatever has ``train()`` and ``eval()`` (``schedulefree``, Prodigy with
    schedule-free). Those weights are measured, saved and published like an average, with BatchNorm statistics measured
    again under them; training goes on with its own, bit for bit. The callback switches the modes: it calls
    ``optimizer.train()`` before training starts, and calls of ``train()`` and ``eval()`` by hooks of your module do
    nothing during the fit. It costs nothing at steps; a validation takes a copy of both sets.

    Args:
        second: ``None`` to ask the optimizers; else a function of the module that gives the weights to evaluate by
            parameter name. It is called with the trained weights in place; a parameter that it leaves out is the
            trained one. A NaN in what it gives is said, and measured.
        validate: Which weights validation measures, ``"merged"`` (those to evaluate), ``"raw"`` or ``"both"``.
        name: Prefix of their metrics if an average comes before it in the list, and of their files.
        options: ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``AverageOptions``.

    Raises:
        TypeError: If ``second`` is no function; at the first validation if it gives no tensors by name.
        ValueError: At fit start if no optimizer has a second set and ``second`` is not given, or if parameters are
            sharded; at the first validation if ``second`` gives what the module does not have.

    Example:
        >>> EvaluationWeights().name
        'evaluation'

    References:
        Defazio et al., "The road less scheduled", NeurIPS 2024.
    """

    def __init__(
        self,
        second: Second | None = None,
        validate: Validate = "merged",
        name: str = "evaluation",
        **options: Unpack[AverageOptions],
    ) -> None:
        self.second = None if second is None else function("second", second)
        self._steps_of_all = 0
        self._found: tuple[int, Weights] | None = None  # the second set, after how many steps
        self._step_hooks: list[Any] = []
        super().__init__(
            _OfOptimizer(),
            schedule=AtValidations(),
            selection=Selection(buffers="recompute"),
            validate=validate,
            name=name,
            **known(options, AverageOptions, self),
        )

    # ---- what there is

    @property
    def works_on_shards(self) -> bool:
        """No: what the optimizer changes in place are whole parameters here."""
        return False

    @property
    def updates(self) -> int:
        """Steps of all optimizers."""
        return self._steps_of_all

    @property
    def ready(self) -> bool:
        """Whether an optimizer has taken a step."""
        return self._steps_of_all > 0

    def merged(self) -> Weights | None:
        """The weights to evaluate, and the buffers as they were then; see ``Average``."""
        if not self.ready or (self._found is None and self._publisher is None):
            return None
        if self._found is None or self._found[0] != self._steps_of_all:
            inside = self._session.swapped_out
            with self._session.raw_in_place(self) if inside else nullcontext():
                self._found = self._steps_of_all, self._look()
                if self._calibrated_at != list(self.version):  # else a file had them, measured after this step
                    self._buffers = weights.copies(self._tensors.live_copied)
        return {**self._found[1], **self._buffers}

    def health(self) -> dict[str, float]:
        """Steps; the rest would take asking the optimizers."""
        return {"updates": self.updates} if self.ready else {}

    def at_hand(self) -> Weights | None:
        """Nothing: the optimizers would have to be asked."""
        return None

    def _look(self) -> Weights:
        live = self._tensors.live
        if self.second is not None:
            given = self._given(self.second(self._session.module))
            every = self._session.module.named_parameters(remove_duplicate=False)
            shapes = {weights.canonical(name): tensor.shape for name, tensor in every}
            odd = [n for n, t in given.items() if t.shape != shapes.get(n)]
            if odd:
                raise ValueError(
                    f"`second` of {self.title} must give tensors by parameter name and in the parameter's shape, got"
                    f" `{odd[0]}` {tuple(given[odd[0]].shape)}; there are: {', '.join(live)}."
                )
            found = weights.clone({name: given.get(name, tensor) for name, tensor in live.items()})  # tied ones once
            if culprits := weights.nonfinite(found) - weights.nonfinite(live):
                rank_zero_warn(
                    f"{self.title}: what `second` gives for `{min(culprits)}` holds a NaN or an infinity after"
                    f" {self._steps_of_all} steps, and the parameter does not. It is measured, saved and published so."
                )
            return found
        with _values_kept(self._optimizers) as put_back:
            _switch(self._optimizers, "train")  # a finished run may have been read from a file in the other mode
            put_back()
            _switch(self._optimizers, "eval")
            found = weights.clone(live)
            _switch(self._optimizers, "train")
        return found

    def _given(self, found: object) -> Weights:
        says = "give tensors by parameter name"
        if not isinstance(found, Mapping):
            raise TypeError(f"`second` of {self.title} must {says}, got {type(found).__name__}.")
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"`second` of {self.title} must {says}, got {type(tensor).__name__} for `{name}`.")
        return {weights.canonical(name): tensor for name, tensor in found.items()}

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [each for each in self._session.trainer.optimizers if has_second_set(each)]

    # ---- a fit begins and ends

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the modes of the optimizers."""
        super().on_fit_start(trainer, pl_module)
        if self.second is None and not self._optimizers:
            kinds = ", ".join(type(each).__name__ for each in trainer.optimizers)
            raise ValueError(
                f"{self.title} needs an optimizer with a second set of weights, that is with `train()` and `eval()` as"
                f" those of schedulefree, got {kinds}. For another, give the function `second=`."
            )
        handles: Any = pl_module.optimizers()
        for optimizer in self._optimizers:
            for handle in (optimizer, *(handles if isinstance(handles, list) else [handles])):
                if getattr(handle, "param_groups", None) is optimizer.param_groups:
                    for name in ("train", "eval"):
                        self._session.patches.replace(handle, name, lambda original, *_, **__: None)
        for optimizer in trainer.optimizers:
            self._step_hooks += hook_whole_steps(optimizer, self._to_training, self._note_step)

    def _to_training(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Groups of parameters that were added in the fit begin in the mode of evaluation, and would be left out."""
        if has_second_set(optimizer):
            _switch([optimizer], "train")

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._session.busy and not was_skipped(optimizer):
            self._steps_of_all += 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switches the optimizers to training; of a run that goes on the weights are those already."""
        super().on_train_start(trainer, pl_module)
        with _values_kept(self._optimizers if self._resumed else []):
            _switch(self._optimizers, "train")

    def remarks(self) -> list[str]:
        trainer = self._session.trainer
        if self._optimizers and trainer.lr_scheduler_configs:
            rank_zero_warn(
                f"{self.title}: {type(self._optimizers[0]).__name__} needs no schedule, and"
                f" {type(trainer.lr_scheduler_configs[0].scheduler).__name__} changes its learning rate too. Leave the"
                " scheduler out; for a warm-up, give the optimizer `warmup_steps`."
            )
        return []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A file of these weights has the optimizers as ``eval()`` leaves them, so that a run without this callback can
        go on from it as from one that the package's users write."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._publisher is None or self._publisher.is_over or not self._is_in_place:
            return
        with _values_kept(self._optimizers):
            _switch(self._optimizers, "eval")
            for optimizer, saved in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
                if has_second_set(optimizer):
                    saved["param_groups"] = optimizer.state_dict()["param_groups"]
            _switch(self._optimizers, "train")

    @property
    def _is_in_place(self) -> bool:
        """Whether the module holds the second set."""
        live = self._session.inventory.parameters
        found = {} if self._found is None else self._found[1]
        return bool(found) and all(torch.equal(live[name], tensor.to(live[name])) for name, tensor in found.items())

    def note_the_end(self) -> None:
        """Keeps the set, which the optimizers will not be there to give."""
        self.merged()
        super().note_the_end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module holds the weights to evaluate, so a later ``eval()`` must not move them again."""
        if self.ready and self._session.primary is self:
            with _values_kept(self._optimizers):
                _switch(self._optimizers, "eval")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops counting."""
        while self._step_hooks:
            self._step_hooks.pop().remove()

    # ---- it is loaded, and ends

    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        """Takes over what ``save`` and ``label`` gave."""
        super().load(saved, label)
        self._steps_of_all, self._found = int(label["updates"]), None

    def to_host(self) -> None:
        """Follows the module to host memory after a fit."""
        super().to_host()
        if self._found is not None:
            self._found = self._found[0], weights.to_devices(self._found[1], torch.device("cpu"))


@contextmanager
def _values_kept(optimizers: list[Optimizer]) -> Iterator[Callable[[], None]]:
    """In the block the optimizers may change their parameters, which after it are what they were, bit for bit.

    Yields what makes them so within it.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    live = {str(number): parameter for number, parameter in enumerate(parameters)}
    before = weights.copies(live)
    yield lambda: weights.copy_(live, before)
    weights.copy_(live, before)


def _switch(optimizers: list[Any], mode: Literal["train", "eval"]) -> None:
    """Calls the method of the class: that of the object does nothing during a fit."""
    for optimizer in optimizers:
        getattr(type(optimizer), mode)(optimizer)
