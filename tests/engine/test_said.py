"""What a file says of settings: the same, also where the version that wrote it had not all of them."""

from dataclasses import dataclass, field

import pytest

from lightning_merge._said import is_of_another_class, is_said


@dataclass
class Inner:
    size: float = 1.0
    later: str = "as before"


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    share: float | None = None


class Other:
    """No dataclass."""


@pytest.mark.parametrize(
    ("text", "thing"),
    [
        ("Outer(inner=Inner(size=1.0, later='as before'), share=None)", Outer()),
        ("Outer(inner=Inner(size=1.0), share=None)", Outer()),
        ("Outer(inner=Inner(size=2.0))", Outer(Inner(2.0))),
    ],
)
def test_a_field_that_came_later_is_its_default(text: str, thing: Outer) -> None:
    assert is_said(text, thing)


@pytest.mark.parametrize(
    ("text", "thing"),
    [
        ("Outer(inner=Inner(size=1.0), share=None)", Outer(Inner(later="another"))),
        ("Outer(inner=Inner(size=2.0), share=None)", Outer()),
        ("Outer(inner=Inner(size=1.0), share=0.5)", Outer()),
        ("Outer(inner=Inner(size=1.0, gone=3))", Outer()),
        ("Inner(inner=Inner(size=1.0))", Outer()),
        ("<an object>", Outer()),
        ("Outer()", Other()),
    ],
)
def test_other_settings_are_others(text: str, thing: object) -> None:
    assert not is_said(text, thing)


@pytest.mark.parametrize(
    ("text", "thing", "is_another"),
    [
        ("Outer(share=0.5)", Outer(), False),
        ("Inner(size=1.0)", Outer(), True),
        ("outer.<locals>.Outer()", Outer(), True),
        ("<module.Other object at 0x7f>", Other(), False),
        ("<module.Other object at 0x7f>", Outer(), False),
    ],
)
def test_another_class_is_known_where_a_call_names_it(text: str, thing: object, is_another: bool) -> None:
    assert is_of_another_class(text, thing) is is_another
