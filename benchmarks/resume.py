"""Kills a run at random points, resumes it from its last file, and compares the end with the uninterrupted run.

    python benchmarks/resume.py --points 20 --seed 0 --output benchmarks/results/resume.json
    python benchmarks/resume.py --methods twa aswa aswa-hard sma posthoc-ema posthoc-ema-folder --points 12 \\
        --output benchmarks/results/resume-trajectory.json
    python benchmarks/resume.py --methods papa wash dart localsgd diloco warp forkmerge --points 9 \\
        --output benchmarks/results/resume-policies.json
    python benchmarks/resume.py --methods diloco-streaming --points 18 --output benchmarks/results/resume-streaming.json

Bit for bit: weights, averages, optimizer state, metrics and files. A point is a training batch, a validation batch, or
a write of a checkpoint that is cut in half. Children are forked from this process, which has torch and Lightning
imported: a start of both costs ten seconds.
"""

import contextlib
import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from _shared import header, parser, progress, write
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_merge.callbacks import (
    ASWA,
    BEMA,
    DART,
    EMA,
    LAWA,
    PAPA,
    SMA,
    SWA,
    SWAD,
    TWA,
    WARP,
    WASH,
    Anneal,
    DiLoCo,
    EvaluationWeights,
    ForkMerge,
    League,
    LocalSGD,
    Lookaround,
    PostHocEMA,
    RandomState,
)
from lightning_merge.search import Grid


def noisy(batch: list[Tensor]) -> list[Tensor]:
    """An augmentation that draws random numbers."""
    return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]


METHODS: dict[str, Callable[[], Any]] = {
    "ema": lambda: EMA(decay=0.9, validate="both"),
    "ema-share": lambda: EMA(half_life="20%"),  # looks at the length of the run before the loader is restored
    "swa": lambda: SWA(start_epoch=1, swa_lr=0.02, anneal_epochs=2),
    "lawa": lambda: LAWA(k=2, every_n_steps=3),
    "bema": lambda: BEMA(0.7, validate="both"),
    "evaluation-weights": lambda: EvaluationWeights(validate="both"),
    "anneal": lambda: Anneal("1-sqrt", "50%", validate="both"),
    "anneal-sliding": lambda: Anneal("cosine", 10, memory=4),
    "swad": lambda: SWAD("val/loss", n_converge=2, n_tolerance=2, stop=False, validate="both"),
    "twa": lambda: TWA(every=2, stage="50%", lr=0.05, inner="adamw"),
    "aswa": lambda: ASWA("val/loss", start_epoch=0, validate="both"),
    "aswa-hard": lambda: ASWA("val/loss", start_epoch=0, hard=True),
    "sma": lambda: SMA("val/loss", start_step=5),
    "posthoc-ema": lambda: PostHocEMA(every=4),
    "posthoc-ema-folder": lambda: PostHocEMA(every=4, directory="copies"),
    "lookaround": lambda: Lookaround(2, 3, [noisy, noisy], validate="both"),
    "lookaround-turns": lambda: Lookaround(3, 2, batches="turns", buffers="average"),
    "papa": lambda: PAPA(2, 3, pull=0.1),
    "wash": lambda: WASH(2, 2, share=0.2),
    "dart": lambda: DART(2, 4, start=5, augmentations=[noisy, noisy]),
    "localsgd": lambda: LocalSGD(2, 3, start=6),
    "diloco": lambda: DiLoCo(2, 3),
    "diloco-streaming": lambda: DiLoCo(2, 4, fragments=2, delay=3, mix=0.5, bits=8),
    "warp": lambda: WARP(2, 3, decay=0.8),
    # A grid of few shares: each is measured after a pass over the data for the statistics of BatchNorm.
    "forkmerge": lambda: ForkMerge({"one": {"sum": 1.0}, "both": {"sum": 1.0, "size": 0.5}}, 3, Grid(0.5)),
    "league": lambda: League([EMA(0.9, validate="raw"), LAWA(k=2, every_n_steps=3), SWA(start_epoch=1)], "val/loss"),
}
Run: TypeAlias = Callable[..., None]
"""Takes a method, a folder, and what is called at each event: ``train``."""

EPOCHS, BATCHES = 3, 8
EVENTS = {"train": EPOCHS * BATCHES, "validation": EPOCHS * 2 * 2, "write": EPOCHS * 3}


class Network(pl.LightningModule):
    """BatchNorm, dropout and a validation every half epoch: what a resumed run gets wrong first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.on_event: Callable[[str], None] = lambda kind: None
        self.has_tasks = False
        self.is_free = False  # of a schedule

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.trainer.training:  # not when BatchNorm statistics are measured
            self.on_event("train")
        found = self.net(batch[0])
        loss = nn.functional.mse_loss(found, batch[1])
        return {"losses": {"sum": loss, "size": found.square().mean()}} if self.has_tasks else loss

    def score_step(self, batch: list[Tensor]) -> tuple[Tensor, int]:
        return -nn.functional.mse_loss(self.net(batch[0]), batch[1], reduction="sum"), len(batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.on_event("validation")
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.is_free:
            import schedulefree  # type: ignore[import-untyped]

            return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.01, warmup_steps=3)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def loaders() -> tuple[StatefulDataLoader[Any], StatefulDataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCHES * 8, 8, generator=generator)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True) + 0.1 * torch.randn(len(inputs), 1, generator=generator))
    return StatefulDataLoader(data, batch_size=8, shuffle=True), StatefulDataLoader(data, batch_size=32)


def train(method: str, folder: Path, on_event: Callable[[str], None] | None = None) -> None:
    """One run, from the last file in the folder if there is one; writes ``end.pt``."""
    os.chdir(folder)  # where relative folders of a method are
    pl.seed_everything(7, verbose=False)
    callback = METHODS[method]()
    average = callback.contestants[0] if isinstance(callback, League) else callback
    network = Network()
    network.is_free = isinstance(average, EvaluationWeights)
    network.has_tasks = isinstance(average, ForkMerge)
    if on_event is not None:
        network.on_event = on_event
        cut_writes(on_event)
    # Every 7 steps, which never meets a validation (every 4) or the end of an epoch: a file that is written just before
    # one makes Lightning 2.6 leave it out when it resumes, and skip an epoch.
    by_step = ModelCheckpoint(folder, filename="batch-{step}", every_n_train_steps=7, save_top_k=-1)
    by_epoch = ModelCheckpoint(folder, filename="epoch-{step}", every_n_epochs=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        val_check_interval=0.5,
        accelerator="cpu",
        callbacks=[callback, RandomState(), by_step, by_epoch],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    files = sorted(folder.glob("*-step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    trainer.fit(network, *loaders(), ckpt_path=files[-1] if files else None)
    end = {
        "module": network.state_dict(),
        "merged": average.merged_weights(),
        "raw": average.raw_weights(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "metrics": average.final_metrics,
        "updates": average.updates,
        "window": getattr(average, "update_window", None),
        "synthesised": average.synthesise(0.07) if isinstance(average, PostHocEMA) else None,
        "final_file": torch.load(str(average.final_path), weights_only=True)["state_dict"],
    }
    if isinstance(callback, League):
        end["league"] = callback.winner, {name: each.score for name, each in callback.standings.items()}
        end["winner"] = torch.load(str(callback.path), weights_only=True)["state_dict"]
    torch.save(end, folder / "end.pt")


def cut_writes(on_event: Callable[[str], None]) -> None:
    """Makes a checkpoint's write an event between its two halves."""
    write = LocalFileOpener.write

    def halved(opener: LocalFileOpener, data: Any) -> int:
        half = len(data) // 2
        count = write(opener, data[:half])
        opener.f.flush()
        on_event("write")
        return int(count + write(opener, data[half:]))

    LocalFileOpener.write = halved


def in_child(work: Callable[[], None], log: Path) -> int:
    """Runs the work in a fork and returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def kill_at(kind: str, count: int) -> Callable[[str], None]:
    """Counts events of a kind and kills the process at one of them."""
    seen = 0

    def on_event(event: str) -> None:
        nonlocal seen
        seen += event == kind
        if event == kind and seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_event


def first_difference(left: Any, right: Any, where: str = "end") -> str | None:
    """Where two nested results differ; ``None`` if they are equal bit for bit."""
    if isinstance(left, Tensor):
        return None if torch.equal(left, right) else where
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return f"{where}: keys"
        found = (first_difference(left[key], right[key], f"{where}.{key}") for key in left)
        return next((difference for difference in found if difference), None)
    if isinstance(left, list | tuple):
        found = (first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True)))
        return next((difference for difference in found if difference), None)
    return None if left == right else where


def warm_up(run: Run, method: str, folder: Path) -> None:
    """A run in this process: what it imports on its way, each fork would import again."""
    place = folder / "warm-up"
    place.mkdir()
    with (place / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        run(method, place)
    os.chdir(folder)


def sweep(
    run: Run, events: Mapping[str, int], method: str, points: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Kills and resumes once per point; returns a row per point.

    Args:
        run: Runs a method in a folder, from where the folder is, and writes ``end.pt`` there.
        events: How many there are of each kind of event.
        method: Which.
        points: Kills.
        seed: Of the points.
        folder: Where to work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uninterrupted = folder / "uninterrupted"
    uninterrupted.mkdir()
    if in_child(lambda: run(method, uninterrupted), uninterrupted / "log.txt"):
        raise RuntimeError((uninterrupted / "log.txt").read_text())
    expected = torch.load(uninterrupted / "end.pt", weights_only=True)
    rows = []
    counts = {kind: random.Random(f"{method}-{seed}").sample(range(1, n + 1), n) for kind, n in events.items()}
    kinds = random.Random(f"kinds-{method}-{seed}").sample(list(events), len(events))
    for index in range(points):
        kind = kinds[index % len(kinds)]
        count = counts[kind][index // len(events) % events[kind]]
        place = folder / f"{index}-{kind}-{count}"
        place.mkdir()
        status = in_child(lambda: run(method, place, kill_at(kind, count)), place / "log.txt")  # noqa: B023
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        resumed = in_child(lambda: run(method, place), place / "log.txt")  # noqa: B023
        difference = "killed run ended by itself" if not killed else None
        if resumed:
            difference = (place / "log.txt").read_text()[-2000:]
        elif killed:
            difference = first_difference(expected, torch.load(place / "end.pt", weights_only=True))
        rows.append({"method": method, "killed_at": f"{kind} {count}", "equal": difference is None, "why": difference})
        progress(f"{method:16} killed at {rows[-1]['killed_at']:14} {difference or 'equal'}")
    return rows


def main(description: str | None, methods: Iterable[str], run: Run, events: Mapping[str, int], noun: str) -> int:
    """The command line of a sweep over methods; ``noun`` is what lines call the runs."""
    options = parser(description)
    options.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods))
    options.add_argument("--part", default="1/1", help="of the methods, as 1/2: two processes take half of them each")
    options.add_argument("--points", type=int, default=20, help="kills per method")
    options.add_argument("--seed", type=int, default=0, help="of the points")
    arguments = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads
    rows: list[dict[str, Any]] = []
    part, parts = map(int, arguments.part.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        warm_up(run, arguments.methods[0], Path(folder))
        for method in arguments.methods[part - 1 :: parts]:
            rows += sweep(run, events, method, arguments.points, arguments.seed, Path(folder) / method)
            write({**header("lightning"), "seed": arguments.seed, "rows": rows}, arguments.output)
    equal = sum(row["equal"] for row in rows)
    print(f"{equal} of {len(rows)} resumed {noun} equal the uninterrupted one bit for bit")
    return int(equal != len(rows))


if __name__ == "__main__":
    sys.exit(main(__doc__, METHODS, train, EVENTS, "runs"))
