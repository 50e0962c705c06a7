"""Every constructor of a callback takes what it is handed, or refuses it at once by the argument's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import cases, refused_otherwise


@pytest.mark.parametrize(("name", "function"), cases(("callbacks", "compat")))
def test_callback_names_the_argument_it_refuses(
    name: str, function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not refused_otherwise(name, function)
