"""What a window of ``Anneal`` cannot be."""

from lightning_merge.rules._decaying import Decaying
from lightning_merge.schedules import Duration
from lightning_merge.weights import State


def refuse_tokens(window: Duration, memory: int | None) -> None:
    """Raises if a window cannot be counted in tokens.

    Raises:
        ValueError: If it ends with the run, or is given in another unit.
    """
    if memory is None:
        raise ValueError(
            "`memory` must be given with `tokens`: a window that ends with the run begins at a step that nobody knows,"
            " as the tokens that are left are not. One that slides ends with the run too, whatever its shape:"
            " `memory=5`. Without `tokens`, give `window` in steps or as a share of the run."
        )
    if window.unit != "steps":
        raise ValueError(f"`window` must be a number of tokens where `tokens` counts them, got {window}.")


def refuse_another_plan(title: str, rule: Decaying, state: State) -> None:
    """Raises if a window that has begun cannot go on under a rule.

    Raises:
        ValueError: If it began with another shape, length or number of copies.
    """
    if (began := rule.began_as(state)) != rule.plan:
        was, now = (f" in {plan[2]} copies" if len(plan) > 2 else "" for plan in (began, rule.plan))
        raise ValueError(
            f"{title}: the window of the file began with `shape` {began[0]!r} and {began[1]} weights{was}, and now"
            f" `shape` is {rule.shape!r} and the window has {rule.snapshots}{now}: the weights of one decay are no"
            " merge of another. Give what was given then, or go on from a checkpoint before the window, or give this"
            " one another `name`, with which it starts empty."
        )


def too_long(title: str, length: int, end: int | None, done: int) -> ValueError:
    """The error of a window that does not fit into the rest of the run."""
    return ValueError(
        f"{title}: `window` must be at most what is left of the run, {end} steps of which {done} are done, got {length}"
        " steps. Give a shorter one, or go on from an earlier checkpoint."
    )
