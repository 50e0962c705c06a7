"""What the site has beside the pages in ``docs/``: the cards in its navigation, the changelog, the version."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.append(str(Path(__file__).parent))
import make_table

LAST_IN_SEARCH = "---\nsearch: { boost: 0.1 }\n---\n"
ROOT = Path(__file__).parents[1]


def on_config(config: MkDocsConfig) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    config.copyright = f"lightning-merge {version}, Apache-2.0"
    methods: list[Any] = next(entry["Methods"] for entry in config.nav or [] if "Methods" in entry)
    methods += [
        {family: [{make_table.short_title(card): f"methods/{card.name}"} for card in cards]}
        for family, cards in make_table.families().items()
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=LAST_IN_SEARCH + re.sub(r"\]\(docs/", "](", changes)))
