"""The Python files of each layer, each parsed once."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def sources(folder: str) -> list[Path]:
    """The Python files of a layer; the links in ``lightning_merge/`` belong to their own layers."""
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if path.resolve().is_relative_to(ROOT / folder)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
