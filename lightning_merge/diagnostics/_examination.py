"""An examination: what was measured, and what speaks against merging."""

from dataclasses import dataclass
from typing import Literal, final

Problem = Literal[
    "not finite", "identical", "wrong base", "statistics", "barrier", "unrelated", "stale statistics", "start"
]


ORDER: tuple[Problem, ...] = (
    "not finite",
    "identical",
    "wrong base",
    "statistics",
    "barrier",
    "unrelated",
    "stale statistics",
    "start",
)


@final
@dataclass(frozen=True)
class Finding:
    """One thing that speaks against merging.

    Args:
        problem: Which kind.
        number: The figure behind it.
        text: What was found and what to do, in words.
    """

    problem: Problem
    number: float
    text: str


@final
@dataclass(frozen=True)
class Examination:
    """What was measured, and what speaks against merging; the worst first.

    Args:
        findings: Empty if nothing does.
        measures: Every figure by name.
        line: The loss on the line between the two sets that are farthest apart, by share of the way.
    """

    findings: tuple[Finding, ...]
    measures: dict[str, float]
    line: dict[float, float]

    @property
    def verdict(self) -> str:
        """``"merge"``, or the worst problem."""
        return self.findings[0].problem if self.findings else "merge"

    def _comparison(self) -> str:
        """Which set has the lower loss, of two: that nothing stands between them does not make their mean better."""
        losses = {name[8:].partition(",")[0]: loss for name, loss in self.measures.items() if name[:8] == "loss of "}
        if len(losses) != 2 or "raw" not in losses:
            return ""
        ((merged, loss),) = [each for each in losses.items() if each[0] != "raw"]
        gap = losses["raw"] - loss
        if gap == 0:
            return f"{merged} is the same as raw"
        return f"{merged} is {'better' if gap > 0 else 'worse'} than raw by {abs(gap):.2g}"

    def summary(self) -> str:
        """What speaks against merging; else which of two sets has the lower loss, and that no barrier lies between.

        Example:
            >>> losses = {"loss of raw": 0.5, "loss of ema": 0.4}
            >>> Examination((), losses | {"barrier": 0.01}, {0.0: 0.5, 0.5: 0.46, 1.0: 0.4}).summary()
            'ema is better than raw by 0.1 in loss; the weights lie in one basin.'
        """
        if self.findings:
            return f"{self._said}: {' '.join(finding.text for finding in self.findings)}"
        again = any(name.startswith("loss of raw,") for name in self.measures)
        measured = " (BatchNorm statistics of both measured again)" if again else ""
        compared = f"{found} in loss{measured}" if (found := self._comparison()) else ""
        basin = "the weights lie in one basin" if self.line else ""
        return ("; ".join(part for part in (compared, basin) if part) or "nothing speaks against merging") + "."

    @property
    def _said(self) -> str:
        if self.verdict == "identical" and any(name.startswith("loss of raw") for name in self.measures):
            return "nothing to merge (identical)"  # a run's average, as of one snapshot
        return "merge" if not self.findings else f"do not merge as they are ({self.verdict})"

    def report(self) -> str:
        """The verdict, what speaks against merging, and every figure."""
        compared = f"; {found}" if (found := self._comparison()) and self.verdict != "identical" else ""
        lines = [f"verdict: {self._said}{compared}"]
        lines += [f"  - {finding.text}" for finding in self.findings]
        width = max(map(len, self.measures), default=0)
        lines += [f"  {name:{width}}  {value:.4g}" for name, value in self.measures.items()]
        if self.line:
            lines.append("  loss on the line: " + ", ".join(f"{share:.0%} {x:.4g}" for share, x in self.line.items()))
        return "\n".join(lines)
