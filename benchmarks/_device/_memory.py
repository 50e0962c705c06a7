"""Part: peak memory above that of a plain run, in copies of the parameters."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from _device._averages import averages, others, peers
from _device._models import Batches, Images, trainer
from _device._session import Session


class _Peak(pl.Callback):
    """The highest that there was in training, apart from validation and publication."""

    bytes = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if torch.cuda.is_available() and trainer.global_step > 1:
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated())


def memory(session: Session) -> None:
    """A model of large layers, so that what is not parameters does not count."""
    width, layers = (32, 2) if session.tiny else (3584, 8)
    batch = [torch.randn(8, width, device=session.device), torch.randint(10, (8,), device=session.device)]
    plain: tuple[float, float] | None = None
    contestants = {"plain": lambda: [], **averages(), **others(), **peers(session)}
    if session.tiny:  # there is nothing to be seen on a CPU
        contestants = {name: contestants[name] for name in ("plain", "EMA")}
    for name, make in contestants.items():
        with session.guarded(name):
            with session.device:
                body = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.ReLU())]
                module = Images(nn.Sequential(*body, nn.BatchNorm1d(width), nn.Linear(width, 10)))
            size = sum(p.nbytes for p in module.parameters())
            watch, base = _Peak(), 0
            if session.cuda:
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated() - size
            trainer(session, [watch, *make()], max_epochs=2).fit(module, Batches(batch, 6), Batches(batch, 1))
            whole = torch.cuda.max_memory_allocated() if session.cuda else 0
            found = ((watch.bytes - base) / size, (whole - base) / size)
            plain = plain or found
            session.say(name, copies_in_training=found[0] - plain[0], copies_in_the_whole_fit=found[1] - plain[1])
            del module
