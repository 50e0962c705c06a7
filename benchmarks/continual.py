"""Continual learning by merging, without replay: split CIFAR-10 and split Tiny ImageNet.

    python benchmarks/continual.py --cifar10 data/cifar10 --tiny data/tiny-imagenet-50 --seeds 3 \
        --output benchmarks/results/continual.json

The base is trained on held-out classes first: of CIFAR-10 4 of 10 classes, then 3 tasks of 2; of 50 classes of Tiny
ImageNet, at 32 pixels, 20, then 3 tasks of 10. A seed chooses the order of classes, and with it those held out, the
start of the base and the order of batches. ResNet-8 with BatchNorm, one thread, bfloat16 autocast. All rows train the
same number of epochs with the same loss, cross-entropy among the classes of the task, and the same head, whose rows are
kept per class. `accuracy` is among all classes seen so far, `accuracy_in_task` among those of the sample's task; both
are on at most 500 test images per class.

At most 4 settings per method are compared on a stream of other seed and on images held out of training (CIFAR-10 only);
the best by the final `accuracy_in_task` is used for both data sets and all seeds. Methods that train alike share the
training: the module is given the trained weights, and only the merging and the measuring are done again.
"""

import json
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from _shared import header, parser, progress, write
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_merge.callbacks import Anchor, ContinualMerging
from lightning_merge.combiners import ExponentialAverage
from lightning_merge.continual import PRESETS, Split
from lightning_merge.recipes import Classifier, SmallResNet, TaskData, WarmupCosine, jointly, split_by_class
from lightning_merge.recipes.streams._run import run_stream
from lightning_merge.recipes.vision._pixels import Images
from lightning_merge.selections import Selection

COLOURS = (0.48, 0.46, 0.41), (0.26, 0.25, 0.27)
VALIDATION_SEED = 100


@dataclass(frozen=True)
class Setting:
    """A data set, and how long it is trained."""

    name: str
    test: str
    classes: int
    held_out: int
    images: int
    val_images: int
    base_epochs: int
    epochs: int
    lr: float = 0.05
    base_lr: float = 0.1
    batch: int = 64
    accelerator: str = "cpu"


SETTINGS = {
    "cifar10": Setting("cifar10", "test", 10, 4, 1000, 200, base_epochs=8, epochs=4),
    "tiny": Setting("tiny", "val", 50, 20, 300, 50, base_epochs=10, epochs=4),
}


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    preset: str = ""
    scale: float | None = None
    buffers: str = "recompute"
    ewc: float | None = None

    @property
    def trajectory(self) -> str:
        """What it shares its training with; empty if nothing."""
        if self.ewc is not None or self.preset == "ema":
            return ""
        return "lora" if self.preset == "lora-arithmetic" else self.merging(Path()).init_from

    def merging(self, folder: Path) -> ContinualMerging:
        selection = Selection(trainable=True, buffers=self.buffers)  # type: ignore[arg-type]
        if self.name in ("naive", "ewc"):
            last = ExponentialAverage(alpha=1.0)  # what is deployed is where training is
            return ContinualMerging(last, folder / "bank", init_from="last", selection=selection)
        return ContinualMerging(self.preset, folder / "bank", scale=self.scale, selection=selection)


def grid(name: str, buffers: str) -> list[Method]:
    """What is compared for a method, at most four settings."""
    if name == "naive":
        return [Method("naive", buffers="copy")]
    if name == "ewc":
        return [Method("ewc", buffers="copy", ewc=strength) for strength in (1.0, 3.0, 10.0, 30.0)]
    if name in ("average", "magmax"):
        scales: list[float | None] = [None] if name == "average" else [0.5, 1.0]
        return [Method(name, name, scale, each) for scale in scales for each in ("recompute", "average")]
    scaled = {"sum": [0.3, 0.6, 1.0], "ties": [1.0, 2.0], "wise-ft": [0.5, 0.8]}
    return [Method(name, name, scale, buffers) for scale in scaled.get(name, [None])]


class Pixels(pl.LightningDataModule):
    """Images in memory. ``measured`` says whether a test measures the test images or those held out of training."""

    def __init__(self, setting: Setting, root: Path, cache: Path) -> None:
        super().__init__()
        path = cache / f"{setting.name}.pt"
        if not path.exists():
            torch.save(_read(setting, root), path)
        images = torch.load(path)
        order = torch.randperm(len(images["train labels"]), generator=torch.Generator().manual_seed(0))
        by_class = [order[images["train labels"][order] == c] for c in range(setting.classes)]
        shown = torch.cat([(images["test labels"] == c).nonzero().flatten()[:500] for c in range(setting.classes)])
        train = torch.cat([each[: setting.images] for each in by_class])
        held = torch.cat([each[setting.images : setting.images + setting.val_images] for each in by_class])
        self.batch = setting.batch
        self.training = Images(images["train"][train], images["train labels"][train], *COLOURS, padding=4)
        self.parts = {
            "val": Images(images["train"][held], images["train labels"][held], *COLOURS, padding=0),
            "test": Images(images["test"][shown], images["test labels"][shown], *COLOURS, padding=0),
        }
        self.measured = "test"

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.training, self.batch, shuffle=True, drop_last=True, collate_fn=_same)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[self.measured], 500, collate_fn=_same)


class Replay(pl.Callback):
    """Keeps the trained weights of a task, and puts them in the place of training when another method trains alike."""

    def __init__(self, store: dict[Any, dict[str, Tensor]], key: Any) -> None:
        self.store, self.key = store, key
        self.known = key in store

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.known:
            pl_module.load_state_dict(self.store[self.key])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.known:
            pl_module.load_state_dict(self.store[self.key])  # the few batches that were kept have moved it
        else:
            self.store[self.key] = {name: t.detach().clone() for name, t in pl_module.state_dict().items()}


def run(setting: Setting, data: Pixels, method: Method, seed: int, store: dict[Any, Any]) -> dict[str, Any]:
    """One row: its record, and the seconds it took (training that was shared is not among them)."""
    start = time.perf_counter()
    order = Split.of(setting.classes, tasks=1, seed=seed).tasks[0]
    split = Split(tuple(Split.of(order[setting.held_out :], tasks=3, seed=None).tasks), "class", seed)
    tasks = split_by_class(data, split)
    if (seed, "base") not in store:
        store[seed, "base"] = base(setting, data, order[: setting.held_out], seed)
    module = network(setting, setting.epochs)
    module.load_state_dict(store[seed, "base"])
    record = measured(setting, tasks, module, method, seed, store)
    return {**record, "seconds": round(time.perf_counter() - start, 1)}


def measured(
    setting: Setting, tasks: list[TaskData], module: Classifier, method: Method, seed: int, store: dict[Any, Any]
) -> dict[str, Any]:
    """The record of a stream that starts from a module as it is, or of one fit on everything."""
    if method.name == "joint":
        pl.seed_everything(seed, verbose=False)
        everything = jointly(tasks)
        trainer(setting, setting.epochs).fit(module, datamodule=everything)
        row: dict[str, list[float]] = {"accuracy": [], "accuracy_in_task": []}
        for task in tasks:
            task.choices = everything.choices
            found = trainer(setting).test(module, datamodule=task, verbose=False)[0]
            row["accuracy"].append(found["test/acc"])
            row["accuracy_in_task"].append(found["test/acc_in_task"])
        metrics = {kind: {"final_average": round(float(np.mean(values)), 6)} for kind, values in row.items()}
        return {"rows": [row], "metrics": metrics}
    return stream(setting, tasks, module, method, seed, store)


def stream(
    setting: Setting, tasks: list[TaskData], module: Classifier, method: Method, seed: int, store: dict[Any, Any]
) -> dict[str, Any]:
    anchor = [] if method.ewc is None else [Anchor(method.ewc, "fisher", at="last")]
    replays: dict[int, Replay] = {}

    def callbacks(index: int) -> list[pl.Callback]:
        if not method.trajectory:
            return [*anchor]
        replays[index] = Replay(store, (seed, method.trajectory, index))
        return [replays[index]]

    def make(chosen: list[pl.Callback]) -> pl.Trainer:
        known = any(isinstance(callback, Replay) and callback.known for callback in chosen)
        return trainer(setting, 1 if known else setting.epochs, chosen, limit_train_batches=16 if known else 1.0)

    with tempfile.TemporaryDirectory() as folder:
        merging = method.merging(Path(folder))
        return run_stream(module, tasks, merging, Path(folder), make, seed=seed, callbacks=callbacks)


def base(setting: Setting, data: Pixels, classes: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Trained on the classes that are in no task."""
    pl.seed_everything(seed, verbose=False)
    module = network(setting, setting.base_epochs, setting.base_lr)
    task = TaskData(data, "base", classes, classes)
    trainer(setting, setting.base_epochs).fit(module, datamodule=task)
    progress(f"base: {trainer(setting).test(module, datamodule=task, verbose=False)}")
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def network(setting: Setting, epochs: int, lr: float | None = None) -> Classifier:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr or setting.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return WarmupCosine(optimizer, epochs, warmup_epochs=1)

    model = SmallResNet(setting.classes, blocks=1, width=16).to(memory_format=torch.channels_last)
    return Classifier(model, setting.classes, optimizer=sgd, lr_scheduler=schedule)


def trainer(
    setting: Setting, epochs: int = 1, callbacks: list[pl.Callback] | None = None, **settings: Any
) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=[c for c in callbacks or [] if not isinstance(c, pl.callbacks.ModelCheckpoint)],
        accelerator=setting.accelerator,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )


def tuned(name: str, setting: Setting, data: Pixels, store: dict[Any, Any], buffers: str, rows: list[Any]) -> Method:
    """The best setting of a method on the validation stream."""
    methods = grid(name, buffers)
    if len(methods) == 1:
        return methods[0]
    data.measured = "val"
    scores = []
    for method in methods:
        try:
            record = run(setting, data, method, VALIDATION_SEED, store)
        except Exception as error:  # training may diverge: weights that are not finite are refused
            scores.append(0.0)
            rows.append({"method": method.__dict__, "error": str(error)})
            progress(f"tuning: {json.dumps(rows[-1])}")
            continue
        scores.append(record["metrics"]["accuracy_in_task"]["final_average"])
        both = {kind: figures["final_average"] for kind, figures in record["metrics"].items()}
        rows.append({"method": method.__dict__, "final_average": both})
        progress(f"tuning: {json.dumps(rows[-1])}")
    data.measured = "test"
    return methods[scores.index(max(scores))]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each figure of each method."""
    table: dict[str, Any] = {}
    for data_set in dict.fromkeys(row["data"] for row in rows):
        for name in dict.fromkeys(row["method"]["name"] for row in rows):
            found = [row for row in rows if row["data"] == data_set and row["method"]["name"] == name]
            if not found:
                table.setdefault(data_set, {})[name] = "not reached"
                continue
            figures: dict[str, Any] = {"seeds": len(found)}
            for kind in ("accuracy", "accuracy_in_task"):
                for figure in found[0]["metrics"][kind]:
                    values = [row["metrics"][kind][figure] for row in found]
                    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                    figures[f"{kind}/{figure}"] = [round(float(np.mean(values)), 4), deviation and round(deviation, 4)]
            table.setdefault(data_set, {})[name] = figures
    return table


def _read(setting: Setting, root: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, folder in (("train", "train"), ("test", setting.test)):
        names = sorted(path.name for path in (root / folder).iterdir() if path.is_dir())
        pixels, labels = [], []
        for label, name in enumerate(names):
            for file in sorted((root / folder / name).rglob("*.[pPjJ]*")):
                with Image.open(file) as image:
                    rgb = image.convert("RGB").resize((32, 32), Image.Resampling.BOX)
                pixels.append(torch.from_numpy(np.array(rgb)).permute(2, 0, 1))
                labels.append(label)
        found[part], found[f"{part} labels"] = torch.stack(pixels), torch.tensor(labels)
    return found


def _same(batch: Any) -> Any:
    return batch


def main() -> None:
    options = parser(__doc__, output=False)
    options.add_argument("--cifar10", type=Path, help="folder of train/<class>/ and test/<class>/")
    options.add_argument("--tiny", type=Path, help="folder of train/<class>/ and val/<class>/")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, help="per task, instead of 4")
    options.add_argument("--images", type=int, help="per class, to try it")
    options.add_argument("--methods", nargs="+", default=["naive", "joint", "ewc", *PRESETS])
    options.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()), help="where decoded images are kept"
    )
    options.add_argument("--output", type=Path, required=True)
    arguments = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    settings = {name: s for name, s in SETTINGS.items() if getattr(arguments, name) is not None}
    for name, setting in settings.items():
        epochs = {} if arguments.epochs is None else {"epochs": arguments.epochs, "base_epochs": arguments.epochs}
        images = {} if arguments.images is None else {"images": arguments.images}
        settings[name] = replace(setting, **epochs, **images)
    data = {name: Pixels(setting, getattr(arguments, name), arguments.cache) for name, setting in settings.items()}
    stores: dict[str, dict[Any, Any]] = {name: {} for name in settings}
    rows: list[dict[str, Any]] = []
    tuning: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    chosen: dict[str, Method] = {}
    first = next(iter(settings))
    begin = time.perf_counter()
    for seed in range(arguments.seeds):
        for name in arguments.methods:
            if name == "joint":
                chosen[name] = Method("joint")
            elif name not in chosen:
                buffers = chosen["average"].buffers if "average" in chosen else "recompute"
                chosen[name] = tuned(name, settings[first], data[first], stores[first], buffers, tuning)
            for data_set, setting in settings.items():
                row = {"data": data_set, "seed": seed, "method": chosen[name].__dict__}
                try:
                    found = run(setting, data[data_set], chosen[name], seed, stores[data_set])
                except Exception as error:
                    failed.append({**row, "error": str(error)})
                    progress(f"failed: {json.dumps(failed[-1])}")
                    continue
                rows.append({**row, **{key: found.get(key) for key in ("metrics", "rows", "baseline", "seconds")}})
                figures = {kind: found["metrics"][kind]["final_average"] for kind in found["metrics"]}
                progress(json.dumps({**row, **figures, "seconds": found["seconds"]}))
            result = {
                **header("lightning"),
                "seconds": round(time.perf_counter() - begin),
                "settings": {name: setting.__dict__ for name, setting in settings.items()},
                "validation_stream_seed": VALIDATION_SEED,
                "tuning": tuning,
                "failed": failed,
                "not_reached": [name for name in arguments.methods if name not in {r["method"]["name"] for r in rows}],
                "summary": summary(rows),
                "runs": rows,
            }
            write(result, arguments.output)


if __name__ == "__main__":
    main()
