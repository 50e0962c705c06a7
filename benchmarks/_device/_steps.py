"""Part: the time of a training step with and without each average, in blocks that take turns."""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from _device._averages import Make, averages, peers
from _device._models import Batches, Images, images, net, trainer
from _device._session import Session


class _Clock(pl.Callback):
    """Milliseconds of a step between two of them: until the host goes on, and until all is done."""

    def __init__(self, session: Session, first: int, last: int) -> None:
        self.session, self.first, self.last = session, first, last
        self.host = self.wall = float("nan")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.session.sync()
            self.start = time.perf_counter()
        elif batch_idx == self.last:
            each = 1e3 / (self.last - self.first)
            self.host = each * (time.perf_counter() - self.start)
            self.session.sync()
            self.wall = each * (time.perf_counter() - self.start)


def alternate(
    session: Session, what: str, make_module: Callable[[], pl.LightningModule], batch: Any, steps: tuple[int, int],
    contestants: Mapping[str, Make], rounds: int, seconds: float, **settings: Any,
) -> None:  # fmt: skip
    """Blocks of steps of each contestant in turn, and what they took."""
    walls: dict[str, list[float]] = defaultdict(list)
    hosts: dict[str, list[float]] = defaultdict(list)
    end, (warm, count) = time.perf_counter() + seconds, steps
    try:
        for number in range(rounds):
            for name, make in contestants.items():
                if number and (time.perf_counter() > end or not walls[name]):
                    continue
                with session.guarded(f"{what}, {name}"):
                    clock = _Clock(session, warm, warm + count)
                    run = trainer(session, [clock, *make()], max_epochs=1, **settings)
                    run.fit(make_module(), Batches(batch, warm + count + 1))
                    walls[name].append(clock.wall)
                    hosts[name].append(clock.host)
    finally:  # what there is, also when time is over
        plain = walls.get("plain", [])
        table = {
            name: {
                "ms": statistics.median(values),
                "host ms": statistics.median(hosts[name] or values),
                "x plain": statistics.median([a / b for a, b in zip(values, plain, strict=False)] or [float("nan")]),
            }
            for name, values in walls.items()
            if values
        }
        session.say(what, table=table)


def _contestants(session: Session, few: bool) -> dict[str, Make]:
    mine, theirs = averages(), peers(session)
    chosen = ("EMA", "EMA on the host") if few else ("EMA", "EMA on the host", "SWA", "LAWA", "PostHocEMA")
    return {"plain": lambda: [], **{name: mine[name] for name in chosen if name in mine}, **theirs}


def small_steps(session: Session) -> None:
    """A model of which the step is all launches: ResNet-18 on 32 pixels, bf16."""
    template = net(session, "resnet18", num_classes=10)
    steps, seconds = ((1, 2), 2.0) if session.tiny else ((20, 60), 30.0)
    for count, few in ((128, False), (1024, True)) if not session.tiny else ((2, False),):
        batch = images(session, count, 32, 10)
        alternate(
            session, f"ResNet-18, 32 px, batch {count}, bf16", lambda: Images(copy.deepcopy(template)), batch, steps,
            _contestants(session, few), 1 if session.tiny else 4, seconds, precision="bf16-mixed",
        )  # fmt: skip


def large_steps(session: Session) -> None:
    """A model of which the step is all arithmetic: ResNet-50 on 224 pixels, bf16, channels last."""
    count, pixels = (2, 32) if session.tiny else (128, 224)
    template = net(session, "resnet50").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pictures, classes = images(session, count, pixels, 1000)
    batch = [pictures.to(memory_format=torch.channels_last), classes]
    alternate(
        session, f"ResNet-50, {pixels} px, batch {count}, bf16, channels last", lambda: Images(copy.deepcopy(template)),
        batch, (1, 2) if session.tiny else (10, 40), _contestants(session, few=True), 1 if session.tiny else 3,
        2.0 if session.tiny else 30.0, precision="bf16-mixed", benchmark=True,
    )  # fmt: skip


def compiled_steps(session: Session) -> None:
    """A compiled model, in the default mode and with CUDA graphs."""
    width, layers = (16, 2) if session.tiny else (256, 24)
    body = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.GELU())]
    batch = [torch.randn(128, width, device=session.device), torch.randint(10, (128,), device=session.device)]
    for mode in ("default", "reduce-overhead"):
        if session.tiny:
            session.say(f"torch.compile, {mode}", skipped="it compiles for longer than a dry run takes")
            continue
        with session.guarded(f"torch.compile, {mode}"):
            torch.manual_seed(0)
            plain = nn.Sequential(*copy.deepcopy(body), nn.Linear(width, 10)).to(session.device)
            network = torch.compile(plain, mode=mode)

            def module(plain: nn.Module = plain, network: Any = network) -> Images:
                plain.to(session.device)
                return Images(network)

            several = _contestants(session, few=True)
            alternate(session, f"torch.compile, {mode}, 24 layers of 256", module, batch, (20, 60), several, 2, 10.0)
