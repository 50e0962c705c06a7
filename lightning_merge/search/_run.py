"""One search while it runs: scores each new candidate once, and keeps what it learned."""

import math
import random
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lightning_merge._choice import Mode, best, is_eligible, standing
from lightning_merge.search._found import Evaluation, Found
from lightning_merge.search._log import Log
from lightning_merge.search._method import Answer, Method
from lightning_merge.search._spaces import Coefficients, Space

Score: TypeAlias = Callable[[Coefficients], float | tuple[float, Sequence[float]]]
"""The score of coefficients; with their derivatives for ``Gradient`` if it is a tuple."""

_PATIENCE = 1000
"""Candidates in a row that were all tried before, after which a method has nothing new to propose."""


class Run:
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
