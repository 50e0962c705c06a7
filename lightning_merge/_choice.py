"""Which score is better: whatever chooses by a score asks here.

A NaN loses against everything, and so does an infinity that is bad: neither is ever chosen. A good infinity wins.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

Mode: TypeAlias = Literal["min", "max"]
"""Whether the lowest score is the best or the highest."""

_Key = TypeVar("_Key")

_LOWER = {"loss", "error", "err", "nll", "perplexity", "ppl", "mse", "rmse", "mae", "wer", "cer"}
_HIGHER = {"acc", "accuracy", "f1", "auc", "auroc", "iou", "miou", "bleu", "psnr", "ssim", "recall", "dice"}
_TURNED = {"neg", "negative", "minus", "inverse", "inv", "no", "non"}


def standing(score: float, mode: Mode = "max") -> float:
    """The score turned so that higher is better; minus infinity, which is never chosen, for a NaN.

    Example:
        >>> standing(2.0, "min"), standing(float("nan"), "min"), standing(float("inf"), "min")
        (-2.0, -inf, -inf)
    """
    turned = float(score) if mode == "max" else -float(score)
    return -math.inf if math.isnan(turned) else turned


def is_eligible(score: float, mode: Mode = "max") -> bool:
    """Whether a score can be chosen at all: it is neither a NaN nor the worst infinity."""
    return standing(score, mode) > -math.inf


def best(scores: Mapping[_Key, float], mode: Mode = "max") -> list[_Key]:
    """Those with the best score, in their order: more than one is a tie, none if no score is eligible.

    Example:
        >>> best({"a": float("nan"), "b": 1.0, "c": 3.0, "d": 1.0}, "min")
        ['b', 'd']
        >>> best({"a": float("nan"), "b": float("inf")}, "min")
        []
    """
    standings = {key: standing(score, mode) for key, score in scores.items()}
    highest = max(standings.values(), default=-math.inf)
    return [key for key, each in standings.items() if each == highest > -math.inf]


def shares_by_score(scores: Sequence[float], temperature: float) -> list[float] | None:
    """``softmax(scores / temperature)``, higher is better; ``None`` if no score is eligible.

    What is not eligible has the share 0. Scores that are infinitely good share everything among them.

    Example:
        >>> shares_by_score([1.0, float("nan"), 1.0], 5.0)
        [0.5, 0.0, 0.5]
    """
    standings = [standing(score) for score in scores]
    highest = max(standings, default=-math.inf)
    if highest == -math.inf:
        return None
    if highest == math.inf:
        odds = [float(each == highest) for each in standings]
    else:
        odds = [math.exp((each - highest) / temperature) for each in standings]
    return [each / math.fsum(odds) for each in odds]


def mode_by_name(monitor: str) -> Mode | None:
    """The mode of a metric whose last word says it, as a loss or an accuracy; ``None`` for others.

    Example:
        >>> mode_by_name("val/loss"), mode_by_name("val_acc"), mode_by_name("val/score")
        ('min', 'max', None)
    """
    words = _words(monitor)
    if not words or _TURNED & set(words):
        return None
    return "min" if words[-1] in _LOWER else "max" if words[-1] in _HIGHER else None


def is_accuracy(monitor: str) -> bool:
    """Whether a metric is a share of right answers by the last word of its name.

    Example:
        >>> is_accuracy("val/acc"), is_accuracy("val_loss")
        (True, False)
    """
    return _words(monitor)[-1:] in (["acc"], ["accuracy"])


def _words(monitor: str) -> list[str]:
    key = re.sub(r"(/dataloader_idx_\d+|_epoch|_step)+$", "", monitor)
    return re.findall(r"[a-z]+[0-9]?", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower())


def mode_of(owner: str, monitor: str, mode: Mode | None) -> Mode:
    """The mode that was given, or that of a metric whose name says it.

    Raises:
        ValueError: If neither says which is better.
    """
    found = mode_by_name(monitor) if mode is None else mode
    if found is None:
        raise ValueError(
            f"`mode` of {owner} must be given for {monitor!r}, whose name does not say which score is better: 'min' if"
            " lower is, 'max' if higher is."
        )
    return found


def refuse_higher_is_better(owner: str, monitor: str) -> None:
    """For what takes the lowest score for the best, whatever the metric.

    Raises:
        ValueError: If the name of the metric says that higher is better.
    """
    if mode_by_name(monitor) == "max":
        raise ValueError(
            f"`monitor` of {owner} must be a metric of which lower is better, as a validation loss, got {monitor!r}."
        )
