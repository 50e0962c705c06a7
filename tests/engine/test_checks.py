"""What the checks of arguments take, what comes back, and what they say."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_merge import _checks as checks

TAKEN = {
    "NumPy's integer": (lambda: checks.whole("k", np.int64(3), 1), 3),
    "a tensor of one integer": (lambda: checks.whole("k", torch.tensor(3), 1), 3),
    "NumPy's float": (lambda: checks.number("x", np.float64(0.5), "[0, 1]"), 0.5),
    "an integer as a float": (lambda: checks.number("x", 1, "(0, 1]"), 1),
    "a fraction": (lambda: checks.number("x", Fraction(1, 4), "[0, 1)"), 0.25),
    "a number beyond any counter": (lambda: checks.number("x", 10**30), 1e30),
    "NumPy's bool": (lambda: checks.flag("hard", np.True_), True),
    "an array": (lambda: checks.numbers("x", np.array([0.5, 1])), (0.5, 1.0)),
    "a path": (lambda: checks.path("file", Path("a") / "b"), str(Path("a") / "b")),
    "a pattern": (lambda: checks.names("include", "*.bias"), ("*.bias",)),
    "a share": (lambda: checks.start("start", np.float64(0.5)), 0.5),
    "a count": (lambda: checks.start("start", np.int32(5)), 5),
    "a word": (lambda: checks.word("name", "ema-0.999 (slow)"), "ema-0.999 (slow)"),
}


@pytest.mark.parametrize(("check", "expected"), TAKEN.values(), ids=list(TAKEN))
def test_what_is_taken_comes_back_as_python_has_it(check: Any, expected: Any) -> None:
    found = check()
    assert found == expected
    assert type(found) is type(expected)
    assert "np." not in repr(found)


REFUSED = {
    "a float": (lambda: checks.whole("k", 1.5, 1), TypeError, "`k` must be a whole number of at least 1, got 1.5."),
    "a whole float": (lambda: checks.whole("k", 2.0), TypeError, "`k` must be a whole number, got 2.0."),
    "a bool": (lambda: checks.whole("k", True, 1), TypeError, "`k` must be a whole number of at least 1, got True."),
    "too few": (lambda: checks.whole("k", 0, 1), ValueError, "`k` must be at least 1, got 0."),
    "beyond reason": (lambda: checks.whole("k", 2**63), ValueError, f"`k` must be at most {2**63 - 1}, got {2**63}."),
    "NaN": (lambda: checks.number("x", math.nan, "[0, 1)"), ValueError, "`x` must be in [0, 1), got nan."),
    "infinity": (lambda: checks.number("x", math.inf, "(0, inf)"), ValueError, "`x` must be more than 0, got inf."),
    "the open end": (lambda: checks.number("x", 1, "[0, 1)"), ValueError, "`x` must be in [0, 1), got 1."),
    "text": (lambda: checks.number("x", "0.5", "[0, 1)"), TypeError, "`x` must be a number in [0, 1), got '0.5'."),
    "several texts": (lambda: checks.numbers("x", "12"), TypeError, "`x` must be finite numbers, got '12'."),
    "a text as a flag": (lambda: checks.flag("f", "false"), TypeError, "`f` must be True or False, got 'false'."),
    "a number as a flag": (lambda: checks.flag("f", 1), TypeError, "`f` must be True or False, got 1."),
    "another word": (lambda: checks.one_of("m", "c", ("a", "b")), ValueError, "`m` must be 'a' or 'b', got 'c'."),
    "a list": (lambda: checks.one_of("m", ["a"], ("a", None)), ValueError, "`m` must be 'a' or None, got ['a']."),
    "an empty text": (lambda: checks.monitor("monitor", ""), ValueError, "`monitor` must be the name of a metric"),
}


@pytest.mark.parametrize(("check", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_refused_is_said_with_name_range_and_value(check: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        check()
    assert str(caught.value).startswith(message)
