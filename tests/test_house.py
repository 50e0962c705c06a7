"""Small rooms: how long files and functions are, who imports whom, and where Lightning's private names are used.

Lines count if they hold code: docstrings, comments and blanks do not. ``NOT_YET`` is what still misses a goal.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sources import ROOT, sources, tree
from torch import nn

LIBRARY = ("callbacks", "recipes", "lightning_merge")
PRIVATE = "callbacks/_lightning"
"""The folder that may use private names of Lightning; its ``_private.py`` lists them."""

GOALS = {
    "code lines of a file": 250,
    "code lines of the file at the 90th percentile": 130,
    "code lines of a function": 50,
    "code lines of a function of the benchmarks": 60,
    "modules in one circle of imports": 1,
    "asserts that something is not None": 10,
    "private names of Lightning, outside their folder": 0,
    "files beside the public callbacks that define none": 0,
}
NOT_YET: dict[str, dict[str, int]] = {}
"""Limits, by goal and place, for what does not reach the goal yet. They may only shrink.

``python tests/test_house.py`` prints what they would be now.
"""


LIBRARY_FILES = [path for folder in LIBRARY for path in sources(folder)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def code_lines(path: Path) -> frozenset[int]:
    """The numbers of the lines that hold code."""
    text, lines = path.read_text(encoding="utf-8"), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER, tokenize.STRING):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return frozenset(lines)


# ---- the measures: by place, what is over the goal


def files() -> dict[str, int]:
    return {name(path): len(code_lines(path)) for path in LIBRARY_FILES}


def percentile() -> dict[str, int]:
    found = {}
    for title, paths in (("the library", LIBRARY_FILES), ("the engine", sources("lightning_merge"))):
        lengths = sorted(len(code_lines(path)) for path in paths if path.name != "__init__.py")
        found[title] = lengths[int(0.9 * len(lengths))]
    return found


def functions(paths: list[Path]) -> dict[str, int]:
    return {
        f"{name(path)}: {node.name}": len(code_lines(path) & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        for path in paths
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def asserts() -> dict[str, int]:
    found = 0
    for path in LIBRARY_FILES:
        tests = [node.test for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
        found += sum(ast.unparse(test).endswith("is not None") for test in tests)
    return {"the library": found}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lightning_merge" else ("lightning_merge", *parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in LIBRARY_FILES}


def imported(module: str) -> set[str]:
    """Modules of ours that one imports, in functions and for type checking too, with the packages they are in."""
    found = set()
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            found.add(target)
            while target := target.rpartition(".")[0]:
                if not module.startswith(f"{target}."):  # of the packages it is in, it imports what it names
                    found.add(target)
    return found & set(MODULES) - {module}


def circles() -> dict[str, int]:
    graph = {module: imported(module) for module in MODULES}
    reached: dict[str, set[str]] = {}
    for module in graph:
        seen, waiting = set(), [module]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[module] = seen
    found: dict[str, int] = {}
    for module in graph:
        circle = sorted(other for other in reached[module] if module in reached[other])
        if circle:
            found[", ".join(name(MODULES[each]) for each in circle)] = len(circle)
    return found


@cache
def names_of_lightning() -> set[str]:
    """Private attributes and methods that Lightning's own classes have, and torch's have not."""
    specification = find_spec("lightning")
    assert specification is not None
    folder = Path(specification.origin or "").parent / "pytorch"
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    assert texts
    found = {a or b for text in texts for a, b in re.findall(r"\bself\.(_[a-z]\w*)|\bdef (_[a-z]\w*)", text)}
    of_torch = (nn.Module(), torch.optim.SGD([torch.zeros(1)], lr=0.1))
    return {each for each in found if not any(hasattr(value, each) for value in of_torch)}


def private_names(path: Path) -> Iterator[str]:
    """Private names of Lightning that a file uses of another object than its own."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in names_of_lightning():
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names_of_lightning():
            yield node.value


def outside() -> dict[str, int]:
    return {
        name(path): sum(1 for _ in private_names(path))
        for path in LIBRARY_FILES
        if not name(path).startswith(f"{PRIVATE}/")
    }


def without_public_names() -> dict[str, int]:
    package = ROOT / "callbacks" / "__init__.py"
    public = {ast.literal_eval(each) for each in ast.walk(tree(package)) if isinstance(each, ast.Constant)}
    found = {}
    for path in sources("callbacks"):
        if path.parent == package.parent and path != package:
            defined = {getattr(node, "name", None) for node in tree(path).body}
            found[name(path)] = int(not defined & public)
    return found


MEASURES = {
    "code lines of a file": files,
    "code lines of the file at the 90th percentile": percentile,
    "code lines of a function": lambda: functions(LIBRARY_FILES),
    "code lines of a function of the benchmarks": lambda: functions(sources("benchmarks")),
    "modules in one circle of imports": circles,
    "asserts that something is not None": asserts,
    "private names of Lightning, outside their folder": outside,
    "files beside the public callbacks that define none": without_public_names,
}


@pytest.mark.parametrize("title", GOALS)
def test_the_house_keeps_its_measures(title: str) -> None:
    limits = NOT_YET.get(title, {})
    measured = {place: number for place, number in MEASURES[title]().items() if number > GOALS[title]}
    over = {place: number for place, number in measured.items() if number > limits.get(place, GOALS[title])}
    assert not over, f"{title}: the goal is {GOALS[title]}"
    assert not set(limits) - set(measured), f"{title}: these reach the goal now, so their limits can go"


def test_private_names_of_lightning_are_listed_in_one_file() -> None:
    paths = [path for path in sources("callbacks") if name(path).startswith(f"{PRIVATE}/")]
    used = {each for path in paths if path.name != "_private.py" for each in private_names(path)}
    listed = set(private_names(ROOT / PRIVATE / "_private.py"))
    assert used == listed, "record them in `_private.py`, each with what it is read or replaced for"


def print_what_is_not_yet() -> None:
    """Prints ``NOT_YET`` as the code is now."""
    for title, goal in GOALS.items():
        over = {place: number for place, number in MEASURES[title]().items() if number > goal}
        if over:
            print(f'    "{title}": {{')
            print(*(f'        "{place}": {number},' for place, number in over.items()), "    },", sep="\n")


if __name__ == "__main__":
    print_what_is_not_yet()
