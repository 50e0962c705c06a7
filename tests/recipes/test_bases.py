"""A recipe is the base of its folder and what it changes; what is printed and run is one whole file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_merge.recipes._catalog import merge, recipes, whole

RECIPES = recipes()


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def base_of(name: str) -> dict[str, Any]:
    return read(RECIPES[name].with_name("_base.yaml"))


def merged(base: Any, changes: Any) -> Any:
    """The same merge on values instead of lines."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    result = dict(base)
    for key, value in changes.items():
        result[key.removesuffix("+")] = base[key[:-1]] + value if key.endswith("+") else merged(base.get(key), value)
    return result


def repeated(base: Any, changes: dict[str, Any]) -> list[str]:
    """The keys whose value is that of the base already."""
    found = []
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found += repeated(base[key], value)
        elif key in base and base[key] == value:
            found.append(key)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_whole_file_is_the_base_with_the_changes_of_the_recipe(name: str) -> None:
    content = yaml.safe_load(whole(name))
    assert content == merged(base_of(name), read(RECIPES[name]))
    assert {"seed_everything", "trainer", "model", "data"} <= set(content)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_only_what_differs_from_its_base(name: str) -> None:
    assert not repeated(base_of(name), read(RECIPES[name]))


@pytest.mark.parametrize("name", RECIPES)
def test_whole_file_begins_with_the_recipes_comment_and_keeps_every_remark(name: str) -> None:
    text, own = whole(name), RECIPES[name].read_text()
    head, body = own.partition("\ntrainer:")[0], own.partition("\ntrainer:")[2]
    assert text.startswith(f"{head}\nseed_everything:")
    assert not [line for line in body.splitlines() if " # " in line and line not in text.splitlines()]


def test_bases_are_no_recipes() -> None:
    assert not [name for name in RECIPES if "_base" in name]
    assert {path.parent for path in RECIPES.values()} == {path.parent for path in _bases()}


def test_recipes_of_a_folder_train_into_folders_of_their_own() -> None:
    roots = [yaml.safe_load(whole(name))["trainer"]["default_root_dir"] for name in RECIPES]
    assert len(set(roots)) == len(roots)


@pytest.mark.parametrize(
    ("base", "changes", "result"),
    [
        ("a: 1", "a: 2", "a: 2"),
        ("a: 1 # why", "b: 2", "a: 1 # why\nb: 2"),
        ("a:\n  b: 1\n  c: 2", "a:\n  c: 3 # more", "a:\n  b: 1\n  c: 3 # more"),
        ("a:\n  - 1", "a:\n  - 2", "a:\n  - 2"),
        ("a:\n  - 1", "a+:\n  - b: 2\n    c: 3", "a:\n  - 1\n  - b: 2\n    c: 3"),
        ("a: 1", "b+:\n  - 2", "a: 1\nb:\n  - 2"),
        ("a:\n  - 1", "a: []", "a: []"),
        ("a: 1", "a:\n  b: 2", "a:\n  b: 2"),
    ],
)
def test_changes_are_merged_key_by_key(base: str, changes: str, result: str) -> None:
    assert merge(base.splitlines(), changes.splitlines()) == result.splitlines()


def _bases() -> list[Path]:
    return sorted(RECIPES["digits/plain"].parents[1].glob("*/_base.yaml"))
