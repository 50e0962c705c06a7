"""What a search found, and every candidate on the way."""

from dataclasses import dataclass, field

from lightning_merge._checks import flag, instance, number, numbers, sequence, settle, whole
from lightning_merge.search._spaces import Coefficients


@dataclass(frozen=True)
class Evaluation:
    """One candidate.

    Args:
        coefficients: What was scored.
        score: ``None`` if it was rejected, since its score was a NaN or an infinity that is bad.
        from_log: Whether the score was read from the log instead of measured.
        parts: The scores of several tasks, if the score gives them.
    """

    coefficients: Coefficients
    score: float | None
    from_log: bool = False
    parts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        settle(self, coefficients=numbers("coefficients", self.coefficients), from_log=flag("from_log", self.from_log))
        settle(self, score=None if self.score is None else number("score", self.score, "[-inf, inf]"))
        settle(self, parts=None if self.parts is None else numbers("parts", self.parts))


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        coefficients: The best there are, of equals the last; of ``Adam`` the last that was scored.
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
        settle(self, score=number("score", self.score, "[-inf, inf]"), ties=whole("ties", self.ties, 0))
        for each in sequence("history", self.history, "evaluations"):
            instance("history", each, Evaluation, "evaluations")
        flag("complete", self.complete)
