"""How branches mix as numbers: a matrix of shares, a row for each new branch."""

from collections.abc import Sequence
from typing import TypeAlias

from lightning_merge._checks import numbers, sequence, whole

Matrix: TypeAlias = Sequence[Sequence[float]]
"""A row per new branch, a column per old one."""

MOST = 10_000
"""Branches: more than any machine holds copies of a model."""


def uniform(count: int) -> list[list[float]]:
    """The matrix that makes every branch the mean of all.

    Args:
        count: Number of branches; at least 1.

    Raises:
        TypeError: If ``count`` is not a whole number.
        ValueError: If it is less than 1, or more than there can be.
    """
    count = whole("count", count, 1, MOST)
    return [[1 / count] * count for _ in range(count)]


def unit(j: int, count: int) -> list[float]:
    """The row of a branch that goes on as it is."""
    return [float(i == j) for i in range(count)]


def check_matrix(matrix: Matrix, count: int) -> None:
    """Raises a ``ValueError`` unless there is a row of shares for each branch."""
    matrix = sequence("matrix", matrix, "rows of shares")
    if len(matrix) != count:
        raise ValueError(f"`matrix` must have a row for each of the {count} branches, got {len(matrix)}.")
    for row in matrix:
        check_shares(row, count)


def check_shares(shares: Sequence[float], count: int) -> None:
    """Raises a ``ValueError`` unless there is a share of at least 0 for each branch and they sum to 1."""
    found = numbers("shares", shares)
    if len(found) != count or min(found) < 0 or abs(sum(found) - 1) > 1e-6:
        raise ValueError(
            f"shares must be {count} numbers of at least 0 that sum to 1, one for each branch, got {list(found)}."
        )
