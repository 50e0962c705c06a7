"""Every public callable of the engine takes what it is handed, or refuses it at once by the argument's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import cases, refused_otherwise

PACKAGES = (
    "adapters",
    "alignment",
    "branches",
    "calibration",
    "combiners",
    "continual",
    "diagnostics",
    "importance",
    "optim",
    "rules",
    "schedules",
    "search",
    "tangent",
    "trajectory",
    "transformers",
)
MODULES = ("selections", "soups")


def test_every_package_with_public_names_is_in_the_table() -> None:
    found = {path.parent.name for path in Path("lightning_merge").glob("*/__init__.py")}
    # What files and weights have is called by the library, with what it has checked already; compat is Lightning's API.
    inner = {"_averaging", "_commands", "_report", "callbacks", "compat", "recipes", "files", "weights"}
    assert found - inner == set(PACKAGES)


@pytest.mark.parametrize(("name", "function"), cases((*PACKAGES, *MODULES)))
def test_engine_names_the_argument_it_refuses(
    name: str, function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not refused_otherwise(name, function)
