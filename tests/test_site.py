"""The site that ``mkdocs build`` makes: pages are in the navigation, links lead somewhere, nothing is cut off."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import CHROMIUM, Browser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from test_public_names import RECORD

ROOT = Path(__file__).parents[1]
PHONE = 400


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for module in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module, reason=f"{module} is in the `docs` extra")
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, the anchors it has, and the links of its navigation."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.navigation: set[str] = set()
        self.anchors: set[str] = set()
        self._within: list[bool] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "nav":
            self._within.append("md-nav--primary" in given.get("class", ""))
        for link in (given[name] for name in ("href", "src") if name in given):
            self.links.add(link)
            if any(self._within):
                self.navigation.add(link)

    def handle_endtag(self, tag: str) -> None:
        if tag == "nav":
            self._within.pop()


@cache
def read(path: Path) -> Page:
    return Page(path)


def pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]


def target(page: Path, link: str) -> tuple[Path, str]:
    path, _, anchor = unquote(link).partition("#")
    found = (page.parent / path.partition("?")[0]).resolve() if path else page
    return found / "index.html" if found.is_dir() else found, anchor


def is_inside(link: str) -> bool:
    return not re.match(r"[a-z]+:|//", link)


# ---- every page


@pytest.mark.slow
def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = site / "index.html"
    listed = {target(start, link)[0] for link in read(start).navigation if is_inside(link)}
    forgotten = [path.relative_to(site).as_posix() for path in pages(site) if path not in listed]
    assert not forgotten, "add a page to `nav` in mkdocs.yml; a card comes in by the `family` in its first lines"


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    broken = []
    for page in pages(site):
        for link in filter(is_inside, read(page).links):
            path, anchor = target(page, link)
            if not path.is_file() or (anchor and path.suffix == ".html" and anchor not in read(path).anchors):
                broken.append((page.relative_to(site).as_posix(), link))
    assert not broken


# ---- the reference


@pytest.mark.slow
def test_every_public_name_stands_in_the_reference_and_no_other(site: Path) -> None:
    recorded = {line.partition("(")[0] for line in RECORD.read_text().splitlines()}
    shown = {anchor for page in pages(site) for anchor in read(page).anchors if anchor.startswith("lightning_merge.")}
    assert len(recorded) > 300
    assert not recorded - shown, "a module has a page `docs/api/MODULE.md`, listed in mkdocs.yml"
    beside = {name for name in shown - recorded if name.rpartition(".")[0] not in recorded}
    assert not beside, "the names of private modules are no headings"
    hooks = {*dir(Callback), *dir(LightningModule), *dir(LightningDataModule)} - {"name"}
    of_lightning = {name for name in shown if name.split(".")[1] in ("callbacks", "compat", "recipes")}
    assert not {name for name in of_lightning if name.rpartition(".")[2] in hooks}


@pytest.mark.slow
def test_formulas_are_typeset_and_notebooks_show_their_figures(site: Path) -> None:
    texts = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in pages(site)}
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in texts["methods/ema.html"]
    assert not [name for name, text in texts.items() if "arithmatex" in text or "$$" in text]
    for name in ("average", "doctor"):
        assert re.search(rf'src="{name}_output_\d+_\d+\.png"', texts[f"notebooks/{name}.html"])


@pytest.mark.slow
def test_an_argument_is_in_the_index_that_works_from_a_folder(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8").removeprefix("var __index = ")
    places = {entry["location"] for entry in json.loads(index)["docs"] if "half_life" in entry["text"]}
    assert {"methods/ema.html", "api/callbacks.html#lightning_merge.callbacks.EMA"} <= places


# ---- in a browser

CUT_OFF = """[...document.querySelectorAll("article :is(table, img, math, pre)")].filter(part => {
  const scrolls = part => /auto|scroll/.test(getComputedStyle(part).overflowX)
  let above = part
  while (above.localName !== "article" && !scrolls(above)) above = above.parentElement
  return above.localName === "article" && part.getBoundingClientRect().right > innerWidth
}).map(part => part.outerHTML.slice(0, 80))"""
"""What reaches beyond the screen and cannot be scrolled to."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the path, as from `apt-get install chromium`")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.slow
def test_pages_fit_a_phone_and_complain_of_nothing(site: Path, browser: Browser) -> None:
    browser.resize(PHONE)
    found = {}
    for page in pages(site):
        browser.open(page.as_uri())
        wide, cut_off = browser.run("document.documentElement.scrollWidth"), browser.run(CUT_OFF)
        if wide > PHONE or cut_off or browser.errors:
            found[page.relative_to(site).as_posix()] = (wide, *cut_off, *browser.errors)
        browser.errors.clear()
    assert not found


@pytest.mark.slow
def test_search_finds_an_argument_from_a_folder(site: Path, browser: Browser) -> None:
    browser.open((site / "index.html").as_uri())
    found = browser.run("""new Promise(resolve => {
      const field = document.querySelector(".md-search__input")
      const results = document.querySelector(".md-search-result__list")
      const found = () => resolve([...results.querySelectorAll("a")].map(link => link.href))
      new MutationObserver(found).observe(results, {childList: true})
      field.focus()
      field.value = "half_life"
      field.dispatchEvent(new Event("input", {bubbles: true}))
      field.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}))
    })""")
    assert any("methods/ema.html" in link for link in found), found  # the first results; more come as one scrolls
    assert not browser.errors
