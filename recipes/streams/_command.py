"""``lightning-merge run continual/NAME``: a whole stream of tasks from a config."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_merge.callbacks import ContinualMerging, RandomState
from lightning_merge.files import atomic
from lightning_merge.recipes._lightning_cli import Parser, quiet
from lightning_merge.recipes.streams._report import show
from lightning_merge.recipes.streams._run import newest_checkpoint, run_stream
from lightning_merge.recipes.streams._stream import Stream
from lightning_merge.recipes.streams._tasks import TaskData


class StreamCLI(LightningCLI):
    """A recipe's classes, the callback's arguments and the stream's."""

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
    cli = parse(arguments)
    folder = Path(cli.config_init["trainer"]["default_root_dir"])
    stream: Stream = cli.config_init["stream"]
    merging = merging_of(cli, folder)
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


def parse(arguments: list[str]) -> StreamCLI:
    """Model, data, stream and Trainer of a config."""
    quiet()
    return StreamCLI(
        args=arguments,
        run=False,
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        save_config_callback=None,
    )


def merging_of(cli: StreamCLI, folder: Path) -> ContinualMerging:
    """The callback, with the bank of the run's folder."""
    merging: ContinualMerging = cli.config_init["merge"]
    merging.folder = folder / "bank"
    return merging


def _base(
    arguments: list[str], stream: Stream, held_out: TaskData, folder: Path, seed: int, progress: Callback
) -> dict[str, torch.Tensor]:
    """Trains the base on the held-out classes, or reads it; schedules have the length of its training."""
    path = folder / "base.ckpt"
    if not path.is_file():
        cli = parse([*arguments, f"--trainer.max_epochs={stream.base_epochs}"])
        seed_everything(seed, verbose=False)
        place = folder / "checkpoints" / "base"
        latest = ModelCheckpoint(place, filename="{epoch}", save_top_k=1)
        fit = cli.trainer_of([progress, RandomState(), latest])
        fit.fit(cli.model, datamodule=held_out, ckpt_path=newest_checkpoint(place))
        with atomic(path) as file:
            torch.save(cli.model.state_dict(), file)
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state
