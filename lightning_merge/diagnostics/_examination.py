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

    def _comparison(self) -> str:
        """Which set has the lower loss, of two: that nothing stands between them does not make their mean better."""
        losses = {name[8:]: loss for name, loss in self.measures.items() if name.startswith("loss of ")}
        if len(losses) != 2 or "raw" not in losses:
            return ""
        ((merged, loss),) = [each for each in losses.items() if each[0] != "raw"]
        gap = abs(loss - losses["raw"])
        if gap == 0:
            return ""
        return f"; {merged} is {'worse' if loss > losses['raw'] else 'better'} than raw by {gap:.3g}"

    def report(self) -> str:
        """The verdict, what speaks against merging, and every figure."""
        verdict = "merge" if not self.findings else f"do not merge as they are ({self.verdict})"
        if self.verdict == "identical" and "loss of raw" in self.measures:  # a run's average, as of one snapshot
            verdict = "nothing to merge (identical)"
        lines = [f"verdict: {verdict}{self._comparison()}"]
        lines += [f"  - {finding.text}" for finding in self.findings]
        width = max(map(len, self.measures), default=0)
        lines += [f"  {name:{width}}  {value:.4g}" for name, value in self.measures.items()]
        if self.line:
            lines.append("  loss on the line: " + ", ".join(f"{share:.0%} {x:.4g}" for share, x in self.line.items()))
        return "\n".join(lines)
