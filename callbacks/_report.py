"""A page on a fit: what was measured on raw and on merged weights, and how the averages stood."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._checks import one_of
from lightning_merge._choice import Mode, mode_of
from lightning_merge._report._page import NAME, page
from lightning_merge._report._record import Curve, Curves, Record, add
from lightning_merge.callbacks._lightning._metrics import logged_of_loop, logged_step, logs_now, written_metrics
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._health import HealthReader
from lightning_merge.callbacks._publication._homecoming import Traveller
from lightning_merge.callbacks._publication._ledger import RAW
from lightning_merge.callbacks._publication._pass import is_number
from lightning_merge.callbacks._publication._session import Publisher
from lightning_merge.callbacks._report_run._ages import age_of
from lightning_merge.files._write import atomic, exists, is_remote, join


class Report(HealthReader, Traveller, Callback):
    """Writes ``merge-report.html`` at the end of a fit, also of one that failed or was stopped.

    The page needs nothing but a browser, and a phone shows it. On it are, by step as loggers count: every metric that
    validation logs, of the raw weights and of each average, with the best of each; what is logged while training; how
    each average stands (``updates``, ``distance``, ``start_share``, ``decay``); and how old the weights in it are. It
    works with any Trainer, with a logger or none, also without averages. A run that is resumed goes on with its curves.
    ``lightning-merge report RUN RUN`` draws several runs over each other.

    It lies in the folder of the first logger; without one in ``default_root_dir``, where the next run writes over it.
    Metrics are those of ``self.log``; of a curve of more than a thousand points some are left out, never the best.

    Args:
        monitor: A metric that is shown first, under its plain name; by default all are in the order of logging.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is. It can be left out where the last word of the name
            says it, as ``val/loss`` or ``val/acc``; of other metrics both ends are shown.

    Attributes:
        path: The page, once it is written.

    Raises:
        ValueError: If ``mode`` is given without ``monitor``, or needed.

    Example:
        >>> Report("val/acc").mode
        'max'
    """

    def __init__(self, monitor: str | None = None, mode: Mode | None = None) -> None:
        if monitor is None and mode is not None:
            raise ValueError(f"`mode` says which values of `monitor` are better: give that too, got {mode!r} alone.")
        self.monitor = None if monitor is None else checked_monitor("monitor", monitor)
        mode = None if mode is None else one_of("mode", mode, Mode)
        self.mode = None if self.monitor is None else mode_of(type(self).__name__, self.monitor, mode)
        self.path: str | None = None
        self._record = Record()
        self._folder: str | None = None
        self._before: dict[str, Any] = {}  # the metrics when the validation that is going on began
        self.expect()

    # ---- a fit begins and ends

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the folder while all processes can be asked."""
        self._folder = str(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what is ahead of where the run goes on from."""
        self._record.cut(logged_step(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the page."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what there is."""
        if self._folder is not None:
            name = type(exception).__name__
            self._record.notes.append(f"The fit ended with {name} at step {logged_step(trainer)}.")
            self._write(trainer)

    # ---- what is noted; all processes ask for metrics, which may be sums over them

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes what loggers are about to get."""
        if logs_now(trainer):
            self._note(trainer, logged_of_loop(trainer), self._record.trained, RAW)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the metrics of the epoch."""
        self._note(trainer, logged_of_loop(trainer), self._record.trained, RAW)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is written from here on is of this validation, or of the weights that it measures first."""
        self._before = dict(written_metrics(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what was measured, on whichever weights it was."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        publisher = Publisher.of(trainer)
        running = None if publisher is None else publisher.validation.running
        holds, prefixes = (RAW, []) if running is None else (running.holds, running.prefixes)
        metrics = written_metrics(trainer)
        logged = {key: value for key, value in metrics.items() if self._before.get(key) is not value}
        self._note(trainer, logged, self._record.measured, holds, prefixes)

    def take_health(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """See ``HealthReader``."""
        for name, values in found.items():
            for key, value in values.items():
                add(self._record.health, key, name, step, value)

    def _note(
        self, trainer: Trainer, logged: Mapping[str, Any], curves: Curves, of: str, prefixes: Sequence[str] = ()
    ) -> None:
        if not trainer.is_global_zero:
            return
        for key, value in logged.items():
            prefix = next((each for each in prefixes if each and key.startswith(each)), "")
            if is_number(value):
                add(curves, key.removeprefix(prefix), of, logged_step(trainer), float(value))

    # ---- the page

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
            return
        try:
            self._finish(trainer)
            self.path = self._save()
        except Exception as error:  # nobody's training fails for a page, and no error is hidden by it
            rank_zero_warn(f"Report was not written, since {type(error).__name__} was raised: {error}")
        else:
            rank_zero_info(f"Report: {self.path}")

    def _finish(self, trainer: Trainer) -> None:
        record = self._record
        record.title = "/".join(str(self._folder).replace(os.sep, "/").split("/")[-2:])
        record.monitor, record.mode = self.monitor, self.mode
        record.about, record.ages = {}, {}
        if self.monitor is not None and self.monitor not in {**record.measured, **record.trained}:
            known = ", ".join({**record.measured, **record.trained}) or "nothing"
            rank_zero_warn(f"Report: nothing logged `monitor={self.monitor!r}`. Logged were {known}.")
        for average in (each for each in _callbacks(trainer) if isinstance(each, Average)):
            label = average.label()
            record.about[average.name] = f"{label['class']}, {label['rule']}"
            counted = record.health.get("updates", {}).get(average.name, Curve()).drawn()
            if (age := age_of(average, [*counted, (logged_step(trainer), average.updates)])) is not None:
                record.ages[average.name] = age

    def _save(self) -> str:
        folder = str(self._folder)
        if not is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        path = join(folder, NAME)
        with atomic(path) as file:
            file.write(page([self._record]).encode())
        return path

    # ---- it is saved and loaded, and comes back from processes of a fit

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, so that a resumed run shows them whole."""
        return {"record": self._record.plain()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with them."""
        self._record = Record.of(state_dict["record"])

    def luggage(self) -> dict[str, Any]:
        """Where the page will be: it is written after this is asked for."""
        return {"path": join(str(self._folder), NAME), **self.state_dict()}

    def come_home(self, luggage: dict[str, Any]) -> None:
        """See ``Traveller``."""
        self.path = luggage["path"] if exists(luggage["path"]) else None
        self.load_state_dict(luggage)


def _callbacks(trainer: Trainer) -> list[Callback]:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
    return found
