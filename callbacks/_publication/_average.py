"""What the machinery of publication knows of a callback that merges: a name, merged weights, what a file needs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge._checks import flag, one_of, whole, word
from lightning_merge._ranks import gathered, settings_of
from lightning_merge.inventory import named_tensors
from lightning_merge.schedules import Moment
from lightning_merge.shards import reshard
from lightning_merge.weights import Finding, Weights

Validate = Literal["merged", "raw", "both"]


class Average(ABC):
    """Something that merges the weights of a run, whichever way; it knows nobody of those who publish it.

    Its arguments are those of ``Published``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        validate: Validate,
        name: str,
        optimizer: int,
        *,
        final_validation: bool = True,
        final_checkpoint: bool = True,
        log_health: bool = True,
    ) -> None:
        self.validate: Validate = one_of("validate", validate, Validate)
        self.name = word("name", name, other_than=("raw",))
        self.optimizer = whole("optimizer", optimizer, 0)
        self.final_validation = flag("final_validation", final_validation)
        self.final_checkpoint = flag("final_checkpoint", final_checkpoint)
        self.log_health = flag("log_health", log_health)
        self.monitor: str | None = None  # the metric of the raw weights that it decides by, if it decides by one

        self.steps = 0
        self.accepted: float | None = None
        self.update_window: tuple[int, int] | None = None
        self.final_path: str | None = None
        self.final_metrics: dict[str, float] = {}
        self.ending: Ending | None = None  # how the last fit ended, until the next begins
        self.is_sharded = False  # whether this process holds a part only of what it merges

    # ---- what there is

    @property
    @abstractmethod
    def updates(self) -> int:
        """Times that something was merged."""

    @property
    @abstractmethod
    def version(self) -> tuple[int, int]:
        """Changes whenever the merged weights do."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether there is something to publish."""

    @abstractmethod
    def merged(self) -> Weights | None:
        """The merged parameters and buffers, each once by the first of its names; ``None`` if there are none.

        They are the stored tensors, in the average's precision. Of sharded ones it is the part that is here.
        """

    @abstractmethod
    def published_weights(self) -> Weights | None:
        """The merged weights, or what ``AcceptIfBetter`` chose in their place."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The live parameters and buffers that it merges, by canonical name; of sharded ones the part that is here."""

    @property
    def captured(self) -> dict[str, Tensor]:
        """The same as the module has them: sharded ones as they are."""
        return self.tensors

    @property
    def checked(self) -> dict[str, Tensor]:
        """Those of ``tensors`` in which a NaN or an infinity keeps the weights from being merged."""
        return self.tensors

    @property
    def watches_training(self) -> bool:
        """Whether what it merges depends on which parameters require gradients."""
        return False

    def look_again(self) -> None:  # noqa: B027 (most have nothing to do)
        """Called when tensors of the module were replaced, added, removed, frozen or unfrozen."""

    def remarks(self) -> list[str]:
        """Lines for the start of a fit, beside ``describe``."""
        return []

    @property
    def works_on_shards(self) -> bool:
        """Whether it merges parts of tensors, each process its own."""
        return False

    @property
    def left_alone(self) -> list[str]:
        """Names of selected parameters that cannot be merged, since they are quantised, packed or integers."""
        return []

    @property
    def shared(self) -> Weights:
        """Parameters beside ``tensors`` of which there is one set, the same whether it is merged or raw."""
        return {}

    @property
    def own(self) -> set[str]:
        """Names of parameters that each process trains and keeps for itself."""
        return set()

    def configuration(self) -> dict[str, Any]:
        """What has to be the same in every process, each under words that an error can use."""
        fields = {f"`{field}` of {self.title}": getattr(self, field) for field in ("validate", "optimizer", "monitor")}
        fields |= {f"{words} {self.name!r}": value for words, value in settings_of(self).items()}
        shapes = {f"`{name}`, which {self.title} merges": tuple(t.shape) for name, t in self.captured.items()}
        return {**fields, **shapes}

    def cheaper(self, n: int) -> str | None:
        """How to make it take less of a step, as arguments; ``None`` if there is no way without changing the method.

        Args:
            n: Steps between updates that would do.
        """
        return None

    def progress(self) -> dict[str, Any]:
        """Counters that have to be the same in every process."""
        return {f"how often {self.title} took weights in": self.updates}

    @abstractmethod
    def describe(self) -> str:
        """What is merged and what it takes, in a few words."""

    @property
    def buffer_names(self) -> set[str]:
        """Which of ``tensors`` are buffers."""
        return {name for name, tensor in self.captured.items() if not isinstance(tensor, torch.nn.Parameter)}

    @property
    def decides_on_score(self) -> bool:
        """Whether what it merges depends on the scores of the raw weights, which then own the plain metric names."""
        return False

    @property
    def initial_share(self) -> float:
        """Share of the merged weights that is still the weights of the start, in [0, 1]."""
        return 0.0

    def health(self) -> dict[str, float]:
        """How it stands, by the last word of the keys that loggers get; empty until it has taken weights in."""
        return {"updates": self.updates} if self.updates else {}

    def at_hand(self) -> Weights | None:
        """As ``merged``, if that lies on the devices of the live tensors and is made in a few passes over them."""
        return None

    def shares(self) -> Tensor | None:
        """How much the weights of each update count in the merged ones, oldest first; ``None`` if that is not known."""
        return None

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{type(self).__name__} {self.name!r}"

    @property
    def state_key(self) -> str:
        """By name, not by hyperparameters: a run may go on with another decay."""
        return f"lightning_merge.{self.name}"

    # ---- for those who publish it

    @abstractmethod
    def wants(self, moment: Moment) -> bool:
        """Whether it starts or takes the live weights in right after this optimizer step."""

    @abstractmethod
    def take_in(self, moment: Moment, finding: Finding) -> None:
        """Takes the live weights in; ``finding`` knows which of them hold a NaN or an infinity, or will."""

    @abstractmethod
    def label(self) -> dict[str, Any]:
        """What every file says about it."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """What a full file needs to go on bit for bit."""

    @abstractmethod
    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        """Takes over what ``save`` and ``label`` gave."""

    def synchronise(self, different: list[str]) -> None:
        """Makes one average of those of all processes, which hold different weights. All call this.

        Raises:
            ValueError: If it cannot.
        """
        raise ValueError(
            f"{self.title} merges weights that are the same in all processes, and `{different[0]}` is not: they train"
            " apart, by a hook of DDP, a plug-in, or since gradients are not synchronised. Train with `strategy='ddp'`"
            " and its own all-reduce, or take an average (EMA, SWA, LAWA, SWAD), which is then the mean over processes."
        )

    def adopt(self, average: Weights, updates: int, steps: int, epochs: int) -> bool:
        """Goes on with an average that other software kept, if that is all it keeps itself; whether it does.

        Args:
            average: By canonical name, of all parameters and buffers.
            updates: How many weights were merged into it.
            steps: Optimizer steps of the run so far.
            epochs: Epochs completed so far.
        """
        return False

    @abstractmethod
    def to_host(self) -> None:
        """Follows the module to host memory after a fit, so no accelerator memory stays taken."""

    @abstractmethod
    def note_the_end(self) -> None:
        """Settles what is published, and says in a line what the user should know about it."""

    @abstractmethod
    def recalibrate(self) -> None:
        """Makes the buffers fit the merged weights, unless that was done already."""

    @abstractmethod
    def forget_statistics(self) -> None:
        """BatchNorm statistics are measured again before the next publication, where there are batches to."""

    @abstractmethod
    def statistics(self, candidate: Weights) -> Weights:
        """BatchNorm statistics of any weights in its place, on the kept batches; empty without such."""


@dataclass
class Ending:
    """How a fit ended: the raw weights it set aside, and what took their place."""

    raw: Weights
    primary: Average | None
    buffers: Weights
    """The published buffers, which are those of all ranks while an average has its own; after a fit in processes of
    its own all that was published."""

    def is_live(self, module: nn.Module) -> bool:
        """Whether the module still holds what was published."""
        reshard(module)
        live = weights.local(named_tensors(module))
        published = {**((self.primary and self.primary.published_weights()) or {}), **self.buffers}
        same = all(
            name in live and live[name].shape == tensor.shape and torch.equal(live[name], tensor.to(live[name]))
            for name, tensor in published.items()
        )
        return all(gathered(same))


_OTHER_MERGERS = {"WeightAveraging", "StochasticWeightAveraging", "EMACallback", "EMAHook"}


def averages_of(trainer: Any) -> list[Average]:
    """The averages of a Trainer in the order of its callback list.

    Raises:
        ValueError: If two share a name, one would decide on merged figures, or another callback that exchanges weights
            is among the callbacks.
    """
    ours = [callback for callback in trainer.callbacks if isinstance(callback, Average)]
    names = [average.name for average in ours]
    for average in ours:
        if names.count(average.name) > 1:
            raise ValueError(
                f"`name` must be unique in a Trainer, but {names.count(average.name)} averages are called"
                f" {average.name!r}. Give one another: {type(average).__name__}(name='{average.name}2')."
            )
        if average.monitor is not None and (other := average.monitor.partition("/")[0]) in names:
            raise ValueError(
                f"{average.title} decides on how the raw weights do, but `monitor={average.monitor!r}` is a metric of"
                f" the average {other!r}. Name the metric without that prefix."
            )
    for callback in trainer.callbacks:
        if any(cls.__name__ == "ModelPruning" for cls in type(callback).__mro__):
            raise ValueError(
                f"ModelPruning puts `weight_orig` and `weight_mask` in the place of `weight` in mid-fit, and"
                f" {ours[0].title} would average what is not there any more. Prune before the fit with"
                " `torch.nn.utils.prune`, whose parameters and masks are averaged and kept, or after it."
            )
        if callback not in ours and _OTHER_MERGERS & {cls.__name__ for cls in type(callback).__mro__}:
            raise ValueError(
                f"{type(callback).__name__} and {ours[0].title} both put other weights into the model, and would save"
                " and measure each other's. Keep one; several averages of lightning-merge work side by side."
            )
    return ours
