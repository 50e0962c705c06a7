"""Calling the steps that users write (``training_step``, ``calibration_step``, ``score_step``) outside training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_merge._eval_mode import extends_train
from lightning_merge._isolation import isolated
from lightning_merge._ranks import gathered
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.shards import reshard

_said: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()


@final
@dataclass(frozen=True)
class Way:
    """How a step runs outside training.

    Attributes:
        train: Whether the module is in train mode, except BatchNorm, dropout and what training itself leaves in eval
            mode. Detectors return their losses in train mode only.
        gradients: Whether gradients are allowed, as for losses that need the gradient of an output.
    """

    train: bool
    gradients: bool


WAYS = (Way(train=False, gradients=False), Way(train=False, gradients=True), Way(train=True, gradients=True))
"""From the cheapest and closest to what evaluation computes to the closest to training."""


@contextmanager
def outside_training(trainer: Any, module: LightningModule, *, attributes: bool = True) -> Iterator[None]:
    """For the length of a block, steps run without consequences: nothing is logged, and the module stays as it was.

    The module is in eval mode without gradients, and random numbers come from a fixed seed; see ``running`` for another
    way. Attributes that a step changed and that cannot be put back are said, once each.

    Args:
        trainer: The Trainer.
        module: The module whose step it is.
        attributes: Whether plain attributes are put back; not for a step that is written for this and may keep notes.
    """
    try:
        with muted(trainer, module), isolated(module, attributes=attributes) as trace:
            if any(map(extends_train, module.modules())):
                module.train()  # it forgets what eval mode kept of other weights
                for each in module.modules():
                    each.training = False
            yield
    finally:
        reshard(module)
    if fresh := [name for name in trace.attributes if name not in _said.setdefault(module, set())]:
        _said[module].update(fresh)
        rank_zero_warn(
            f"A step of {type(module).__name__} that ran outside training has moved {', '.join(map(repr, fresh))},"
            " which cannot be put back. Define `calibration_step(self, batch)`, which runs the forward pass only."
        )


@contextmanager
def muted(trainer: Any, module: LightningModule) -> Iterator[None]:
    """Inside, what a step logs goes nowhere, and it cannot stop the run."""
    patches = Patches()
    for name in ("log", "log_dict"):
        patches.replace(module, name, lambda *args, **kwargs: None)
    loggers, should_stop = trainer.loggers, trainer.should_stop
    trainer.loggers = [DummyLogger() for _ in loggers]  # a step may write images to the logger itself
    try:
        yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop
        patches.undo()


@contextmanager
def running(trainer: Any, module: LightningModule, way: Way, in_eval: frozenset[str] = frozenset()) -> Iterator[None]:
    """One call of a step within ``outside_training``: its modes, gradients and precision.

    Args:
        trainer: For its precision.
        module: The module.
        way: How the step runs.
        in_eval: Names of submodules that training leaves in eval mode.
    """
    for name, each in module.named_modules():
        if not _is_norm(each):
            each.training = way.train and name not in in_eval and not _drops(each)
    with torch.set_grad_enabled(way.gradients), trainer.precision_plugin.train_step_context():
        yield


def training_step(module: Any, batch: Any) -> Any:
    """What ``training_step`` returns for a batch, handed over as Lightning does: by its signature.

    Args:
        module: The module.
        batch: As training had it, so after all of its ``..._batch_transfer`` hooks.
    """
    # Lightning's own rule: the index if there is a second argument, whatever its name, or `*args`.
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return module.training_step(batch, 0) if takes_index else module.training_step(batch)


def calibration(module: Any, batch: Any) -> None:
    """Runs the forward pass for BatchNorm statistics: ``calibration_step`` where there is one."""
    if has_calibration_step(module):
        module.calibration_step(batch)
    else:
        training_step(module, batch)


def transferred(trainer: Any, module: Any, batch: Any, dataloader_idx: int = 0) -> Any:
    """A batch of a loader as a loop hands it to a step: converted, on the device, through all hooks of the module."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def has_calibration_step(module: Any) -> bool:
    """Whether the user says how statistics are measured."""
    return getattr(module, "calibration_step", None) is not None


def takes_iterator(module: Any) -> bool:
    """Whether ``training_step`` takes ``dataloader_iter`` in the place of a batch."""
    return bool(is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True))


def why_not_alone(module: Any) -> str:
    """Why ``training_step`` cannot be run for its loss alone, in words; empty if it can."""
    if takes_iterator(module):
        return "takes `dataloader_iter` and fetches its batches itself"
    return "" if module.automatic_optimization else "steps optimizers under manual optimization"


def names_in_eval(module: nn.Module) -> frozenset[str]:
    """Names of the submodules in eval mode."""
    return frozenset(name for name, each in module.named_modules() if not each.training)


def first_way_that_runs(ways: tuple[Way, ...], attempt: Callable[[Way], bool]) -> Way | Exception:
    """The first way in which an attempt runs and finds something, the same in all processes; or why none does.

    Args:
        ways: To try, best first.
        attempt: Runs the step; whether it found what it is for.
    """
    runs: int | None = None  # the first that runs, even if it finds nothing
    error: Exception | None = None
    for number, way in enumerate(ways):
        try:
            found = attempt(way)
        except Exception as failure:  # whatever the user's step raises
            error = error or failure
            continue
        runs = number if runs is None or found else runs
        if found:
            break
    everywhere: list[int | None] = gathered(runs)
    known = [number for number in everywhere if number is not None]
    if len(known) == len(everywhere):
        return ways[max(known)]
    return error or RuntimeError("it fails in another process")


def _is_norm(each: nn.Module) -> bool:
    # Those inside of what `torch.jit.script` made are put into train mode to be measured.
    return isinstance(each, _BatchNorm) or (isinstance(each, torch.jit.ScriptModule) and hasattr(each, "running_mean"))


def _drops(each: nn.Module) -> bool:
    """Whether it leaves parts out at random: dropout, and DropPath or StochasticDepth of timm and torchvision."""
    return isinstance(each, _DropoutNd) or any(word in type(each).__name__ for word in ("Drop", "StochasticDepth"))
