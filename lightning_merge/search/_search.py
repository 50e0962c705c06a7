"""Runs a search: asks a method for candidates, scores them, keeps a log."""

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lightning_merge._checks import LISTED, flag, function, instance, number, numbers, one_of, path, sequence, settle
from lightning_merge._checks import seed as checked_seed
from lightning_merge._checks import whole as checked_count
from lightning_merge._choice import Mode, best, is_eligible, standing
from lightning_merge.search._grid import Grid
from lightning_merge.search._log import Log
from lightning_merge.search._method import Answer, Method
from lightning_merge.search._spaces import Coefficients, Free, Negative, Simplex, Space, one_hot

Score: TypeAlias = Callable[[Coefficients], float | tuple[float, Sequence[float]]]
"""The score of coefficients; with their derivatives for ``Gradient`` if it is a tuple."""

_SPACES: dict[str, type[Space]] = {"simplex": Simplex, "negative": Negative, "free": Free}

_PATIENCE = 1000
"""Candidates in a row that were all tried before, after which a method has nothing new to propose."""


@dataclass(frozen=True)
class Evaluation:
    """One candidate.

    Args:
        coefficients: What was scored.
        score: ``None`` if it was rejected, since its score was a NaN or an infinity that is bad.
        from_log: Whether the score was read from the log instead of measured.
    """

    coefficients: Coefficients
    score: float | None
    from_log: bool = False

    def __post_init__(self) -> None:
        settle(self, coefficients=numbers("coefficients", self.coefficients), from_log=flag("from_log", self.from_log))
        settle(self, score=None if self.score is None else number("score", self.score, "[-inf, inf]"))


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        coefficients: The best there are; of equals the last.
        score: Theirs.
        history: Every evaluation in order, those of the log included.
        complete: Whether the method came to its own end before the budget did.
        ties: How many candidates before it scored the same.
    """

    coefficients: Coefficients
    score: float
    history: list[Evaluation] = field(repr=False)
    complete: bool
    ties: int = 0

    def __post_init__(self) -> None:
        settle(self, coefficients=numbers("coefficients", self.coefficients))
        settle(self, score=number("score", self.score, "[-inf, inf]"), ties=checked_count("ties", self.ties, 0))
        for each in sequence("history", self.history, "evaluations"):
            instance("history", each, Evaluation, "evaluations")
        flag("complete", self.complete)


def search(
    score: Score,
    count: int,
    method: Method,
    *,
    space: Literal["simplex", "negative", "free"] | Space = "simplex",
    mode: Mode = "max",
    budget: int | None = None,
    seed: int = 0,
    candidates: Sequence[Sequence[float]] = (),
    whole: int = 0,
    log: str | os.PathLike[str] | None = None,
    subject: str = "",
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> Found:
    """The coefficients with the best score among those a method tries.

    The same arguments and scores lead to the same candidates. No candidate is scored twice. With a ``log``, a search
    that was stopped continues where it was, without scoring anything again.

    Args:
        score: Called with a tuple of ``count`` numbers. A NaN, or an infinity that is bad, rejects the candidate.
        count: Number of ingredients; at least 1.
        method: How candidates are chosen.
        space: ``"simplex"`` (at least 0, one in sum), ``"negative"`` (any sign, one in sum), ``"free"`` (any), or
            one of ``Simplex``, ``Negative`` and ``Free`` with its bounds.
        mode: ``"max"`` if a higher score is better, ``"min"`` if a lower one is.
        budget: Most calls of ``score``, those in the log included; at least 1. ``None``: until the method ends.
        seed: Of everything random.
        candidates: Coefficients to score first; they count as found.
        whole: So many ingredients, the last ones, are not mixed with others but tried as they are: the previous merge.
        log: A file of JSON lines with every evaluation.
        subject: What the log is about, as hashes of the files: a log about something else is refused.
        on_evaluation: Told of each evaluation, to show progress.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range, the method needs a ``budget``, the log is of another search, or
            all candidates were rejected.

    Example:
        >>> found = search(lambda a: -((a[0] - 0.6) ** 2), count=2, method=Grid(step=0.2))
        >>> found.coefficients, len(found.history)
        ((0.6, 0.4), 6)
    """
    function("score", score)
    instance("method", method, Method, "a method of `lightning_merge.search`")
    one_of("mode", mode, ("max", "min"))
    if not isinstance(space, Space):
        space = _SPACES[one_of("space", space, tuple(_SPACES), f"one of {', '.join(map(repr, _SPACES))}")]()
    count, whole = checked_count("count", count, 1, LISTED), checked_count("whole", whole)
    budget = None if budget is None else checked_count("budget", budget, 1)
    seed = checked_seed("seed", seed)
    candidates = [numbers("candidates", each) for each in sequence("candidates", candidates)]
    if not isinstance(subject, str):
        raise TypeError(f"`subject` must be a text, got {subject!r}.")
    if on_evaluation is not None:
        function("on_evaluation", on_evaluation)
    run = _Run(score, count, mode, budget, on_evaluation)
    _check(method, space, count, whole, budget, candidates)
    if log is not None:
        header = {"method": repr(method), "count": count, "space": repr(space), "mode": mode, "seed": seed}
        run.log = Log(path("log", log), {**header, "whole": whole, "subject": subject})
    first = [tuple(map(float, each)) for each in candidates]
    first += [one_hot(count, index) for index in range(count - whole, count)]
    complete = all(run.answer(each) is not None for each in first) and run.follow(method, space, whole, seed)
    return run.found(complete)


class _Run:
    """What happens during one search."""

    def __init__(
        self,
        score: Score,
        count: int,
        mode: Mode,
        budget: int | None,
        on_evaluation: Callable[[Evaluation], None] | None,
    ) -> None:
        self.score = score
        self.count = count
        self.mode = mode
        self.sign = 1.0 if mode == "max" else -1.0
        self.budget = math.inf if budget is None else budget
        self.on_evaluation = on_evaluation
        self.log: Log | None = None
        self.history: list[Evaluation] = []
        self.answers: dict[Coefficients, Answer] = {}

    def follow(self, method: Method, space: Space, whole: int, seed: int) -> bool:
        """Answers the method until it ends (True), the budget is spent, or it only repeats itself."""
        proposals = method.propose(space, self.count - whole, random.Random(seed))
        repeated = 0
        try:
            candidate = next(proposals)
            while repeated < _PATIENCE:
                candidate = (*candidate, *(0.0,) * whole)
                repeated = repeated + 1 if candidate in self.answers else 0
                answer = self.answer(candidate)
                if answer is None:
                    return False
                slopes = None if answer.gradient is None else answer.gradient[: self.count - whole]
                candidate = proposals.send(Answer(answer.value, slopes))
        except StopIteration:
            return True
        return False

    def answer(self, candidate: Coefficients) -> Answer | None:
        """The answer for a candidate, measured if it is new; ``None`` if the budget is spent."""
        if candidate not in self.answers:
            if len(self.history) >= self.budget:
                return None
            self.answers[candidate] = self._evaluate(candidate)
        return self.answers[candidate]

    def _evaluate(self, candidate: Coefficients) -> Answer:
        from_log = self.log is not None and candidate in self.log.known
        if self.log is not None and from_log:
            score, gradient = self.log.known[candidate]
        else:
            score, gradient = self._measure(candidate)
            if self.log is not None:
                self.log.write(candidate, score, gradient)
        self.history.append(Evaluation(candidate, score, from_log))
        if self.on_evaluation is not None:
            self.on_evaluation(self.history[-1])
        if score is None:
            return Answer(-math.inf)
        return Answer(
            standing(score, self.mode), None if gradient is None else tuple(self.sign * each for each in gradient)
        )

    def _measure(self, candidate: Coefficients) -> tuple[float | None, Coefficients | None]:
        measured = self.score(candidate)
        value, slopes = measured if isinstance(measured, tuple) else (measured, None)
        score = float(value)
        if not is_eligible(score, self.mode):
            return None, None
        if slopes is None or math.isinf(score):  # nothing is uphill of the best infinity
            return score, None
        gradient = tuple(map(float, slopes))
        if len(gradient) != self.count or not all(map(math.isfinite, gradient)):
            raise ValueError(f"the gradient of `score` must be {self.count} finite numbers, got {gradient}.")
        return score, gradient

    def found(self, complete: bool) -> Found:
        scores = {each.coefficients: each.score for each in self.history if each.score is not None}
        if not scores:
            raise ValueError(
                f"`score` was a NaN or an infinity for all {len(self.history)} candidates, so there is nothing to"
                " choose from. Check that the ingredients themselves have a finite score."
            )
        *others, last = best(scores, self.mode)
        return Found(last, scores[last], self.history, complete, len(others))


def _check(
    method: Method, space: Space, count: int, whole: int, budget: int | None, candidates: Sequence[Sequence[float]]
) -> None:
    if not 0 <= whole < count:
        raise ValueError(f"`whole` must be at least 0 and less than `count`, got {whole} of {count}.")
    if budget is None and method.endless:
        raise ValueError(f"`budget` must be given for {method!r}, which goes on until it is spent.")
    if isinstance(method, Grid) and budget is not None:
        left = budget - whole - len(candidates)
        if left < 1 or method.exceeds(left, space, count - whole):
            raise ValueError(
                f"`budget` must cover every candidate of {method!r} over {count - whole} ingredients, got {budget},"
                " which does not. Take a larger `step`, or a method that looks at fewer candidates."
            )
    for each in candidates:
        if len(each) != count or not space.contains(each):
            raise ValueError(f"`candidates` must be {count} coefficients each, of {space!r}; got {tuple(each)}.")
