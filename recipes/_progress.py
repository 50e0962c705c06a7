"""A progress bar that stays on one line."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class OneLineProgressBar(RichProgressBar):
    """Lightning's bar, cut to the width of the terminal: a second line of metrics leaves copies of the bar behind."""

    def __init__(self) -> None:
        super().__init__()
        self._metrics = _Metrics()

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """The epoch, a bar, batches and the time that is left of it; then the metrics, which are cut off first."""
        return [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12, complete_style=self.theme.progress_bar, finished_style=self.theme.progress_bar),
            BatchesProcessedColumn(style=self.theme.batch_progress),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            self._metrics,
        ]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Says on the same line how far a validation in a fit is."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        elif self.is_enabled:
            self.has_dataloader_changed(dataloader_idx)
            batches = self.total_val_batches_current_dataloader
            self._metrics.text = f"validation {batch_idx}/{'--' if batches == float('inf') else batches}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """None for Lightning's own column, which wraps."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        self._metrics.text = " ".join(
            f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        )
        return {}


class _Metrics(ProgressColumn):
    """The metrics as they were last, beside the bar of the training."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1))
        self.text = ""

    def render(self, task: Task) -> Text:
        """Their names and values."""
        return Text(self.text if str(task.description).startswith("Epoch") else "", style="italic")
