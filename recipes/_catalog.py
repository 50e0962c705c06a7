"""The list of recipes, and the whole text of each.

Standard library only, so the command line lists recipes without loading torch or a reader of YAML.
"""

from difflib import get_close_matches
from pathlib import Path

_BASE = "_base"


def recipes() -> dict[str, Path]:
    """The file of every bundled recipe by name; ``digits/swa`` is ``digits/swa.yaml`` beside this module."""
    folder = Path(__file__).resolve().parent
    files = [path for path in sorted(folder.glob("*/*.yaml")) if path.stem != _BASE]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def summary(path: Path) -> str:
    """The first line of the comment that a recipe begins with."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def find(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: If there is none of this name; the message lists the nearest ones.
    """
    found = recipes()
    if name in found:
        return found[name]
    endings = [known for known in found if known.endswith(f"/{name}")]
    near = endings or get_close_matches(name, found, n=3, cutoff=0.5)
    cure = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(found)}."
    raise ValueError(f"no recipe is called {name!r}. {cure}")


def whole(name: str) -> str:
    """The text of a recipe as one file that needs no other: the base of its folder with what the recipe changes.

    Comments are kept, which a reader of YAML would drop; the comment at the top is the recipe's own.

    Raises:
        ValueError: If there is no recipe of this name.
    """
    path = find(name)
    comment, changes = _parts(path)
    _, base = _parts(path.with_name(f"{_BASE}.yaml"))
    return "\n".join([*comment, *merge(base, changes), ""])


def merge(base: list[str], changes: list[str]) -> list[str]:
    """Merges the lines of two YAML mappings: a base and its changes.

    A mapping is merged key by key, ``key+`` appends its items to the list ``key``, and anything else replaces. New keys
    come after those of the base. Both are block mappings indented alike, as all recipes are.

    Args:
        base: Lines of a mapping.
        changes: Lines of a mapping at the same level.

    Example:
        >>> merge(["a: 1", "b:", "  - 1"], ["a: 2", "b+:", "  - 2"])
        ['a: 2', 'b:', '  - 1', '  - 2']
    """
    entries = _entries(base)
    for key, lines in _entries(changes).items():
        name = key.removesuffix("+")
        before = entries.get(name)
        if before is None:
            entries[name] = [lines[0].replace(f"{key}:", f"{name}:", 1), *lines[1:]]
        elif name != key:
            entries[name] = before + lines[1:]
        elif _is_mapping(before) and _is_mapping(lines):
            entries[name] = [lines[0], *merge(before[1:], lines[1:])]
        else:
            entries[name] = lines
    return [line for lines in entries.values() for line in lines]


def _parts(path: Path) -> tuple[list[str], list[str]]:
    """The comment at the top of a file, and the lines after it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return lines[:start], lines[start:]


def _entries(lines: list[str]) -> dict[str, list[str]]:
    """The lines of each key of a mapping, the line of the key first."""
    entries: dict[str, list[str]] = {}
    key = ""
    for line in lines:
        if _indent(line) == _indent(lines[0]):
            key = line.strip().partition(":")[0]
            entries[key] = []
        entries[key].append(line)
    return entries


def _is_mapping(lines: list[str]) -> bool:
    return len(lines) > 1 and not lines[1].lstrip().startswith("- ")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
