"""One search while it runs: scores each new candidate once, and keeps what it learned."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lightning_merge._choice import Mode, best, is_eligible, standing
from lightning_merge.search._found import Evaluation, Found
from lightning_merge.search._log import Log
from lightning_merge.search._measured import Measured, Objective
from lightning_merge.search._method import Answer, Method
from lightning_merge.search._spaces import Coefficients, Space

Score: TypeAlias = Callable[[Coefficients], float | tuple[float, Sequence[float]] | Measured] | Objective
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

    def follow(self, method: Method, space: Space, mixed: int, seed: int) -> bool:
        """Answers the method until it ends (True), the budget is spent, or it only repeats itself.

        It mixes so many ingredients, the first ones; the coefficients of others are 0.
        """
        proposals = method.propose(space, mixed, random.Random(seed))
        repeated = 0
        try:
            candidate = next(proposals)
            while repeated < _PATIENCE:
                chosen = len(candidate)
                candidate = (*candidate, *(0.0,) * (self.count - chosen))
                repeated = repeated + 1 if candidate in self.answers else 0
                answer = self.answer(candidate)
                if answer is None:
                    return False
                slopes = None if answer.gradient is None else answer.gradient[:chosen]
                candidate = proposals.send(Answer(answer.value, slopes, answer.parts))
        except StopIteration:
            return True
        return False

    def answer(self, candidate: Coefficients) -> Answer | None:
        """The answer for a candidate, measured if it is new; ``None`` if the budget is spent."""
        if candidate in self.answers:
            return self.answers[candidate]
        if len(self.history) >= self.budget:
            return None
        answer = self._evaluate(candidate)
        if not isinstance(self.score, Objective):  # which is measured on other batches the next time
            self.answers[candidate] = answer
        return answer

    def _evaluate(self, candidate: Coefficients) -> Answer:
        known = [] if self.log is None else self.log.known.get(candidate, [])
        if from_log := bool(known):
            measured = known.pop(0)
        else:
            measured = self._measure(candidate)
            if self.log is not None:
                self.log.write(candidate, measured)
        score, parts = (None, None) if measured is None else (measured.value, measured.parts)
        self.history.append(Evaluation(candidate, score, from_log, parts))
        if self.on_evaluation is not None:
            self.on_evaluation(self.history[-1])
        if measured is None:
            return Answer(-math.inf)
        return Answer(standing(measured.value, self.mode), self._signed(measured.gradient), self._signed(parts))

    def _signed(self, values: Sequence[float] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(self.sign * each for each in values)

    def _measure(self, candidate: Coefficients) -> Measured | None:
        """What the score says; ``None`` if that rejects the candidate."""
        if isinstance(self.score, Objective):
            answered: Any = self.score.measure(candidate, len(self.history))
        else:
            answered = self.score(candidate)
        if isinstance(answered, Measured):
            found = answered
        else:
            value, slopes = answered if isinstance(answered, tuple) else (answered, None)
            if math.isinf(value := float(value)) or math.isnan(value):
                slopes = None  # nothing is uphill of the best infinity
            found = Measured(value, None if slopes is None else tuple(map(float, slopes)))
        if not is_eligible(found.value, self.mode):
            return None
        if found.gradient is not None and len(found.gradient) != self.count:
            raise ValueError(f"the gradient of `score` must be {self.count} finite numbers, got {found.gradient}.")
        return found

    def found(self, complete: bool, takes_last: bool) -> Found:
        scores = {each.coefficients: each.score for each in self.history if each.score is not None}
        if not scores:
            raise ValueError(
                f"`score` was a NaN or an infinity for all {len(self.history)} candidates, so there is nothing to"
                " choose from. Check that the ingredients themselves have a finite score."
            )
        if takes_last:
            last = next(each.coefficients for each in reversed(self.history) if each.score is not None)
            return Found(last, scores[last], self.history, complete)
        *others, last = best(scores, self.mode)
        return Found(last, scores[last], self.history, complete, len(others))
