"""Publishing what measures best: the merged weights, the raw ones, or a point between."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._checks import numbers, one_of
from lightning_merge.diagnostics import between
from lightning_merge.weights import Weights

if TYPE_CHECKING:
    from lightning_merge.callbacks._publication._callback import Published
    from lightning_merge.callbacks._publication._session import Publisher


class AcceptIfBetter(Callback):
    """At the end of a fit, publishes ``raw + share * (merged - raw)`` with the share that scores best.

    Every average of the Trainer is judged, and what is chosen takes its place: in the model, in ``<name>-final.ckpt``,
    in its final metrics. The average itself stays as it is, to go on with. Each share costs one validation run; they
    leave nothing in logs. The score is that of the data it was chosen on, so it flatters a little: test on other data.

    Args:
        monitor: A metric that validation logs, under its plain name.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is.
        shares: Shares in [0, 1] that are tried, beside 1; 0 are the raw weights. Of equal scores the largest wins.

    Attributes:
        scores: Of every average by name, the score at each share.

    Raises:
        ValueError: If an argument is out of its range, at fit start if there is no validation or no average, or at the
            first validation if it does not log the metric.

    Example:
        >>> AcceptIfBetter("val/loss").shares
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """

    def __init__(
        self, monitor: str, mode: Literal["min", "max"] = "min", shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
    ) -> None:
        refuse_other_mode(mode)
        shares = numbers("shares", shares, "[0, 1]", "numbers in [0, 1], at least one")
        if not shares:
            raise ValueError("`shares` must be numbers in [0, 1], at least one, got ().")
        self.monitor = checked_monitor("monitor", monitor)
        self.mode = mode
        self.shares = (*sorted({float(share) for share in shares} - {1.0}), 1.0)
        self.scores: dict[str, dict[float, float]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run in which it could not measure."""
        refuse_without_validation(type(self).__name__, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a metric that is not logged as soon as that is known."""
        refuse_unlogged(type(self).__name__, self.monitor, trainer)

    def consider(self, publisher: "Publisher") -> None:
        """Measures the shares and chooses. Called before anything final is measured or saved."""
        for average in publisher.averages:
            if average.ready:
                self._choose(publisher, average)

    def _choose(self, publisher: "Publisher", average: "Published") -> None:
        raw, merged = average.raw_weights(), publisher.set_of(average)
        # The copied buffers of an average are not on the line, and statistics are measured where it measures them.
        copied = {name: merged[name] for name in average.buffer_names}
        scores = self.scores[average.name] = {}
        for share in self.shares:
            point: Weights = {**between(raw, merged, share), **copied} if 0 < share < 1 else merged if share else raw
            if 0 < share < 1:
                point |= average.statistics(publisher.publishable(average, point))
            fitted = publisher.publishable(average, point)
            scores[share] = publisher.validation.probe(average, fitted)[self.monitor]
        sign = 1 if self.mode == "min" else -1
        best = min(scores, key=lambda share: (sign * scores[share], -share))
        publisher.accept(average, best)
        said = (
            "the merged weights" if best == 1 else "the raw weights" if best == 0 else f"{best:.0%} of the way to them"
        )
        listed = ", ".join(f"{share:.0%} {score:.6g}" for share, score in scores.items())
        rank_zero_info(f"{average.title}: {self.monitor} from raw (0%) to merged (100%) is {listed}: publishes {said}.")


def refuse_without_validation(owner: str, trainer: Any) -> None:
    """For callbacks that measure at the end of the fit."""
    if not any(hasattr(callback, "merged_weights") for callback in trainer.callbacks):
        raise ValueError(f"{owner} looks at averages, and there is none among the callbacks: add one, as `EMA()`.")
    if not trainer.enable_validation:
        raise ValueError(f"{owner} measures by validation: give the Trainer a validation loader, or leave it out.")


def refuse_other_mode(mode: str) -> None:
    """For callbacks that choose by a metric."""
    one_of("mode", mode, ("min", "max"))


def refuse_unlogged(owner: str, monitor: str, trainer: Any) -> None:
    """A metric that is not there after a validation will not be there at the end."""
    # An average may own the plain names in a later pass of the same validation.
    known = any(key == monitor or key.endswith(f"/{monitor}") for key in trainer.callback_metrics)
    if not trainer.sanity_checking and not known:
        raise _unlogged(owner, monitor, trainer.callback_metrics)


def logged(owner: str, monitor: str, metrics: Mapping[str, float]) -> float:
    """The metric among those of one validation.

    Raises:
        ValueError: If it is not among them.
    """
    if monitor not in metrics:
        raise _unlogged(owner, monitor, metrics)
    return metrics[monitor]


def _unlogged(owner: str, monitor: str, metrics: Iterable[str]) -> ValueError:
    return ValueError(
        f"`monitor` of {owner} must be a metric that validation logs, got {monitor!r}; it logs:"
        f" {', '.join(sorted(metrics)) or 'none'}."
    )
