"""What is made of an average of other software, and what is said of one at its end."""

from lightning_merge.rules import Rule
from lightning_merge.weights import State, Weights

_KEPT_BY_OTHERS = {"average", "mean", "updates", "initial_share", "compensation"}


def adopted(rule: Rule, average: Weights, updates: int) -> State | None:
    """The state of a rule that goes on with an average that other software kept; ``None`` if it keeps more itself."""
    state = rule.init(average)
    if not state.keys() <= _KEPT_BY_OTHERS:
        return None
    state["updates"] = updates
    if "initial_share" in state:
        state["initial_share"] = 0.0  # such files do not say
    return state


def mostly_the_start(share: float, steps: int) -> str | None:
    """A sentence, if more than a tenth of a published average is the weights of the start."""
    if share <= 0.1 or not steps:
        return None
    return (
        f"{share:.0%} of the published average is still the weights of the start. For a run of {steps} steps"
        f" `decay={0.1 ** (1 / steps):.4g}` leaves 10 %; or use `half_life` or `warmup`."
    )
