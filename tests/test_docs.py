"""The snippets of README and cards run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "methods").glob("*.md")), ROOT / "docs" / "migrating.md"]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_pages_with_snippets_are_found() -> None:
    assert len(PAGES) > 2
    assert all(snippets(page) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for snippet in snippets(page):
        exec(compile(snippet, f"{page.name} snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_readme_script_pasted_into_an_empty_file_leaves_a_file_that_loads_without_us(tmp_path: Path) -> None:
    script, *_ = snippets(ROOT / "README.md")
    (tmp_path / "train.py").write_text(script)
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, timeout=120)
    definition = script.partition("def loader")[0].replace("from lightning_merge.callbacks import EMA\n", "")
    load = f"""{definition}
import glob, sys
sys.modules["lightning_merge"] = None  # as if it were not installed
model = Regression.load_from_checkpoint(glob.glob("**/epoch*.ckpt", recursive=True)[0])
assert torch.isfinite(model.net(torch.zeros(1, 8))).all()
"""
    (tmp_path / "load.py").write_text(load)
    subprocess.run([sys.executable, "load.py"], cwd=tmp_path, check=True, timeout=120)
