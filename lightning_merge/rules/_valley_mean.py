"""Mean over a valley of the validation loss."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from lightning_merge._checks import number, one_of, settle, whole
from lightning_merge.rules._base import Rule
from lightning_merge.rules._segments import Segment, empty, fold, merged, single
from lightning_merge.rules._shares import of_updates
from lightning_merge.rules._valley_presets import Intended, Official, Paper, Preset
from lightning_merge.weights import State, Weights, clone

_PRESETS: dict[str, type[Intended | Paper | Official]] = {"intended": Intended, "paper": Paper, "official": Official}


@final
@dataclass(frozen=True)
class ValleyMean(Rule):
    """Mean of the weights of every step while the score is low: from where it levels off to where it has risen again.

    A score is the validation loss of the raw weights, or another figure that is lower the better. The steps up to an
    evaluation are its segment. With ``s`` the first segment whose score is not undercut by the ``n_converge - 1`` that
    follow, the run has *converged*, and a score is low up to ``mean + tolerance * |mean|`` of those ``n_converge``
    scores. After ``n_tolerance`` scores in a row that are not low, the valley is *dead*: the average ends before the
    first of them and further weights change nothing. With ``n_tolerance < n_converge`` it may be dead when it
    converges.

    - ``"intended"`` begins after the first low score, at most ``n_tolerance - n_converge - 1`` segments before ``s``
      (right after ``s`` if that is negative), and counts every step once.
    - ``"paper"`` begins with ``s`` (algorithm 1) and counts every step once.
    - ``"official"`` is the released code with its defects, except the one below: segments count equally whatever their
      length, and some are counted several times.

    As long as the valley is not dead, the result is what it would be if the run ended now. Steps after the last
    evaluation have no score and are part of no segment. A NaN or an infinity as a score is never low, and there is no
    convergence while one is among the last ``n_converge``; the released code would converge to a NaN and never end.

    **If the run never converges** there is no result until ``conclude``, which then publishes the last segment that was
    evaluated (``"intended"`` and ``"official"``) or all steps, those after the last evaluation included (``"paper"``).
    If there was no evaluation it publishes nothing. Further updates go on as if it had not been called.

    It keeps at most 8 copies of the weights at the defaults, one of them for the result once asked for:
    ``max(n_converge, n_tolerance) + 2``. An evaluation without a step since the last is ignored.

    Args:
        n_converge: Evaluations within which the first has the lowest score; at least 1.
        n_tolerance: Evaluations in a row above the threshold that end the valley; at least 1.
        tolerance: How far above the mean score of convergence is still low, as a share of it; at least 0. The paper's
            ``r`` is ``1 + tolerance``.
        preset: Which segments are merged: ``"intended"``, ``"paper"`` or ``"official"``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> import torch
        >>> rule = ValleyMean(n_converge=2, n_tolerance=2)
        >>> state = rule.init({"w": torch.tensor(0.0)})
        >>> for value, score in enumerate([3.0, 1.0, 1.1, 1.2, 1.3, 2.0, 2.1]):
        ...     rule.update(state, {"w": torch.tensor(float(value))})
        ...     rule.evaluate(state, score)
        >>> rule.result(state)
        {'w': tensor(3.)}
        >>> rule.conclude(state)
        'The loss valley is over, a score of at most 1.365: the mean is of steps 3 to 5.'

    References:
        Cha et al., "SWAD: Domain generalization by seeking flat minima", NeurIPS 2021, algorithm 1.
    """

    callback: ClassVar[str] = "SWAD"
    decides_on_score: ClassVar[bool] = True
    wants_score: ClassVar[Literal["raw", "own"] | None] = "raw"

    n_converge: int = 3
    n_tolerance: int = 6
    tolerance: float = 0.3
    preset: Literal["intended", "paper", "official"] = "intended"

    def __post_init__(self) -> None:
        settle(self, n_converge=whole("n_converge", self.n_converge, 1))
        settle(self, n_tolerance=whole("n_tolerance", self.n_tolerance, 1))
        settle(self, tolerance=number("tolerance", self.tolerance, "[0, inf)", "a finite number of at least 0"))
        one_of("preset", self.preset, tuple(_PRESETS), f"one of {', '.join(map(repr, _PRESETS))}")

    @property
    def can_be_undone(self) -> bool:
        return True

    def init(self, weights: Weights) -> State:
        return {
            "updates": 0,
            "evaluations": 0,
            "open": empty(),  # the steps since the last evaluation
            "segments": [],  # evaluated, and not merged for good
            "scores": [],
            "minimum": None,  # index of `s` once converged
            "threshold": math.inf,
            "spare": empty(),  # `s`, as long as nothing is merged
            "average": empty(),
            "everything": empty(),
            "dead": False,
            "concluded": False,
        }

    def update(self, state: State, weights: Weights) -> None:
        if state["dead"]:
            return
        if state["concluded"]:
            self._go_on(state)
        state["updates"] += 1
        fold(state["open"], single(weights, state["updates"]), 1)

    def evaluate(self, state: State, score: float, weights: Weights | None = None) -> None:
        if not state["open"]["weight"]:
            return
        self._go_on(state)
        self._close(state, score)
        if self.converged(state):
            state["dead"] = min(state["scores"][-self.n_tolerance :]) > state["threshold"]
            if not state["dead"]:
                self._preset.advance(state)
        elif self._is_minimum(state["scores"][-self.n_converge :]):
            self._converge(state)
        else:
            self._preset.wait(state)
        self._trim(state)

    def stored(self, state: State) -> Weights | None:
        published = self._published(state)
        if published is None:
            return None
        mean: Weights = published["mean"]
        return mean

    def conclude(self, state: State) -> str | None:
        if not state["evaluations"]:
            return "No score was taken in, so nothing is merged."
        state["concluded"] = True
        first, last = self.interval(state) or (0, 0)
        if not self.converged(state):
            return (
                f"In {state['evaluations']} evaluations no score was the lowest of the {self.n_converge} that begin"
                f" with it: published is the mean of {self._preset.missed}, steps {first} to {last}."
            )
        how = "The loss valley is over" if self.finished(state) else "The run ended in its loss valley"
        return f"{how}, a score of at most {state['threshold']:.6g}: the mean is of steps {first} to {last}."

    def extend(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        for segment in self._means(state):
            segment["mean"].update(clone(weights))

    def converged(self, state: State) -> bool:
        """Whether the average has begun.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        return state["minimum"] is not None

    def finished(self, state: State) -> bool:
        """Whether the valley is over, so that more steps change nothing and training may stop."""
        return bool(state["dead"])

    def interval(self, state: State) -> tuple[int, int] | None:
        """The first and the last step of the result, counted in updates from 1; ``None`` if there is none.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        published = self._published(state)
        return None if published is None else (published["first"], published["last"])

    def shares(self, state: State) -> Tensor | None:
        interval = self.interval(state)
        if interval is None or self.preset == "official":  # which counts some segments several times
            return None
        first, last = interval
        return of_updates(first, last, state["updates"], 1.0 / (last - first + 1))

    @property
    def _preset(self) -> Preset:
        return _PRESETS[self.preset](self.n_converge, self.n_tolerance)

    def _close(self, state: State, score: float) -> None:
        score = float(score) if math.isfinite(score) else math.inf
        state["segments"].append({**state["open"], "index": state["evaluations"], "score": score})
        state["open"] = empty()
        state["evaluations"] += 1
        state["scores"] = [*state["scores"], score][-max(self.n_converge, self.n_tolerance) :]

    def _is_minimum(self, scores: list[float]) -> bool:
        return len(scores) == self.n_converge and scores[0] == min(scores) and max(scores) < math.inf

    def _converge(self, state: State) -> None:
        mean = math.fsum(state["scores"][-self.n_converge :]) / self.n_converge
        state["threshold"] = mean + self.tolerance * abs(mean)
        state["spare"] = state["segments"][-self.n_converge]
        state["minimum"] = state["spare"]["index"]
        self._preset.begin(state)

    def _trim(self, state: State) -> None:
        """Lets go of what no later evaluation can need; of all that was not merged if the valley is dead."""
        ahead = self.n_tolerance if self.converged(state) else max(self.n_converge, self.n_tolerance, 2)
        keep = 0 if state["dead"] else ahead - 1
        state["segments"] = state["segments"][-keep:] if keep else []
        if state["average"]["weight"]:
            state["spare"] = empty()

    def _go_on(self, state: State) -> None:
        state.pop("cache", None)
        state["concluded"] = False

    def _published(self, state: State) -> Segment | None:
        """The mean that is the result; a new one is kept until the next evaluation."""
        if "cache" not in state:
            parts = [(segment, weight) for segment, weight in self._parts(state) if weight]
            if len(parts) < 2:
                return parts[0][0] if parts else None
            state["cache"] = merged(parts)
        published: Segment = state["cache"]
        return published

    def _parts(self, state: State) -> list[tuple[Segment, int]]:
        """What the result is the mean of, and how much each part counts."""
        preset = self._preset
        if not self.converged(state):
            missed = preset.never_converged(state) if state["concluded"] else []
            return [(segment, segment["weight"]) for segment in missed]
        average = state["average"]
        pending = preset.pending(state)
        parts = [(average, average["weight"]), *((segment, preset.weight(segment)) for segment in pending)]
        return parts if average["weight"] or pending else [(state["spare"], 1)]

    def _means(self, state: State) -> Iterator[Segment]:
        for segment in (state["open"], state["spare"], state["average"], state["everything"], *state["segments"]):
            if segment["weight"]:
                yield segment
