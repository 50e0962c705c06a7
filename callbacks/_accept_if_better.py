"""Publishing what measures best: the merged weights, the raw ones, or a point between."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge import weights
from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._checks import numbers, one_of
from lightning_merge._choice import Mode, best, mode_by_name, mode_of
from lightning_merge._ranks import agreed, gathered
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._ledger import RAW
from lightning_merge.callbacks._publication._session import Judge, Publisher
from lightning_merge.diagnostics import between
from lightning_merge.weights import Weights


class AcceptIfBetter(Judge, Callback):
    """At the end of a fit, publishes ``raw + share * (merged - raw)`` with the share that scores best.

    Every average of the Trainer is judged, and what is chosen takes its place: in the model, in ``<name>-final.ckpt``,
    in its final metrics. The average itself stays as it is, to go on with. Each share costs one validation run; they
    leave nothing in logs. The score is that of the data it was chosen on, so it flatters a little: test on other data.

    A NaN never wins, nor an infinity that is bad. Weights that hold one where the merged ones do not, as those of a run
    that diverged, are not measured: their score is a NaN. If no score can be chosen the merged weights are published.

    Args:
        monitor: A metric that validation logs, under its plain name.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is. It can be left out where the last word of the name
            says it, as ``val/loss`` or ``val/acc``.
        shares: Shares in [0, 1] that are tried, beside 1; 0 are the raw weights. Of equal scores the largest wins.

    Attributes:
        scores: Of every average by name, the score at each share.

    Raises:
        ValueError: If an argument is out of its range, at fit start if there is no validation or no average, or at the
            first validation if it does not log the metric, or if ``mode`` is needed.

    Example:
        >>> AcceptIfBetter("val/loss").shares
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """

    brings = ("scores",)

    def __init__(
        self, monitor: str, mode: Mode | None = None, shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
    ) -> None:
        refuse_other_mode(mode)
        shares = numbers("shares", shares, "[0, 1]", "numbers in [0, 1], at least one")
        if not shares:
            raise ValueError("`shares` must be numbers in [0, 1], at least one, got ().")
        self.monitor = checked_monitor("monitor", monitor)
        self.mode = mode_by_name(self.monitor) if mode is None else mode
        self.shares = (*sorted({float(share) for share in shares} - {1.0}), 1.0)
        self.scores: dict[str, dict[float, float]] = {}
        self.expect()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run in which it could not measure."""
        begin_to_judge(self, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a metric that is not logged as soon as that is known, and then one that needs a mode."""
        refuse_unlogged(self, trainer, needs_mode=True)

    def consider(self, publisher: Publisher) -> None:
        """Measures the shares and chooses. Called before anything final is measured or saved."""
        for average in publisher.averages:
            if average.ready:
                self._choose(publisher, average)

    def _choose(self, publisher: Publisher, average: Average) -> None:
        raw, merged = publisher.apart.of_first(publisher.raw(average)), publisher.set_of(average)
        # The copied buffers of an average are not on the line, and statistics are measured where it measures them.
        copied = {name: merged[name] for name in average.buffer_names}
        scores = self.scores[average.name] = {}
        for share in self.shares:
            point: Weights = {**between(raw, merged, share), **copied} if 0 < share < 1 else merged if share else raw
            scores[share] = self._score(publisher, average, point, merged, between=0 < share < 1)
        ties = [] if self.mode is None else best(scores, self.mode)
        chosen = max(ties, default=1.0)
        publisher.accept(average, chosen)
        said = (
            "the merged weights"
            if chosen == 1
            else "the raw weights"
            if chosen == 0
            else f"{chosen:.0%} of the way to them"
        )
        if not ties:
            said += ", since no score can be chosen"
        elif len(ties) > 1:
            said += f", the largest of the equal shares {', '.join(f'{share:.0%}' for share in ties)}"
        listed = ", ".join(f"{share:.0%} {score:.6g}" for share, score in scores.items())
        order = "lowest" if self.mode == "min" else "highest"
        rank_zero_info(
            f"{average.title}: {self.monitor} from raw (0%) to merged (100%), {order} is best, is {listed}:"
            f" publishes {said}."
        )

    def _score(self, publisher: Publisher, average: Average, point: Weights, merged: Weights, between: bool) -> float:
        """The score of weights in the place of an average; a NaN for those that hold one, whatever they would score."""
        broken = weights.nonfinite(point) - weights.nonfinite(merged)
        if any(gathered(bool(broken))):
            return float("nan")
        if between:
            point = point | average.statistics(publisher.publishable(average, point))
        found = publisher.validation.probe(average, publisher.publishable(average, point))
        return found.get(self.monitor, math.nan)


def begin_to_judge(judge: Judge, trainer: Any) -> None:
    """A fit begins: refuses one in which a judge could not measure, or not what it is to look at."""
    judge.at_the_end = False
    owner = type(judge).__name__
    refuse_without_validation(owner, trainer)
    names = [callback.name for callback in trainer.callbacks if isinstance(callback, Average)]
    if (prefix := judge.monitor.partition("/")[0]) in (RAW, *names):
        raise ValueError(
            f"`monitor` of {owner} must be a metric under its plain name, got {judge.monitor!r}, which begins with the"
            f" name of a set of weights: leave `{prefix}/` out, or give the average another name."
        )


def refuse_without_validation(owner: str, trainer: Any) -> None:
    """For callbacks that measure at the end of the fit."""
    if not any(isinstance(callback, Average) for callback in trainer.callbacks):
        raise ValueError(f"{owner} looks at averages, and there is none among the callbacks: add one, as `EMA()`.")
    if not trainer.enable_validation:
        raise ValueError(f"{owner} measures by validation: give the Trainer a validation loader, or leave it out.")


def refuse_other_mode(mode: str | None) -> None:
    """For callbacks that choose by a metric; ``None`` is left to its name."""
    if mode is not None:
        one_of("mode", mode, ("min", "max"))


def refuse_unlogged(judge: Judge, trainer: Any, needs_mode: bool = False) -> None:
    """A metric that is not there after a validation of a fit will not be there at the end, nor a mode.

    In this order: a slip in the name is the likelier mistake, and the metrics that there are help with it.
    """
    if trainer.sanity_checking or trainer.state.fn != "fit" or judge.at_the_end:
        return
    owner, monitor = type(judge).__name__, judge.monitor
    metrics = agreed(dict.fromkeys(trainer.callback_metrics))  # where one process logs less, all go on
    # An average may own the plain names in a later pass of the same validation.
    if not any(key == monitor or key.endswith(f"/{monitor}") for key in metrics):
        raise _unlogged(owner, monitor, metrics)
    if needs_mode:
        mode_of(owner, monitor, getattr(judge, "mode", None))


def logged(owner: str, monitor: str | None, metrics: Mapping[str, Any]) -> float:
    """The metric among those of one validation.

    Raises:
        ValueError: If it is not among them.
    """
    if monitor is None or monitor not in metrics:
        raise _unlogged(owner, monitor, metrics)
    return float(metrics[monitor])


def _unlogged(owner: str, monitor: str | None, metrics: Iterable[str]) -> ValueError:
    return ValueError(
        f"`monitor` of {owner} must be a metric that validation logs, got {monitor!r}; it logs:"
        f" {', '.join(sorted(metrics)) or 'none'}."
    )
