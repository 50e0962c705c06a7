"""Whether a file was written with the same settings, which it has as a ``repr``."""

import ast
from dataclasses import fields, is_dataclass
from typing import Any


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
