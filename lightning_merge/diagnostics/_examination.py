"""An examination: what was measured, and what speaks against merging."""

from dataclasses import dataclass
from typing import Literal, final

Problem = Literal["not finite", "identical", "wrong base", "barrier", "unrelated", "stale statistics", "start"]


ORDER: tuple[Problem, ...] = (
    "not finite",
    "identical",
    "wrong base",
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

    def report(self) -> str:
        """The verdict, what speaks against merging, and every figure."""
        lines = [f"verdict: do not merge as they are ({self.verdict})" if self.findings else "verdict: merge"]
        lines += [f"  - {finding.text}" for finding in self.findings]
        width = max(map(len, self.measures), default=0)
        lines += [f"  {name:{width}}  {value:.4g}" for name, value in self.measures.items()]
        if self.line:
            lines.append("  loss on the line: " + ", ".join(f"{share:.0%} {x:.4g}" for share, x in self.line.items()))
        return "\n".join(lines)
