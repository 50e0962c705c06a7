"""Where a stream is, before a task of it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lightning_merge import weights
from lightning_merge._checks import instance
from lightning_merge.callbacks._task_run._beside import refuse_reused
from lightning_merge.callbacks._task_run._head_search import guessed_head
from lightning_merge.callbacks._task_run._heads import Head
from lightning_merge.callbacks._task_run._settings import Settings
from lightning_merge.callbacks._task_run._store import refuse_other_model
from lightning_merge.callbacks._task_run._task import refuse_known_classes
from lightning_merge.combiners import add_vector
from lightning_merge.continual import head_parameters
from lightning_merge.weights import Weights

FINISHED: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
"""The folder of the stream whose merged model a module was left with by this process."""


@final
@dataclass(frozen=True)
class Start:
    """Where the stream is.

    Attributes:
        done: Tasks taken in.
        names: The parameters that are merged; of a first task whose head is not known yet, it too.
        base: Their base.
        tensors: What the next task starts from.
        head: Names of the head of the earlier tasks; ``None`` if there are none.
        titles: Names of the tasks that are in the bank.
    """

    done: int
    names: list[str]
    base: Weights
    tensors: Weights
    head: list[str] | None
    titles: list[int | str]


def known_head(module: nn.Module, settings: Settings, recorded: Sequence[str] | None) -> Head | None:
    """The head as far as it is known before there is a batch.

    Args:
        module: The module.
        settings: Of the stream.
        recorded: The head of the earlier tasks, if there are any.

    Raises:
        ValueError: If it has to be known and cannot be, or is another than that of the earlier tasks.
    """
    if settings.head is not None:
        names = head_parameters(module, settings.head, "head")
        if recorded is not None and set(recorded) != set(names):
            raise ValueError(
                f"`head` must name the head of the earlier tasks of the bank {settings.store.folder},"
                f" {list(recorded) or 'none'}, got {names}. Name that, or a new folder with `bank`."
            )
    elif recorded is not None:
        there = weights.named_parameters(module)
        names = [name for name in there if name in recorded]  # a file sorts them
        if gone := next((name for name in recorded if name not in there), None):
            raise ValueError(
                f"the model is not that of the bank's first task: `{gone}`, of the head, is missing. Layers that are"
                " made later than in `configure_model` are there too late."
            )
    elif settings.needs_head_early:
        names = guessed_head(module)
    else:
        return None
    return Head(names, settings.heads)


def opened(
    trainer: Trainer, module: LightningModule, settings: Settings, classes: Sequence[int] | None, left_off: bool
) -> Start:
    """Finds out where the stream is, before anything is trained.

    Raises:
        ValueError: If its model or base is another, or it has had the task's classes.
    """
    instance("module", module, nn.Module, "a module")
    _refuse_unmade(module)
    goes_on = left_off or trainer.ckpt_path is not None
    if not goes_on:
        refuse_reused(trainer.callbacks)  # type: ignore[attr-defined]
    store = settings.store
    bank, stream, live = store.bank(), store.stream, weights.named_tensors(module)
    done = bank.added
    # A base of a first task that was never taken in is of use only to go on with that task.
    if not done and not (stream.has_base and goes_on):
        stream.save_base(live)
    base = stream.base()
    state = stream.load(done) if done else {}
    recorded = list(state.get("head", {})) if done else None
    head = known_head(module, settings, recorded)
    names = settings.merged(module, head.names if head else ())
    refuse_other_model({name: live[name] for name in names}, base, head.names if head else ())
    if done:
        names = _of_the_bank(module, settings, names, bank.names)
    merged_base = {name: base[name] for name in names}
    bank = store.bank(merged_base)  # refuses a file of another base before anything is trained
    if not left_off:
        merged = add_vector(merged_base, bank.result() or {})
        if FINISHED.get(module) != str(store.folder.resolve()):
            store.refuse_other_base(live, merged_base, merged)
        elif store.differs(live, merged_base) and store.differs(live, merged):
            rank_zero_info(
                "ContinualMerging: the module holds neither the base nor the merged model, but other weights (of a"
                f" checkpoint that was tested, say); this task starts from {settings.store.init_from!r} all the same."
            )
    refuse_known_classes(classes, state.get("classes", {}))
    tensors = {name: base[name] for name in weights.named_buffers(module) if name in base}
    tensors |= store.start(bank, merged_base, state) | state.get("other", {})
    if head is not None:
        tensors |= head.start(base, state.get("head", {}), live)
    return Start(done, names, merged_base, tensors, recorded, bank.tasks)


def _of_the_bank(module: nn.Module, settings: Settings, now: Sequence[str], known: Sequence[str]) -> list[str]:
    """The parameters that the vectors of a bank hold, of which some may be frozen now.

    Raises:
        ValueError: If others are trained now, or one is not selected.
    """
    if not known:
        return list(now)
    for name in now:
        if name not in known:
            raise settings.trained_later(name)
    named = settings.named(module)
    for name in known:
        if name not in named:
            raise ValueError(
                f"the vectors of the bank {settings.store.folder} hold `{name}`, which is not in this module or is left"
                " out by `selection` now. Give the model and the selection of the first task, or a new `bank`."
            )
    return list(known)


def _refuse_unmade(module: nn.Module) -> None:
    lazy: Any = [name for name, p in module.named_parameters() if isinstance(p, UninitializedTensorMixin)]
    if lazy:
        raise ValueError(
            f"`{lazy[0]}` of {type(module).__name__} has no shape yet, so it has no base: run a batch through the"
            " module before `fit` (lazy layers get their shape by it)."
        )
