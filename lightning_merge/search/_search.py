"""Runs a search: asks a method for candidates, scores them, keeps a log."""

import os
from collections.abc import Callable, Sequence
from typing import Literal

from lightning_merge._checks import LISTED, function, instance, numbers, one_of, path, sequence
from lightning_merge._checks import seed as checked_seed
from lightning_merge._checks import whole as checked_count
from lightning_merge._choice import Mode
from lightning_merge.search._found import Evaluation, Found
from lightning_merge.search._grid import Grid
from lightning_merge.search._groups import Per, PerGroup, groups
from lightning_merge.search._log import Log
from lightning_merge.search._measured import Objective
from lightning_merge.search._method import Method
from lightning_merge.search._run import Run, Score
from lightning_merge.search._spaces import Free, Negative, Simplex, Space, one_hot

_SPACES: dict[str, type[Space]] = {"simplex": Simplex, "negative": Negative, "free": Free}


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
    per: Per = "model",
    tensors: Sequence[str] = (),
    log: str | os.PathLike[str] | None = None,
    subject: str = "",
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> Found:
    """The coefficients with the best score among those a method tries.

    The same arguments and scores lead to the same candidates. No candidate is scored twice,
    except by an ``Objective``. With a ``log``, a search
    that was stopped continues where it was, without scoring anything again.

    Args:
        score: Called with a tuple of ``count`` numbers, or an ``Objective``. A NaN, or an infinity that is bad, rejects
            the candidate.
        count: Number of ingredients; at least 1.
        method: How candidates are chosen.
        space: ``"simplex"`` (at least 0, one in sum), ``"negative"`` (any sign, one in sum), ``"free"`` (any), or
            one of ``Simplex``, ``Negative`` and ``Free`` with its bounds.
        mode: ``"max"`` if a higher score is better, ``"min"`` if a lower one is.
        budget: Most calls of ``score``, those in the log included; at least 1. ``None``: until the method ends.
        seed: Of everything random.
        candidates: Coefficients to score first; they count as found.
        whole: So many ingredients, the last ones, are not mixed with others but tried as they are: the previous merge.
        per: ``"model"``: one coefficient per ingredient. ``"tensor"`` and ``"group"``: one for each tensor, or module,
            of each; ``score`` is called with all of them, and ``by_tensor`` says which is whose.
        tensors: Their names, if there are several coefficients per ingredient.
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
    if not isinstance(score, Objective):
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
    size = 1 + max(groups(tensors, per), default=0)
    apart = {} if per == "model" else {"per": per}
    space = PerGroup(space, size) if apart else space
    run = Run(score, count * size, mode, budget, on_evaluation)
    _check(method, space, (count, size), whole, budget, candidates)
    if log is not None:
        header = {"method": repr(method), "count": count, "space": repr(space), "mode": mode, "seed": seed, **apart}
        subject = f"{subject}{score.subject}" if isinstance(score, Objective) else subject
        run.log = Log(path("log", log), {**header, "whole": whole, "subject": subject})
    first = [tuple(map(float, each)) for each in candidates]
    first += [space.alike(one_hot(count, index)) for index in range(count - whole, count)]
    complete = all(run.answer(each) is not None for each in first) and run.follow(method, space, count - whole, seed)
    return run.found(complete, method.takes_last)


def _check(
    method: Method,
    space: Space,
    sizes: tuple[int, int],
    whole: int,
    budget: int | None,
    candidates: Sequence[Sequence[float]],
) -> None:
    count, size = sizes
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
        if len(each) != count * size or not space.contains(each):
            raise ValueError(f"`candidates` must be {count * size} coefficients each, of {space!r}; got {tuple(each)}.")
