"""What users import and the arguments they name go on to exist: ``public_names.txt`` records them.

After something was added, ``python tests/test_public_names.py > tests/public_names.txt`` records that as well. Its diff
must show no line that is gone, and no argument that is gone, has moved, or must be given now.
"""

import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_merge

RECORD = Path(__file__).with_name("public_names.txt")
WITHOUT_ALL = ("selections", "soups")
"""Modules of which everything is public that they define; ``weights`` and ``shards`` are for the library's own use."""

OF_AVERAGES = [
    "final_metrics",
    "final_path",
    "merged_weights",
    "published_weights",
    "raw_weights",
    "ready",
    "state_key",
    "steps",
    "title",
    "update_window",
    "updates",
]
"""What users read of a callback that merges; its other methods are hooks, or for the publisher."""

OF_CALLBACKS = [*OF_AVERAGES, "head_of", "load_merged", "merged_vector", "synthesise"]


def packages() -> dict[str, list[str]]:
    """The public names of every module that has such."""
    found = {lightning_merge.__name__: [name for name in lightning_merge.__all__ if not name.startswith("_")]}
    for module in pkgutil.walk_packages(lightning_merge.__path__, "lightning_merge."):
        path = module.name.split(".")[1:]
        if any(part.startswith("_") for part in path):
            continue
        loaded = importlib.import_module(module.name)
        if path[0] in WITHOUT_ALL:
            own = {name for name, value in vars(loaded).items() if getattr(value, "__module__", "") == module.name}
            found[module.name] = sorted(name for name in own if not name.startswith("_"))
        elif hasattr(loaded, "__all__"):
            found[module.name] = sorted(loaded.__all__)
    return found


def callables(module: str, name: str) -> Iterator[tuple[str, Any]]:
    """A name with what it stands for; of a class the methods it adds too, of one of Lightning those users call."""
    value = getattr(importlib.import_module(module), name)
    yield name, value
    if isinstance(value, type):
        of_lightning = any(base.__module__.startswith("lightning.") for base in value.__mro__)
        for method, function in inspect.getmembers(value, inspect.isroutine):
            is_new = not any(hasattr(base, method) for base in value.__mro__[1:]) and not method.startswith("_")
            if method in vars(value) and (method in OF_CALLBACKS if of_lightning else is_new):
                yield f"{name}.{method}", function


def arguments(value: Any) -> list[str]:
    """Its arguments: ``name``, or ``name=`` where it may be left out; those after ``*`` go by their names alone."""
    if not (isinstance(value, type) or inspect.isroutine(value)):
        return []
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # as of an exception that is Python's own
        return []
    positional, named = [], []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            named += [f"{option}=" for option in _options(parameter.annotation)]
        elif parameter.kind is parameter.VAR_POSITIONAL:
            positional.append(f"*{parameter.name}")
        elif parameter.name != "self":
            text = parameter.name if parameter.default is parameter.empty else f"{parameter.name}="
            (named if parameter.kind is parameter.KEYWORD_ONLY else positional).append(text)
    return positional + ["*"] * bool(named) + sorted(named)


def _options(annotation: Any) -> list[str]:
    """The names in ``**options: Unpack[Options]``."""
    options = typing.get_args(annotation)
    return list(options[0].__annotations__) if typing.get_origin(annotation) is typing.Unpack else []


def current() -> dict[str, list[str]]:
    """Arguments by full name."""
    return {
        f"{module}.{path}": arguments(value)
        for module, names in packages().items()
        for name in names
        for path, value in callables(module, name)
    }


def recorded() -> dict[str, list[str]]:
    rows = (line.rstrip(")").partition("(") for line in RECORD.read_text().splitlines())
    return {name: given.split(", ") if given else [] for name, _, given in rows}


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    return current()


def test_every_name_is_still_there_and_a_new_one_is_recorded(names: dict[str, list[str]]) -> None:
    assert sorted(recorded().keys() - names.keys()) == []
    assert sorted(names.keys() - recorded().keys()) == [], __doc__


def test_every_argument_is_still_taken(names: dict[str, list[str]]) -> None:
    refused = {
        name: found for name, before in recorded().items() if name in names and (found := lost(before, names[name]))
    }
    assert refused == {}


def lost(before: list[str], now: list[str]) -> list[str]:
    """What calls that were right would now be refused for."""
    positional, named = split(before)
    positional_now, named_now = split(now)
    taken = {argument.rstrip("="): argument for argument in positional_now + named_now}
    found = [a for a in positional + named if a.rstrip("=") not in taken]
    found += [f"{a} must be given" for a in taken.values() if a[-1] != "=" and a[0] != "*" and a not in before]
    moved = [a for a, b in zip(positional, positional_now, strict=False) if a.rstrip("=") != b.rstrip("=")]
    return found + [f"{a} has moved" for a in [*moved, *positional[len(positional_now) :]]]


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("*") if "*" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


@pytest.mark.parametrize(
    ("before", "now", "problems"),
    [
        (["a", "b=", "*", "c="], ["a", "b=", "d=", "*", "c=", "e="], []),
        (["a", "*", "c="], ["a=", "c="], []),
        (["a", "b="], ["a"], ["b=", "b= has moved"]),
        (["a", "b="], ["a", "*", "b="], ["b= has moved"]),
        (["a=", "b="], ["b=", "a="], ["a= has moved", "b= has moved"]),
        (["a="], ["a"], ["a must be given"]),
        (["a"], ["a", "*", "b"], ["b must be given"]),
    ],
)
def test_a_call_that_would_be_refused_is_found(before: list[str], now: list[str], problems: list[str]) -> None:
    assert lost(before, now) == problems


def documented(value: Any) -> set[str]:
    """The arguments that stand under ``Args`` of its docstring; of options in that of what lists them."""
    function = value.__init__ if isinstance(value, type) else value
    options = [p.annotation for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    texts = [value.__doc__, *(typing.get_args(option)[0].__doc__ for option in options if _options(option))]
    if isinstance(value, type) and "__init__" not in vars(value):
        texts += [base.__doc__ for base in value.__mro__[1:]]
    sections = re.findall(r"^( *)Args:\n(.+?)(?:\n *\n|\Z)", "\n".join(text or "" for text in texts), re.M | re.S)
    return {name for indent, text in sections for name in re.findall(rf"^{indent}    (\w+): ", text, re.M)}


def test_every_argument_of_a_public_name_is_documented() -> None:
    missing = {}
    for module, names in packages().items():
        for path, value in (found for name in names for found in callables(module, name)):
            owners = [each for each in getattr(value, "__mro__", ()) if "__init__" in vars(each)]
            taken = {argument.strip("*=") for argument in arguments(value)} - {""}
            is_ours = not owners or owners[0].__module__.startswith("lightning_merge.")
            if taken and is_ours and (lacking := taken - documented(value)):
                missing[f"{module}.{path}"] = sorted(lacking)
    assert missing == {}


def test_an_average_has_what_users_read_of_it() -> None:
    from lightning_merge.callbacks import EMA, Published

    average = EMA()
    assert isinstance(average, Published)
    assert [name for name in OF_AVERAGES if not hasattr(average, name)] == []


if __name__ == "__main__":
    for path, given in sorted(current().items()):
        print(f"{path}({', '.join(given)})" if given else path)
