"""The report at the end of a run: a table, one sentence, a figure and a page."""

from collections.abc import Sized
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lightning_merge._checks import monitor, names
from lightning_merge.callbacks import Doctor, ForkMerge, Published
from lightning_merge.files._read import read
from lightning_merge.recipes.report import _page
from lightning_merge.recipes.report._curves import curve, curves_figure
from lightning_merge.recipes.report._path import WeightPath
from lightning_merge.recipes.report._shares import shares_figure
from lightning_merge.recipes.report._table import rows_of, sentence, table


class RunReport(Callback):
    """Compares raw and merged weights at the end of a fit: prints a table, and leaves two files in the run's folder.

    ``curves.png`` has the accuracy of each set over the run. ``report.html`` has that, the table, the branches that
    took part in each merge of a ``ForkMerge``, what a ``Doctor`` among the callbacks found, and the way of the weights
    with the averages on it. It needs nothing but a browser.

    Args:
        accuracy: Metric the sentence and the figure are about, a share in [0, 1].
        others: Further metrics for the table.
    """

    def __init__(self, accuracy: str = "val/acc", others: tuple[str, ...] = ("val/loss",)) -> None:
        self.accuracy = monitor("accuracy", accuracy)
        others = names("others", others)
        self.metrics = (accuracy, *others)
        # Name of the set -> optimizer step -> metric -> value; "raw" is a set.
        self.measured: dict[str, dict[int, dict[str, float]]] = {}
        self.trajectory = WeightPath()  # from where this fit began; in no checkpoint

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the raw weights for the page."""
        if trainer.is_global_zero:
            self.trajectory.add(pl_module, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the logged metrics; a later pass of the same validation adds to them."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        # Under the name of an average that is not ready yet, the raw weights are measured.
        averages = [average for average in _averages(trainer) if average.ready]
        plain = next((average.name for average in averages if average.owns_plain_names), "raw")
        for name in ("raw", *(average.name for average in averages)):
            for metric in self.metrics:
                value = trainer.callback_metrics.get(metric if name == plain else f"{name}/{metric}")
                if value is not None:
                    at_step = self.measured.setdefault(name, {}).setdefault(trainer.global_step, {})
                    at_step[metric] = float(value)

    def state_dict(self) -> dict[str, Any]:
        """Saves the curves, so that a resumed run shows them whole."""
        return {"measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the curves."""
        self.measured = state_dict["measured"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the progress bar, which would be redrawn over the final messages of averages."""
        _end_progress_bar(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table and draws the figure."""
        _end_progress_bar(trainer, pl_module)  # one of the last measurement
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if trainer.is_global_zero:
            self._report(trainer, folder)

    def _report(self, trainer: Trainer, folder: Path) -> None:
        averages = _averages(trainer)
        final = {name: points.get(trainer.global_step, {}) for name, points in self.measured.items()}
        final |= {average.name: average.final_metrics for average in averages if average.final_metrics}

        files = _files(trainer, averages)
        sentences = [sentence(self.accuracy, average, final, _images(trainer)) for average in averages]
        rows = rows_of(self.metrics, averages, final, files, folder)
        console = Console()
        console.print(table(self.metrics, rows))
        for line in sentences:
            console.print(line, soft_wrap=True)
        console.print(f"Run folder: {folder}", soft_wrap=True)
        curves = {name: curve(points, self.accuracy) for name, points in self.measured.items()}
        if any(curves.values()) and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
            path = folder / "curves.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            windows = {average.name: average.update_window for average in averages}
            curves_figure(curves, windows, self.accuracy, trainer.global_step).savefig(path)
            console.print(f"Figure:     {path}", soft_wrap=True)
            report = folder / "report.html"
            curves_drawn = (self.accuracy, _page.picture(path, "curves"))
            sections = [curves_drawn, *_shares(averages), *self._examined(trainer), *self._way(averages)]
            columns = ("weights", *self.metrics, "file, in the run folder")
            report.write_text(_page.page(str(folder), columns, rows, sentences, sections), encoding="utf-8")
            console.print(f"Report:     {report}", soft_wrap=True)

    def _examined(self, trainer: Trainer) -> list[tuple[str, str]]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
        sections = []
        for doctor in (callback for callback in callbacks if isinstance(callback, Doctor)):
            for name, found in doctor.examinations.items():
                sections.append((f"Is {name} sound?", _page.examination(name, found)))
            for name, losses in doctor.widths.items():
                sections.append((f"Which width of {name} would have been best?", _page.widths(name, losses)))
        return sections

    def _way(self, averages: list[Published]) -> list[tuple[str, str]]:
        if len(self.trajectory.points) < 3:
            return []
        merged = {average.name: average.merged_weights() or {} for average in averages if average.ready}
        return [("The way of the weights", _page.trajectory(*self.trajectory.plane(merged)))]


def _averages(trainer: Trainer) -> list[Published]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
    return [callback for callback in callbacks if isinstance(callback, Published)]


def _shares(averages: list[Published]) -> list[tuple[str, str]]:
    """Sections on the shares of each merge, for callbacks that search for them."""
    forks = [average for average in averages if isinstance(average, ForkMerge) and average.history]
    return [
        (f"What {fork.name} merged", _page.image(shares_figure(fork.history), "share of each branch in each merge"))
        for fork in forks
    ]


def _end_progress_bar(trainer: Trainer, module: LightningModule) -> None:
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.teardown(trainer, module, "fit")


def _images(trainer: Trainer) -> int | None:
    """Number of validation images, if there is one loader with a length and all of it is run."""
    dataset = getattr(trainer.val_dataloaders, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) and _is_all(trainer.limit_val_batches) else None


def _is_all(limit: int | float) -> bool:
    return isinstance(limit, float) and limit == 1.0  # the integer 1 is one batch


def _files(trainer: Trainer, averages: list[Published]) -> dict[str, str]:
    """Path of the file with the final weights of each set; raw weights may share a file with merged ones."""
    files = {average.name: average.final_path for average in averages if average.final_path}
    # Of two that hold the end the latest one's, which is overwritten by no better score.
    for checkpoint in sorted(trainer.checkpoint_callbacks, key=lambda each: getattr(each, "monitor", None) is not None):
        for path in (getattr(checkpoint, name, "") for name in ("last_model_path", "best_model_path")):
            if path and Path(path).is_file() and "raw" not in files:
                with suppress(ValueError):  # a file with objects of the user's own in it stays unread
                    content = read(path, check=False)
                    label = content.get("lightning_merge", {"holds": "raw"})
                    if content["global_step"] == trainer.global_step and (label["holds"] == "raw" or "raw" in label):
                        files["raw"] = path if label["holds"] == "raw" else f"{path} (to go on training)"
    return files
