"""What the site has beside the pages in ``docs/``: the cards in its navigation, the changelog, the version."""

import re
import sys
import tomllib
from html import unescape
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

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


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A card ends with links to the reference of what it imports."""
    module, _, names = str(page.meta.get("import", "")).removeprefix("from ").partition(" import ")
    links = ", ".join(f"[{name}][{module}.{name}]" for name in names.split(", ") if name)
    return f"{markdown}\n\n**Every argument.** {links}\n" if links else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Formulas are typeset while the site is built, so that pages need no script for it."""
    formula = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'
    return re.sub(
        formula, lambda found: _mathml(found[3], "block" if found[2] == "[" else "inline"), html, flags=re.DOTALL
    )


def _mathml(tex: str, display: str) -> str:
    made = latex2mathml.converter.convert(unescape(tex).strip(), display=display)
    return f'<div class="formula">{made}</div>' if display == "block" else made


class Notebook(File):
    """A notebook is a page, rendered with the outputs that it holds; ``docs/execute.py`` makes them."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> None:
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        text, resources = MarkdownExporter().from_filename(file.abs_src_path)
        page = Notebook.generated(config, file.src_uri, content=text.replace("](output_", f"]({file.name}_output_"))
        files.append(page)
        for name, picture in resources["outputs"].items():
            folder, _, _ = file.src_uri.rpartition("/")
            files.append(File.generated(config, f"{folder}/{file.name}_{name}", content=picture))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=LAST_IN_SEARCH + re.sub(r"\]\(docs/", "](", changes)))
