"""Checks of arguments, for every public constructor and function: each names the argument, its range and the value.

NumPy's numbers, and tensors and arrays that hold a single one, come back as Python's. A bool is no number, and a NaN is
never in a range. What is of the wrong type is a ``TypeError``, what is out of range a ``ValueError``.
"""

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NoReturn, TypeVar, get_args

Kind = TypeVar("Kind")

LISTED = 10**6
"""Most of what a list or a loop is made for. More would neither fit nor end, and would not say so."""

_COUNTED = 2**63 - 1
"""Most that anything counts: what counters in files and tensors hold."""


def whole(name: str, value: object, least: int | None = None, most: int = _COUNTED) -> int:
    """A whole number.

    Args:
        name: The argument as the caller wrote it.
        value: What was given.
        least: Its smallest value; ``None`` for any sign.
        most: Its largest value; to be given where a list, a loop or memory is made by it.

    Example:
        >>> whole("k", 3, 1)
        3
        >>> whole("k", 0, 1)
        Traceback (most recent call last):
        ValueError: `k` must be at least 1, got 0.
    """
    found = _plain(value)
    if isinstance(found, bool) or not isinstance(found, Integral):
        _refuse_type(name, "a whole number" + ("" if least is None else f" of at least {least}"), value)
    count = int(found)
    if least is not None and count < least:
        raise ValueError(f"`{name}` must be at least {least}, got {count}.")
    if count > most or count < -most - 1:
        raise ValueError(f"`{name}` must be at most {most}, got {count}.")
    return count


def seed(name: str, value: object, most: int = 2**64 - 1) -> int:
    """What random numbers follow from: any whole number that torch's generators take."""
    return whole(name, value, -(most // 2) - 1, most)


def number(name: str, value: object, interval: str = "(-inf, inf)", says: str | None = None) -> float:
    """A number in an interval.

    Args:
        name: The argument as the caller wrote it.
        value: What was given.
        interval: As it is written: ``"[0, 1)"``, ``"(0, inf)"``.
        says: What it must be, in words; by default from the interval.

    Example:
        >>> number("decay", 0.5, "[0, 1)")
        0.5
        >>> number("decay", 1.5, "[0, 1)")
        Traceback (most recent call last):
        ValueError: `decay` must be in [0, 1), got 1.5.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    says = says or _words(interval, low, high)
    found = real(name, value, says)
    above = found >= low if interval[0] == "[" else found > low
    below = found <= high if interval[-1] == "]" else found < high
    if not (above and below):
        raise ValueError(f"`{name}` must be {says}, got {found}.")
    return found


def real(name: str, value: object, says: str = "a number") -> float:
    """A number, whatever its size; a NaN too."""
    found = _plain(value)
    if isinstance(found, bool) or not isinstance(found, Real):
        _refuse_type(name, says if "number" in says or "whole" in says else f"a number {says}", value)
    if isinstance(found, float) or (isinstance(found, int) and abs(found) <= _COUNTED):
        return found
    try:
        return float(found)
    except OverflowError:
        raise ValueError(f"`{name}` must be {says}, got {_shown(value)}, which is too large for a number.") from None


def numbers(name: str, values: object, interval: str = "(-inf, inf)", says: str | None = None) -> tuple[float, ...]:
    """Several numbers, each in an interval; ``says`` is what the sequence must be.

    Example:
        >>> numbers("shares", [0.5, 2], "(0, 1]", "numbers in (0, 1], at least one")
        Traceback (most recent call last):
        ValueError: `shares` must be numbers in (0, 1], at least one, got (0.5, 2).
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    plain = "finite numbers" if low == -math.inf and high == math.inf else f"numbers {_words(interval, low, high)}"
    says = says or plain
    found = sequence(name, values, says)
    try:
        return tuple(number(name, each, interval) for each in found)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{name}` must be {says}, got {_shown(found)}.") from None


def sequence(name: str, values: object, says: str = "a sequence") -> tuple[Any, ...]:
    """The entries of a sequence, a set or an iterator; a text is none, and neither is a mapping."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        _refuse_type(name, says, values)
    try:
        return tuple(values)
    except TypeError:  # an array without dimensions
        _refuse_type(name, says, values)


def names(name: str, values: object) -> tuple[str, ...]:
    """Texts, as glob patterns; a single one may stand for itself."""
    found = (values,) if isinstance(values, str) else sequence(name, values, "a text or several")
    if not all(isinstance(each, str) for each in found):
        _refuse_type(name, "a text or several", values)
    return found


def flag(name: str, value: object) -> bool:
    """True or False; no text, no number.

    Example:
        >>> flag("hard", "false")
        Traceback (most recent call last):
        TypeError: `hard` must be True or False, got 'false'.
    """
    found = _plain(value)
    if not isinstance(found, bool):
        _refuse_type(name, "True or False", value)
    return found


def one_of(name: str, value: Kind, options: object, says: str | None = None) -> Kind:
    """One of some words, given as a tuple or a ``Literal``; ``None`` may be among them.

    Example:
        >>> one_of("mode", "up", ("min", "max"))
        Traceback (most recent call last):
        ValueError: `mode` must be 'min' or 'max', got 'up'.
    """
    allowed = options if isinstance(options, tuple) else get_args(options)
    if (value is None or isinstance(value, str)) and value in allowed:
        return value
    shown = [repr(each) for each in allowed]
    says = says or " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    raise ValueError(f"`{name}` must be {says}, got {_shown(value)}.")


def text(name: str, value: object, says: str = "a text") -> str:
    """A text that is not empty."""
    if not isinstance(value, str):
        _refuse_type(name, says, value)
    if not value:
        raise ValueError(f"`{name}` must be {says}, got ''.")
    return value


def monitor(name: str, value: object) -> str:
    """The name of a metric."""
    return text(name, value, "the name of a metric, as 'val/loss'")


def word(name: str, value: object, other_than: tuple[str, ...] = ()) -> str:
    """A word that may be part of a file's name and of a metric's, on any system."""
    but = "".join(f" other than {each!r}" for each in other_than)
    says = f"a word{but} and without '/', '\\', ':' and the like, which becomes part of file names"
    found = text(name, value, says)
    odd = any(letter in '/\\:*?"<>|' or not letter.isprintable() for letter in found)
    if odd or found in other_than or found.strip(" .") != found or len(found) > 100:
        raise ValueError(f"`{name}` must be {says}, got {found!r}.")
    return found


def instance(name: str, value: Kind, kind: Any, says: str | None = None) -> Kind:
    """An object of a class.

    Example:
        >>> instance("rule", 3, dict, "a rule")
        Traceback (most recent call last):
        TypeError: `rule` must be a rule, got 3.
    """
    if not isinstance(value, kind):
        _refuse_type(name, says or f"a {kind.__name__} of lightning_merge", value)
    return value


def path(name: str, value: object) -> str:
    """The path of a file or a folder, as text."""
    if not isinstance(value, (str, os.PathLike)):
        _refuse_type(name, "a path", value)
    return text(name, os.fspath(value), "a path")


def function(name: str, value: Kind) -> Kind:
    """Something that can be called."""
    if not callable(value):
        _refuse_type(name, "a function", value)
    return value


def start(name: str, value: object, unit: str = "run") -> int | float:
    """Where something begins: a count, or a share of the run in [0, 1)."""
    says = f"a whole number of at least 0 or a share of the {unit} in [0, 1)"
    found = real(name, value, says)
    is_count = isinstance(found, int)
    if not found >= 0 or (not is_count and found >= 1):
        raise ValueError(f"`{name}` must be {says}, got {found}.")
    return whole(name, found) if is_count else found


def settle(owner: object, **values: object) -> None:
    """Sets fields of a frozen dataclass to what the checks made of them."""
    for field, value in values.items():
        object.__setattr__(owner, field, value)


def _plain(value: Any) -> Any:
    """A NumPy number, or what an array or a tensor without dimensions holds, as Python has it."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # a tensor that holds nothing, as on the meta device
        return value


def _words(interval: str, low: float, high: float) -> str:
    if high == math.inf and low > -math.inf:
        return f"{'at least' if interval[0] == '[' else 'more than'} {low:g}"
    return "a finite number" if low == -math.inf and high == math.inf else f"in {interval}"


def _shown(value: object) -> str:
    """The value in a message, cut short."""
    said = repr(value)
    return said if len(said) <= 200 else f"{said[:200]}..."


def _refuse_type(name: str, says: str, value: object) -> NoReturn:
    raise TypeError(f"`{name}` must be {says}, got {_shown(value)}.")
