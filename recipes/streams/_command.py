"""``lightning-merge run continual/NAME`` and ``lightning-merge unlearn``: a whole stream of tasks from a config."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_merge.callbacks import ContinualMerging, RandomState
from lightning_merge.continual import Bank
from lightning_merge.files import atomic
from lightning_merge.recipes._lightning_cli import Parser, quiet
from lightning_merge.recipes.streams._report import show
from lightning_merge.recipes.streams._run import accuracies, newest_checkpoint, run_stream
from lightning_merge.recipes.streams._stream import Stream
from lightning_merge.recipes.streams._tasks import TaskData


class _CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(ContinualMerging, "merge", skip={"bank"})
        parser.add_class_arguments(Stream, "stream")

    def trainer_of(self, callbacks: list[Callback], **settings: Any) -> Trainer:
        """Builds a new Trainer as configured, with these callbacks added."""
        # The first Trainer, which LightningCLI makes to no purpose here, has put its own among the configured ones.
        own = (Checkpoint, ModelSummary, ProgressBar)
        configured = [c for c in self.config_init["trainer"].get("callbacks") or [] if not isinstance(c, own)]
        checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        return self.instantiate_trainer(
            callbacks=[*configured, *callbacks], enable_checkpointing=checkpoints, logger=False, **settings
        )


class _Progress(Callback):
    """One progress bar for the whole stream, over the epochs of all tasks."""

    def __init__(self, bar: Progress, task: Any, title: str) -> None:
        self.bar, self.task, self.title = bar, task, title

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.update(self.task, description=f"{self.title}, epoch {trainer.current_epoch + 1}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.advance(self.task)


def run(arguments: list[str]) -> None:
    """Trains the base and then every task, resumes an earlier run of the folder, and shows the result."""
    cli = _parse(arguments)
    folder = Path(cli.config_init["trainer"]["default_root_dir"])
    stream: Stream = cli.config_init["stream"]
    merging = _merging(cli, folder)
    tasks, held_out = stream.of(cli.datamodule)
    seed = cli.config_init["seed_everything"] or 0
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    cli.parser.save(cli.config, folder / "config.yaml", overwrite=True, multifile=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        epochs = cli.config_init["trainer"]["max_epochs"]
        done = bar.add_task("", total=stream.base_epochs + len(tasks) * epochs)
        if held_out is not None:
            cli.model.load_state_dict(_base(arguments, stream, held_out, folder, seed, _Progress(bar, done, "base")))
        bar.update(done, completed=stream.base_epochs + merging.completed * epochs)

        def callbacks(index: int) -> list[Callback]:
            return [_Progress(bar, done, f"{tasks[index].task} ({index + 1} of {len(tasks)})")]

        record = run_stream(
            cli.model, tasks, merging, folder, cli.trainer_of, seed=seed, callbacks=callbacks, log=bar.console.print
        )
    show(record, folder, console)


def unlearn(folder: Path, task: str, keep: float) -> bool:
    """Subtracts a task's vector from a finished stream, and prints the effect on it and on the control tasks.

    Args:
        folder: Of the stream; its bank must have kept every vector, or merge by a sum or mean.
        task: Which one.
        keep: The share of their mean accuracy that the control tasks must keep, in (0, 1]; else nothing is changed.

    Returns:
        Whether they did.

    Raises:
        ValueError: If ``keep`` is out of range, or the folder holds no stream, or no such task.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"`keep` must be in (0, 1], got {keep}.")
    for name in ("config.yaml", "stream.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no stream: it has no {name}. Name the folder of a `run continual/...`.")
    cli = _parse(["--config", str(folder / "config.yaml")])
    tasks, _ = cli.config_init["stream"].of(cli.datamodule)
    merging = _merging(cli, folder)
    names = [each.task for each in tasks]
    tester = cli.trainer_of([])

    merging.load_merged(cli.model)
    before = accuracies(tester, cli.model, tasks, merging.completed - 1)["accuracy"]
    merging.load_merged(cli.model, without=task)
    after = accuracies(tester, cli.model, tasks, merging.completed - 1)["accuracy"]
    console = Console()
    merged = [index for index, name in enumerate(names) if name in merging.tasks]
    for index in merged:
        role = "unlearned" if names[index] == task else "control"
        console.print(f"{names[index]:10} {before[index]:7.1%} -> {after[index]:7.1%}  {role}")
    control = [index for index in merged if names[index] != task]
    was, now = (sum(row[index] for index in control) / max(1, len(control)) for row in (before, after))
    kept = now >= keep * was
    console.print(f"control tasks: {was:.1%} -> {now:.1%}; {keep:.0%} of it must be kept")
    if kept:
        with atomic(folder / f"without-{task}.ckpt") as file:
            torch.save({"state_dict": cli.model.state_dict()}, file)
        Bank(merging.folder).remove(task)
        console.print(f"{task} is unlearned; the merged model is in {folder / f'without-{task}.ckpt'}")
        record = json.loads((folder / "stream.json").read_text())
        record.setdefault("unlearned", []).append({"task": task, "before": before, "after": after})
        with atomic(folder / "stream.json") as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
    else:
        console.print("Nothing was changed: the other tasks would lose too much. A lower `--keep` accepts it.")
    return kept


def _parse(arguments: list[str]) -> _CLI:
    quiet()
    return _CLI(
        args=arguments,
        run=False,
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        save_config_callback=None,
    )


def _merging(cli: _CLI, folder: Path) -> ContinualMerging:
    merging: ContinualMerging = cli.config_init["merge"]
    merging.folder = folder / "bank"
    return merging


def _base(
    arguments: list[str], stream: Stream, held_out: TaskData, folder: Path, seed: int, progress: Callback
) -> dict[str, torch.Tensor]:
    """Trains the base on the held-out classes, or reads it; schedules have the length of its training."""
    path = folder / "base.ckpt"
    if not path.is_file():
        cli = _parse([*arguments, f"--trainer.max_epochs={stream.base_epochs}"])
        seed_everything(seed, verbose=False)
        place = folder / "checkpoints" / "base"
        latest = ModelCheckpoint(place, filename="{epoch}", save_top_k=1)
        fit = cli.trainer_of([progress, RandomState(), latest])
        fit.fit(cli.model, datamodule=held_out, ckpt_path=newest_checkpoint(place))
        with atomic(path) as file:
            torch.save(cli.model.state_dict(), file)
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state
