"""Part: how often the host waits for the device, per step and per epoch, with every callback."""

import copy
import statistics
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl

from _device._averages import averages, others, peers
from _device._models import Batches, Images, images, net, trainer
from _device._session import Session
from _device._waits import Waits


class _Marks(pl.Callback):
    """How many waits there had been at the start of each step, by epoch."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.seen: list[list[tuple[int, int]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.seen.append([])
        self.seen[-1].append((self.waits.count, self.waits.ours))


def reads(session: Session) -> None:
    """Three epochs with each; the second is the steady state."""
    steps, count = (4, 2) if session.tiny else (20, 64)
    template = net(session, "resnet18", num_classes=10)
    batch = images(session, count, 32, 10)
    contestants = {"plain": lambda: [], **averages(), **others(), **peers(session)}
    for name, make in contestants.items():
        with session.guarded(name):
            waits = Waits(session.cuda)
            marks = _Marks(waits)
            fit = trainer(session, [marks, *make()], max_epochs=3)
            with waits:
                fit.fit(Images(copy.deepcopy(template), adamw=True), Batches(batch, steps), Batches(batch, 1))
            (*_, last), (after, *_) = marks.seen[1], marks.seen[2]
            each = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(marks.seen[1])]
            everything, ours = zip(*each, strict=True)
            session.say(
                name,
                per_step=statistics.median(everything),
                ours_per_step=statistics.mean(ours),
                at_the_epochs_end=[after[0] - last[0], after[1] - last[1]],
                most=dict(waits.sites.most_common(2)),
            )
