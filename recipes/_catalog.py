"""Which recipes there are. Standard library only, so the command line lists them without loading torch."""

from difflib import get_close_matches
from pathlib import Path


def recipes() -> dict[str, Path]:
    """The file of every bundled recipe by name; ``digits/swa`` is ``digits/swa.yaml`` beside this module."""
    folder = Path(__file__).resolve().parent
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


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
