"""The snippets of README and docs run as they stand, and links lead somewhere; the site is in ``test_site.py``."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
import scripts
import yaml

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CARDS = [page for page in DOCS if page.parent.name == "methods" and page.name != "README.md"]
PAGES = [ROOT / "README.md", *DOCS]
WITH_SNIPPETS = [page for page in PAGES if "```python" in page.read_text()]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PLUS_MINUS = r"[+-]?\d[\d.]* ± [\d.]*\d"
WITHOUT_A_FILE = {
    "docs/methods/swa.md": {"80.82 ± 0.23", "82.15 ± 0.27"},  # published by the authors
}
"""Figures on a page that are not ours."""

sys.path.append(str(ROOT / "docs"))  # where the scripts are that make pages


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_pages_with_snippets_are_found() -> None:
    assert len(CARDS) > 2
    assert all(snippets(page) for page in [ROOT / "README.md", *CARDS])
    assert {"docs/faq.md", "docs/files.md", "docs/guides/lora.md"} <= {name(page) for page in PAGES}


@pytest.fixture
def _few_digits(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About half of the images, so epochs are half as long; not where a file is written after so many steps."""
    if page.name == "resume.md":
        return
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    found.images, found.target = found.images[:1000], found.target[:1000]
    monkeypatch.setattr(datasets, "load_digits", lambda: found)


@pytest.mark.usefixtures("_few_digits")
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=name)
def test_every_snippet_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for package in ("peft", "transformers"):
        if f"from {package} " in page.read_text():
            pytest.importorskip(package)
    for snippet in snippets(page):
        namespace = ModuleType("__main__")
        # A dataclass looks its module up by name.
        monkeypatch.setitem(sys.modules, "users_page", namespace)
        namespace.__dict__["__name__"] = "users_page"
        exec(compile(snippet, f"{page.name} snippet", "exec"), namespace.__dict__)


# ---- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    given = set(re.findall(r'<\w+ id="([^"]+)"', text))
    return given | {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_links_of_the_site_stay_inside_it() -> None:
    for page in DOCS:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not re.match(r"[a-z]+:|#", link):
                assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs"), (page, link)


ANSWERS = {
    "the default of EMA(decay)": ("docs/methods/ema.md", r"the default, `decay=0\.999`"),
    "the file with the merged weights": ("docs/files.md", r"`<name>-final\.ckpt`"),
    "how to resume": ("docs/resume.md", r"(?m)^# Resuming"),
    "an average in a plain loop": ("docs/guides/plain-loops.md", r"(?m)^# A training loop of your own"),
}


@pytest.mark.parametrize("question", ANSWERS)
@pytest.mark.parametrize("start", ["README.md", "docs/index.md"])
def test_a_reader_finds_an_answer_in_two_clicks(start: str, question: str) -> None:
    page, answer = ANSWERS[question]
    assert re.search(answer, (ROOT / page).read_text())
    reached = {ROOT / start}
    for _ in range(2):
        reached |= {each for page in reached if page.suffix == ".md" for each in linked(page)}
    assert ROOT / page in reached


def linked(page: Path) -> set[Path]:
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text())
    return {path for link in links if (path := (page.parent / link).resolve()).is_file()}


# ---- README


def test_readme_keeps_its_length_and_order() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == [
        "Install and see it work",
        "Add it to your own training",
        "Which weights are where",
        "Choose a method",
        "Recipes and commands",
        "Continual learning in 5 lines",
        "Migrating",
        "Limits",
    ]


def test_readme_names_every_command() -> None:
    from lightning_merge.cli import _HELP

    commands = re.findall(r"^  (\w+)", _HELP, flags=re.MULTILINE)
    text = (ROOT / "README.md").read_text()
    assert {"inspect", "doctor", "recipes", "run"} <= set(commands)
    assert not [command for command in commands if f"lightning-merge {command}" not in text]


@pytest.mark.slow
def test_the_readme_script_pasted_into_an_empty_file_leaves_a_file_that_loads_without_us(tmp_path: Path) -> None:
    script, *_ = snippets(ROOT / "README.md")
    (tmp_path / "train.py").write_text(script)
    code, printed = scripts.start(tmp_path / "train.py", folder=tmp_path).finish()
    assert code == 0, printed
    definition = script.partition("def loader")[0].replace("from lightning_merge.callbacks import EMA\n", "")
    load = f"""{definition}
import glob, sys
sys.modules["lightning_merge"] = None  # as if it were not installed
model = Regression.load_from_checkpoint(glob.glob("**/epoch*.ckpt", recursive=True)[0])
assert torch.isfinite(model.net(torch.zeros(1, 8))).all()
"""
    (tmp_path / "load.py").write_text(load)
    subprocess.run([sys.executable, "load.py"], cwd=tmp_path, check=True, timeout=120)


# ---- made from others


@pytest.fixture(scope="module")
def maker() -> Any:
    """``docs/make_table.py``."""
    return importlib.import_module("make_table")


@pytest.fixture(scope="module")
def measured() -> Any:
    """``docs/measured.py``."""
    return importlib.import_module("measured")


def test_the_table_of_methods_is_made_from_the_cards(maker: Any) -> None:
    assert maker.TABLE.read_text() == maker.table(), "run `python docs/make_table.py`"
    of_families, _ = maker.table().split("## What we measured")
    rows = [line.strip("| ").split(" | ") for line in of_families.splitlines() if line.startswith("| [")]
    assert len(rows) == len(CARDS)
    assert all(len(row) == len(maker.COLUMNS) and all(row[:5]) for row in rows)
    assert max(len(cell) for row in rows for cell in row[1:]) <= 56


def test_the_table_of_results_is_made_from_claims_and_files() -> None:
    maker = importlib.import_module("make_results")
    assert maker.PAGE.read_text() == maker.page(), "run `python docs/make_results.py`"
    assert maker.README.read_text() == maker.readme(), "run `python docs/make_results.py`"
    rows = [line for line in maker.page().splitlines() if line.startswith("| [")]
    assert len(rows) == len(CARDS)
    signs = [row.split(" | ")[2] for row in rows]
    assert all(re.fullmatch(rf"yes|no|conditional: \d+ of \d+|{maker.UNTESTED}", sign) for sign in signs)
    assert maker.sign([(1.0, 0.5), (1.0, 2.0)]) == "conditional: 1 of 2"


def test_evidence_of_less_than_three_seeds_is_no_figure_in_the_table(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    for name, seeds in (("evidence-two", 2), ("evidence-three", 3)):
        runs = [{"seed": seed, "scores": {"view": {"plain": 1.0, "better": 2.0 + seed}}} for seed in range(seeds)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"beside": "plain", "runs": runs[::-1]}))
    found = measured.of_evidence()
    assert list(found) == ["evidence-three: view"]
    assert found["evidence-three: view"].scores["better"] == [2.0, 3.0, 4.0]
    assert found["evidence-three: view"].difference("better")[0] == pytest.approx(2.0)


@pytest.mark.parametrize("card", CARDS, ids=name)
def test_a_card_shows_its_import_and_what_was_measured(maker: Any, measured: Any, card: Path) -> None:
    facts, text = maker.parts(card)
    words = " ".join(text.split())
    assert facts["import"] in words
    for comparison, contestants in facts["measured"].items():
        each = measured.comparisons()[comparison]
        for one in contestants:
            assert measured.as_difference(*each.difference(one), each.digits) in words
    for section in ("Use it", "Do not", "Cost.", "Results.", "Reference."):
        assert f"**{section}" in text


@pytest.mark.parametrize("page", [page for page in PAGES if re.search(PLUS_MINUS, page.read_text())], ids=name)
def test_figures_are_those_in_the_files_of_results(measured: Any, page: Path) -> None:
    shown = set(re.findall(PLUS_MINUS, " ".join(page.read_text().split()).replace("\u2212", "-")))
    unknown = shown - measured.figures().keys() - WITHOUT_A_FILE.get(name(page), set())
    assert not unknown, "`python docs/measured.py` prints what the files say; a new file is read there"


def test_pages_say_of_time_memory_and_resuming_what_the_files_say() -> None:
    stated = importlib.import_module("stated").stated()
    assert len(stated) > 10
    for page, expected in stated.items():
        text = " ".join((ROOT / "docs" / page).read_text().split())
        assert not [words for words in expected if words not in text], f"{page}: see `python docs/stated.py`"


@pytest.mark.parametrize("name", ["ema", "lawa", "swad"])
def test_recipes_expect_what_the_files_say(measured: Any, name: str) -> None:
    scores = measured.comparisons()["quality-cifar10"].scores
    own, raw = (sum(scores[each]) / len(scores[each]) for each in (name, "raw"))
    assert f"gave {own:.1f} % against {raw:.1f} % raw" in (ROOT / "recipes" / "cifar10" / f"{name}.yaml").read_text()


def test_recipes_of_digits_expect_what_their_file_says(measured: Any) -> None:
    made = importlib.import_module("make_expect")
    assert {"digits/ema", "continual/digits"} <= set(made.written())
    for name in made.written():
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        assert f"\n{made.expect(name)}" in text, f"{name}: run `python docs/make_expect.py`"
    digits = {f"digits/{path.stem}" for path in (ROOT / "recipes" / "digits").glob("[!_]*.yaml")}
    assert digits - measured.digits_recipes().keys() == {"digits/swa"}  # which make_first_run.py writes


def test_every_method_of_the_survey_is_on_a_page_or_left_out_for_a_reason(maker: Any) -> None:
    from lightning_merge._commands._combine_arguments import AVERAGE_RULES, SOUP_RULES

    coverage = importlib.import_module("make_coverage")
    assert coverage.PAGE.read_text() == coverage.page(), "run `python docs/make_coverage.py`"
    rows = {name: row for methods in coverage.survey().values() for name, row in methods.items()}
    assert len(rows) == 146
    public = (ROOT / "tests" / "public_names.txt").read_text()
    for name, row in rows.items():
        for used in re.findall(r"`(?:\w+\.)?([A-Z]\w+)", row.get("how", "")):
            assert re.search(rf"[.]{used}\b", public), f"{name}: {used}"
        for used, keyword in re.findall(r"([A-Z]\w+)\((\w+)=", row.get("how", "")):
            assert re.search(rf"[.]{used}\(.*\b{keyword}\b", public), f"{name}: {used}({keyword}=)"
        for rule in re.findall(r"--rule ([\w-]+)", row.get("how", "")):
            assert rule in (*SOUP_RULES, *AVERAGE_RULES), f"{name}: {rule}"


def test_what_plus_minus_means_is_said_once() -> None:
    saying = [name(page) for page in PAGES if "95 % interval" in page.read_text()]
    assert saying == ["docs/glossary.md", "docs/methods/README.md"]


def test_every_callback_that_publishes_has_a_card(maker: Any) -> None:
    from lightning_merge import callbacks

    shown = {name for card in CARDS for name in maker.parts(card)[0]["import"].partition(" import ")[2].split(", ")}
    classes = {name: value for name in callbacks.__all__ if isinstance(value := getattr(callbacks, name), type)}
    publishing = {name for name, value in classes.items() if issubclass(value, callbacks.Published)}
    assert publishing - shown == {"Published", "WeightMerging"}  # what others are made of


@pytest.mark.parametrize("card", CARDS, ids=name)
def test_references_of_a_card_have_links(card: Path) -> None:
    reference = card.read_text().partition("**Reference.**")[2]
    assert "https://doi.org/10." in reference or reference.startswith(" None")
    assert not re.findall(r"(?<!\[)\*[A-Z][^*]+\*(?!\])", reference)


def test_every_family_has_a_picture_of_what_is_merged_when(maker: Any, tmp_path: Path) -> None:
    drawing = importlib.import_module("draw")
    drawing.draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in drawing.PICTURES.iterdir()}, "run `python docs/draw.py`"
    assert {f"{maker.slug(family)}.svg" for family in maker.FAMILIES} <= drawn
    assert max(path.stat().st_size for path in drawing.PICTURES.iterdir()) < 64_000


def test_strategies_of_the_cards_are_those_that_are_tested(maker: Any) -> None:
    from lightning_merge import callbacks

    head = next(line for line in (ROOT / "docs" / "strategies.md").read_text().splitlines() if line.startswith("| | "))
    sharded = set(re.findall(r"[A-Z]\w+", head.split("|")[2]))
    for card in CARDS:
        facts, _ = maker.parts(card)
        strategies = {strategy.partition(" (")[0] for strategy in facts["strategies"]}
        assert strategies <= {"one device", "DDP", "FSDP2", "tensor parallel", "a branch per process", "works on files"}
        shown = facts["import"].partition(" import ")[2].split(", ")
        assert ("tensor parallel" in strategies) == bool(set(shown) & sharded), card.name
        classes = [getattr(callbacks, each) for each in shown if isinstance(getattr(callbacks, each, None), type)]
        branching = any(issubclass(each, callbacks.Branching) for each in classes)
        assert ("a branch per process" in strategies) == branching, card.name


def test_every_cell_of_the_strategies_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs" / "strategies.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|") and "---" not in line]
    cells = [cell for row in rows if "test_" in row[-1] for cell in (row[1:] if len(row) > 3 else row[-1:])]
    assert len(cells) >= 28
    for cell in cells:
        assert (named := re.findall(r"`(test_\w+\.py)`", cell)), cell
        assert all((ROOT / "tests" / "callbacks" / file).is_file() for file in named), cell


def test_the_words_of_the_glossary_are_defined_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    for word in ("rule", "combiner", "policy", "preset", "recipe"):
        assert text.count(f"| **{word}** |") == 1


def test_every_package_that_is_installed_is_named_with_its_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(each for extra in extras.keys() - {"test", "docs", "dev"} for each in extras[extra]),
    ]
    names = {re.split(r"[\[><=!]", each)[0] for each in wanted} - {"lightning-merge"}
    rows = re.findall(r"^\| ([a-z0-9-, ]+) \| \S.* \|", (ROOT / "docs" / "releases.md").read_text(), flags=re.MULTILINE)
    assert names
    assert names <= {each for row in rows for each in row.split(", ")}


def test_citation_is_complete_and_the_issue_form_asks_for_inspect() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
    forms = [path.read_text() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")]
    assert any("lightning-merge inspect FILE" in form for form in forms)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(path: Path, tmp_path: Path) -> None:
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    ends = "assert plt.get_fignums(), 'nothing was drawn'"
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join(["import matplotlib", "matplotlib.use('agg')", *cells, ends]))
    code, printed = scripts.start(script, folder=tmp_path).finish()
    assert code == 0, printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_their_figures_and_nothing_of_the_machine(path: Path) -> None:
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "run `python docs/execute.py`"
    assert all(output.get("name") == "stdout" or "image/png" in output["data"] for output in outputs)


def test_notebooks_are_found() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["average", "doctor"]
