"""Which segments of a run a valley consists of: the closed specification, the paper's, and the released code's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from lightning_merge.rules._segments import Segment, empty, fold
from lightning_merge.weights import State


@dataclass(frozen=True)
class Preset(ABC):
    """Merges segments into ``state["average"]``. Asked at evaluations only; the newest segment is the last one.

    In comments and names, ``s`` is the segment whose score is the minimum that made the run converge.
    """

    n_converge: int
    n_tolerance: int

    missed: ClassVar[str] = "the last segment that was evaluated"
    """In words, what is published if the run never converged."""

    @abstractmethod
    def weight(self, segment: Segment) -> int:
        """How often a segment counts in the average."""

    @abstractmethod
    def begin(self, state: State) -> None:
        """The run has just converged: merges what belongs to the average from the start."""

    @abstractmethod
    def advance(self, state: State) -> None:
        """A later evaluation, and the valley goes on: merges what is safe to be part of it."""

    def wait(self, state: State) -> None:
        """The run has not converged at this evaluation."""
        return

    def pending(self, state: State) -> list[Segment]:
        """The segments that would still be merged if the run ended now: through the last one that is low enough."""
        return through_last_low(state["segments"], state["threshold"])

    def never_converged(self, state: State) -> list[Segment]:
        """The segments that are published if the run never converged."""
        segments: list[Segment] = state["segments"]
        return segments[-1:]


class _EverySegmentOnce(Preset):
    """The mean of every step from the start of one segment to the end of another."""

    @abstractmethod
    def start(self, state: State) -> int:
        """Index of the first segment of the average."""

    def weight(self, segment: Segment) -> int:
        return int(segment["weight"])

    def begin(self, state: State) -> None:
        start, end = self.start(state), self._end_before_convergence(state)
        state["segments"] = [segment for segment in state["segments"] if start <= segment["index"]]
        if end is None:
            self.advance(state)
            return
        state["dead"] = True
        for segment in state["segments"]:
            if segment["index"] < end:
                fold(state["average"], segment, self.weight(segment))

    def _end_before_convergence(self, state: State) -> int | None:
        """Index of the first of ``n_tolerance`` high scores in a row after ``s``, which ended the valley already."""
        run: list[int] = []
        for segment in state["segments"]:
            is_high = segment["index"] > state["minimum"] and segment["score"] > state["threshold"]
            run = [*run, segment["index"]] if is_high else []
            if len(run) == self.n_tolerance:
                return run[0]
        return None

    def advance(self, state: State) -> None:
        # Segments within the tolerance window wait: if the valley ends, it ended before them.
        window = state["evaluations"] - self.n_tolerance + 1
        while state["segments"] and state["segments"][0]["index"] < window:
            segment = state["segments"].pop(0)
            fold(state["average"], segment, self.weight(segment))


@final
@dataclass(frozen=True)
class Intended(_EverySegmentOnce):
    """From one segment after the first low evaluation before ``s``, as far back as the tolerance window reaches."""

    def start(self, state: State) -> int:
        minimum = int(state["minimum"])
        if self.n_tolerance <= self.n_converge:
            return minimum + 1
        oldest = state["segments"][0]["index"]
        before = [segment for segment in state["segments"] if segment["index"] < minimum]
        high = [segment["index"] for segment in before if segment["score"] > state["threshold"]]
        # A segment's steps precede its evaluation, so the one after the last high evaluation is still on the way down.
        return int(min(high[-1] + 2 if high else oldest + 1, minimum))


@final
@dataclass(frozen=True)
class Paper(_EverySegmentOnce):
    """From ``s``; everything if the run never converged."""

    missed: ClassVar[str] = "all steps"

    def start(self, state: State) -> int:
        return int(state["minimum"])

    def begin(self, state: State) -> None:
        state["everything"] = empty()
        super().begin(state)

    def wait(self, state: State) -> None:
        fold(state["everything"], state["segments"][-1], self.weight(state["segments"][-1]))

    def never_converged(self, state: State) -> list[Segment]:
        return [state["everything"], state["open"]]


@final
@dataclass(frozen=True)
class Official(Preset):
    """What the released code does: segments count equally whatever their length, and some are merged several times.

    Its queue holds the newest ``n_tolerance`` segments. Each evaluation merges the queue's head, which may have been
    merged at convergence, and until the queue is full it is the same segment each time.
    """

    def weight(self, segment: Segment) -> int:
        return 1

    def begin(self, state: State) -> None:
        surplus = self.n_converge - self.n_tolerance
        if surplus > 0:
            chosen = state["segments"][-self.n_converge :][1 : 1 + surplus]
        else:
            front = state["segments"][-self.n_tolerance :][: 1 - surplus]
            high = [i for i, segment in enumerate(front) if segment["score"] > state["threshold"]]
            chosen = front[high[-1] + 2 if high else 1 :]
        for segment in chosen:
            fold(state["average"], segment, 1)

    def advance(self, state: State) -> None:
        head = state["segments"][-self.n_tolerance :][0]
        if head["index"] >= state["minimum"]:
            fold(state["average"], head, 1)

    def pending(self, state: State) -> list[Segment]:
        full = state["evaluations"] >= self.n_tolerance
        return through_last_low(state["segments"] if full else state["segments"][1:], state["threshold"])


def through_last_low(segments: list[Segment], threshold: float) -> list[Segment]:
    """The segments up to the last one whose score is not above the threshold."""
    low = [i for i, segment in enumerate(segments) if segment["score"] <= threshold]
    return segments[: low[-1] + 1] if low else []
