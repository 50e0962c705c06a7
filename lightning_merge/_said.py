"""Whether a file was written with the same settings, which it has as a ``repr``."""

import ast
import re
from dataclasses import fields, is_dataclass
from typing import Any

_CLASS = re.compile(r"[\w.<>]+(?=\()")
"""What is called in a ``repr``, which may be local to a function."""


def is_said(text: str, thing: Any) -> bool:
    """Whether a file says this of a thing: its ``repr``, or that of a version that had not all of its fields.

    A field that came later stands for what was done before it came if it has its default.

    Args:
        text: From a file.
        thing: A rule, a policy or a combiner.
    """
    if text == repr(thing):
        return True
    try:
        return _fits(ast.parse(text, mode="eval").body, thing)
    except (SyntaxError, ValueError, RecursionError):  # the repr of an object that is no dataclass
        return False


def is_of_another_class(text: str, thing: Any) -> bool:
    """Whether a file says that it was written with a thing of another class.

    A ``repr`` that is no call, as that of a class that is no dataclass, says nothing about it.

    Args:
        text: From a file.
        thing: A rule, a policy or a combiner.
    """
    written, now = (_CLASS.match(each) for each in (text, repr(thing)))
    return bool(written and now and written[0] != now[0])


def _fits(said: ast.expr, thing: Any) -> bool:
    if not (is_dataclass(thing) and isinstance(said, ast.Call) and not said.args):
        return ast.dump(said) == ast.dump(ast.parse(repr(thing), mode="eval").body)
    known = {keyword.arg: keyword.value for keyword in said.keywords}
    own = {each.name: each for each in fields(thing) if each.repr}
    return (
        ast.unparse(said.func) == type(thing).__qualname__
        and known.keys() <= own.keys()
        and all(
            _fits(known[name], getattr(thing, name)) if name in known else each.default == getattr(thing, name)
            for name, each in own.items()
        )
    )
