"""What the files of a fit that takes a task into a stream hold, and the merged model among them."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, final

from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import nn

from lightning_merge._saved import Saved
from lightning_merge.callbacks._lightning._internals import dump_checkpoint
from lightning_merge.callbacks._lightning._on_one_process import on_one_process
from lightning_merge.files import join

KEY = "lightning_merge_continual"
"""Key of a checkpoint under which a task keeps what it needs to go on."""


@final
@dataclass
class TaskSaved(Saved):
    """Section of a checkpoint under ``KEY``.

    Attributes:
        holds: Whether the file's weights are those in training or the merged model.
        task: Number of the task in its stream.
        title: What the data module calls it.
        recent: The batches kept for BatchNorm statistics; only of a task in progress.
        samples: Samples stored by class; only of a task in progress that stores some.
        head: Names of the head's parameters; only of a task in progress that knows them.
        format: Version of the section.
    """

    holds: Literal["raw", "merged"]
    task: int
    title: str
    recent: Any = None
    samples: Any = None
    head: Any = None
    format: int = 1


def _unused(stem: str) -> str:
    """A path of a checkpoint that is not there yet, so that no file of another stream is written over."""
    system = get_filesystem(stem)
    names = (f"{stem}{'' if version == 0 else f'-v{version}'}.ckpt" for version in count())
    return next(name for name in names if not system.exists(name))


def write_merged(trainer: Any, module: nn.Module, task: int, title: str) -> None:
    """Writes the merged model beside the other checkpoints, and in the place of the last raw weights."""
    paths = []
    directory = getattr(trainer.checkpoint_callback, "dirpath", None)
    if directory is not None and not trainer.fast_dev_run:
        paths.append((on_one_process(trainer, lambda: _unused(join(directory, f"{title}-merged"))), True))
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "monitor", "") is None:
            for path in {callback.best_model_path, callback.last_model_path} - {""}:
                if not Path(path).is_symlink():
                    paths.append((path, callback.save_weights_only))
    for path, weights_only in paths:
        checkpoint = dump_checkpoint(trainer, weights_only)
        checkpoint.pop("lightning_merge", None)  # what an average of this fit says of its own weights
        checkpoint["state_dict"] = module.state_dict()
        checkpoint[KEY] = TaskSaved("merged", task, title).section()
        trainer.strategy.save_checkpoint(checkpoint, path)
    trainer.strategy.barrier("lightning_merge_continual")
