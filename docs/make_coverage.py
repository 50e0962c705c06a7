"""Makes docs/coverage.md, which says where each method of the survey is, from ``survey.yaml``."""

from pathlib import Path
from typing import Any

import yaml
from make_table import as_table

DOCS = Path(__file__).parent
PAGE, SURVEY = DOCS / "coverage.md", DOCS / "survey.yaml"

HEAD = """\
# Methods of the survey

Every method that *Model Merging in LLMs, MLLMs, and Beyond* (Yang et al., 2024,
[arXiv 2408.07666](https://doi.org/10.48550/arXiv.2408.07666)) and a summary of it name: what does it here, or why it is
not here. {here} of {every} are here.

*Made from `docs/survey.yaml` by `python docs/make_coverage.py`: change that, not this page.*

"""


def survey() -> dict[str, dict[str, dict[str, str]]]:
    """Methods by group.

    Raises:
        ValueError: If one is neither on a page that is there nor left out for a reason.
    """
    found: dict[str, dict[str, dict[str, str]]] = yaml.safe_load(SURVEY.read_text(encoding="utf-8"))
    for methods in found.values():
        for name, row in methods.items():
            if set(row) == {"why"}:
                continue
            page = _page(row)
            if page is None or "how" not in row or not (DOCS / page).is_file():
                raise ValueError(f"{name} needs `how` and a `card` or `page` that is there, or `why`, got {row}.")
    return found


def page() -> str:
    """The whole page."""
    groups = survey()
    rows = [row for methods in groups.values() for row in methods.values()]
    here = sum("how" in row for row in rows)
    parts = [HEAD.format(here=here, every=len(rows))]
    for group, methods in groups.items():
        parts.append(f"## {group}\n\n")
        parts.append(as_table(("method", "here"), [_row(name, row) for name, row in methods.items()]) + "\n")
    return "".join(parts).rstrip("\n") + "\n"


def _page(row: dict[str, str]) -> str | None:
    if "card" in row:
        return f"methods/{row['card']}.md"
    return f"{row['page']}.md" if "page" in row else None


def _row(name: str, row: dict[str, str]) -> tuple[Any, ...]:
    if "why" in row:
        return (name, f"not here: {row['why']}")
    return (f"[{name}]({_page(row)})", row["how"])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {sum(map(len, survey().values()))} methods")
