"""Measuring weights with the model and data of a run: what ``verify`` and ``doctor`` have in common."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lightning_merge.weights import Weights, canonical

PARTS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")


class Bench:
    """The model, data and Trainer of a configuration, to measure weights with: one device, no logger, no callbacks.

    Args:
        config: A ``config.yaml`` as ``lightning-merge run`` and ``fit`` leave it in a run folder, or a recipe.

    Raises:
        ValueError: If there is no such file, or it says neither model nor data.
    """

    def __init__(self, config: Path) -> None:
        from lightning_merge.recipes._lightning_cli import instantiate

        if not config.is_file():
            raise ValueError(f"there is no file {config}: give the `config.yaml` of the run, or a recipe's file.")
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError(f"{config} names no `model`, so nothing can be measured with it.")
        kept = {key: value for key, value in content.items() if key in PARTS and value is not None}
        trainer = {key: value for key, value in kept.get("trainer", {}).items() if key not in _DROPPED}
        kept["trainer"] = trainer | _QUIET
        with quiet(), tempfile.TemporaryDirectory() as folder:
            measured = Path(folder) / "config.yaml"
            measured.write_text(yaml.safe_dump(kept), encoding="utf-8")
            self.trainer, self.model, self.data = instantiate(measured)

    def load(self, weights: Weights) -> None:
        """Puts weights under canonical names into the model, which may be wrapped.

        Raises:
            RuntimeError: If they are not all of the model's.
        """
        keys = {canonical(key): key for key in self.model.state_dict()}
        self.model.load_state_dict({keys.get(canonical(name), name): value for name, value in weights.items()})

    def metrics(self, weights: Weights | None = None, path: Path | None = None) -> dict[str, float]:
        """What validation logs for these weights, or for a checkpoint."""
        if weights is not None:
            self.load(weights)
        with quiet():
            self.trainer.validate(
                self.model, datamodule=self.data, verbose=False, ckpt_path=None if path is None else str(path)
            )
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def loss(self, weights: Weights, monitor: str) -> float:
        """The loss that validation logs for these weights.

        Raises:
            ValueError: If it logs none of that name.
        """
        metrics = self.metrics(weights)
        if monitor not in metrics:
            raise ValueError(
                f"`--monitor` must be a loss that validation logs, got {monitor!r}; it logs:"
                f" {', '.join(sorted(metrics)) or 'nothing'}."
            )
        return metrics[monitor]

    def set_up(self, weights: Weights | None = None) -> None:
        """Sets up devices, data and a model that builds itself then, by a pass that draws random numbers; once."""
        if not self.trainer.callback_metrics:
            self.metrics(weights)

    def statistics(self, weights: Weights, batches: int = 50) -> Weights:
        """BatchNorm statistics of these weights, on the first training batches."""
        from itertools import islice

        from lightning_merge.calibration import batch_norm_layers
        from lightning_merge.callbacks._lightning._recalibrate import recalibrate
        from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
        from lightning_merge.callbacks._lightning._user_step import transferred
        from lightning_merge.weights import canonical

        if not batch_norm_layers(self.model):
            return {}
        self.set_up(weights)
        self.load(weights)
        loader = self.training_loader()
        recent = RecentBatches(transferred(self.trainer, self.model, batch) for batch in islice(loader, batches))
        with quiet():
            fresh = recalibrate(self.trainer, self.model, "doctor", recent)
        keys = {canonical(key): key for key in weights}
        return {keys[name]: tensor for name, tensor in fresh.items()}

    def training_loader(self) -> Any:
        """The loader that the run trains on."""
        if self.data is None:
            return self.model.train_dataloader()
        self.data.prepare_data()
        self.data.setup("fit")
        return self.data.train_dataloader()

    def validation_loader(self) -> Any:
        """The loader, or loaders, that the run validates on."""
        if self.data is None:
            return self.model.val_dataloader()
        self.data.prepare_data()
        self.data.setup("validate")
        return self.data.val_dataloader()


_DROPPED = (
    "callbacks",
    "strategy",
    "num_nodes",
    "plugins",
    "profiler",
    "fast_dev_run",
    "barebones",
    "use_distributed_sampler",
)
_QUIET: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's lines about devices and the files it reads."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
