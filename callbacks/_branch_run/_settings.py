"""What is asked of the branches of a Trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from lightning_merge._checks import one_of, sequence
from lightning_merge.branches import Policy
from lightning_merge.branches._in_turn import Inactive
from lightning_merge.callbacks._lightning._measure import Score
from lightning_merge.callbacks._publication._average import Validate
from lightning_merge.callbacks._publication._options import AverageOptions
from lightning_merge.selections import Selection

Augmentation = Callable[[Any], Any]
Batches = Literal["same", "turns", "own"]
OptimizerState = Literal["keep", "average", "reset"]
Buffers = Literal["shared", "average", "recompute"]
Schedulers = Literal["group", "step"]
Others = Literal["refuse", "own"]


class BranchingOptions(AverageOptions, total=False):
    """What every callback that trains branches takes beside its own arguments.

    Args:
        optimizer_state: At a merge, ``"keep"`` the optimizer state of each branch, ``"average"`` or ``"reset"`` it; by
            default it is kept, and by ``WARP`` reset.
        inactive: Where the branches that do not train at the moment are: ``"device"`` (the default) or ``"cpu"``.
        schedulers: With ``batches="turns"``, whether schedules of the interval ``"step"`` move per ``"group"`` of one
            step in every branch (the default), or per ``"step"``: then size them by
            ``trainer.estimated_stepping_batches`` as ever.
        validate: Which weights validation measures, ``"merged"`` (the mean, which is the default), ``"raw"`` (a branch)
            or ``"both"``.
        optimizer: Index of the optimizer whose step ends a branch's turn, where there are several; by default 0.
        final_validation: Whether the final weights are measured at the end of a fit, if no validation has seen them;
            by default they are.
        final_checkpoint: Whether ``<name>-final.ckpt`` is written then, if checkpointing is on; by default it is.
        log_health: Whether loggers get ``<name>/updates`` every ``log_every_n_steps`` of the Trainer; by default they
            do.
    """

    optimizer_state: OptimizerState
    inactive: Inactive
    schedulers: Schedulers
    validate: Validate
    optimizer: int


@final
@dataclass(frozen=True)
class Settings:
    """Arguments of ``Branching`` as they are when a fit starts.

    Attributes:
        title: What messages call the callback.
        others: What trains without being selected, with a branch per process: an error, or each branch's own.
    """

    title: str
    policy: Policy
    branches: int
    score: Score | None
    augmentations: Sequence[Augmentation] | None
    batches: Batches
    optimizer_state: OptimizerState
    buffers: Buffers
    inactive: Inactive
    schedulers: Schedulers
    selection: Selection | None
    optimizer: int
    others: Others


def check_choices(
    batches: Batches, optimizer_state: OptimizerState, buffers: Buffers, inactive: Inactive, schedulers: Schedulers
) -> None:
    """Checks arguments that are one of a few words.

    Raises:
        TypeError: If one is no word.
        ValueError: If one is another word.
    """
    for argument, chosen, allowed in (
        ("batches", batches, Batches),
        ("optimizer_state", optimizer_state, OptimizerState),
        ("buffers", buffers, Buffers),
        ("inactive", inactive, Inactive),
        ("schedulers", schedulers, Schedulers),
    ):
        one_of(argument, chosen, allowed, f"one of {', '.join(map(repr, get_args(allowed)))}")


def checked_augmentations(augmentations: object, branches: int) -> tuple[Augmentation, ...] | None:
    """The augmentations, one for each branch, if there are any.

    Raises:
        TypeError: If they are not functions.
        ValueError: If there are more or fewer of them than branches.
    """
    if augmentations is None:
        return None
    says = f"a function for each of the {branches} branches"
    found = sequence("augmentations", augmentations, says)
    if len(found) != branches:
        raise ValueError(f"`augmentations` must have one entry for each of the {branches} branches, got {len(found)}.")
    if not all(map(callable, found)):
        raise TypeError(f"`augmentations` must be {says}, got {found!r}.")
    return found
