"""Coefficients for the checkpoints of one run, oldest first, that need no data."""

import itertools
from collections.abc import Sequence

from lightning_merge._checks import LISTED, number, numbers, whole
from lightning_merge.schedules._decay import Decay, decay

Coefficients = tuple[float, ...]


def mean(count: int) -> Coefficients:
    """``1 / n`` each.

    Args:
        count: Number of checkpoints; at least 1.

    Example:
        >>> mean(4)
        (0.25, 0.25, 0.25, 0.25)
    """
    count = _checked(count)
    return (1.0 / count,) * count


def linear(count: int) -> Coefficients:
    """``c_i ~ i``: the later, the more.

    Args:
        count: Number of checkpoints; at least 1.

    Example:
        >>> linear(4)
        (0.1, 0.2, 0.3, 0.4)

    References:
        Li et al., "Model merging in pre-training of large language models", 2025 (WMA).
    """
    count = _checked(count)
    total = count * (count + 1) / 2
    return tuple((index + 1) / total for index in range(count))


def window(count: int, k: int) -> Coefficients:
    """The mean of the last ``k``.

    Args:
        count: Number of checkpoints; at least 1.
        k: Number of checkpoints that count; in [1, ``count``].

    Example:
        >>> window(4, 2)
        (0.0, 0.0, 0.5, 0.5)

    Raises:
        ValueError: If ``k`` is not in [1, ``count``].
    """
    count, k = _checked(count), whole("k", k)
    if not 1 <= k <= count:
        raise ValueError(f"`k` must be in [1, {count}], the number of checkpoints, got {k}.")
    return (0.0,) * (count - k) + (1.0 / k,) * k


def exponential(count: int, decay: float) -> Coefficients:
    """``merged <- decay * merged + (1 - decay) * next``, from the first checkpoint on.

    Args:
        count: Number of checkpoints; at least 1.
        decay: Share of the merge so far that is kept at each checkpoint, in [0, 1).

    Example:
        >>> [round(c, 6) for c in exponential(4, 0.8)]
        [0.512, 0.128, 0.16, 0.2]

    Raises:
        ValueError: If ``decay`` is outside [0, 1).
    """
    count, decay = _checked(count), number("decay", decay, "[0, 1)")
    ages = range(count - 1, -1, -1)
    return tuple(decay**age * (1.0 if age == count - 1 else 1.0 - decay) for age in ages)


def by_decay(shape: Sequence[float]) -> Coefficients:
    """The merge that weights updates like a learning rate that decays: ``c_0 = 1 - w_1``, ``c_j = w_j - w_{j+1}``.

    ``w_j`` is the factor on all updates between checkpoints ``j - 1`` and ``j``. Exact if updates simply add up, as
    those of SGD along a path that does not change.

    Args:
        shape: ``w_1, ..., w_k``, none larger than the one before, all in [0, 1]; for ``k + 1`` checkpoints.

    Raises:
        ValueError: If it rises, or leaves [0, 1].

    Example:
        >>> [round(c, 6) for c in by_decay([0.8, 0.6, 0.4, 0.2])]
        [0.2, 0.2, 0.2, 0.2, 0.2]

    References:
        Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging for LLM pre-training", ICLR 2026.
    """
    edges = (1.0, *numbers("shape", shape), 0.0)
    if any(a < b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"`shape` must fall within [0, 1], got {edges[1:-1]}.")
    return tuple(a - b for a, b in itertools.pairwise(edges))


def wsm_linear(count: int) -> Coefficients:
    """The merge that stands for a linear decay: the mean.

    Args:
        count: Number of checkpoints; at least 1.

    Example:
        >>> [round(c, 6) for c in wsm_linear(5)]
        [0.2, 0.2, 0.2, 0.2, 0.2]
    """
    return _wsm("linear", count)


def wsm_cosine(count: int) -> Coefficients:
    """The merge that stands for a decay by ``(1 + cos(pi progress)) / 2``; those in the middle get most.

    Args:
        count: Number of checkpoints; at least 1.

    Example:
        >>> [round(c, 6) for c in wsm_cosine(5)]
        [0.095492, 0.25, 0.309017, 0.25, 0.095492]
    """
    return _wsm("cosine", count)


def wsm_1_sqrt(count: int) -> Coefficients:
    """The merge that stands for a decay by ``1 - sqrt(progress)``; the oldest gets most.

    Args:
        count: Number of checkpoints; at least 1.

    Example:
        >>> [round(c, 6) for c in wsm_1_sqrt(5)]
        [0.447214, 0.185242, 0.142141, 0.119831, 0.105573]
    """
    return _wsm("1-sqrt", count)


def wsm_exponential(count: int) -> Coefficients:
    """The merge that stands for a decay by ``2 * 0.5 ** progress - 1``; the older, the more.

    Args:
        count: Number of checkpoints; at least 1.

    Example:
        >>> [round(c, 6) for c in wsm_exponential(5)]
        [0.258899, 0.225385, 0.196209, 0.17081, 0.148698]
    """
    return _wsm("exponential", count)


def _wsm(shape: Decay, count: int) -> Coefficients:
    count = _checked(count)
    return by_decay([decay(shape, step / count) for step in range(1, count)])


def _checked(count: int) -> int:
    return whole("count", count, 1, LISTED)
