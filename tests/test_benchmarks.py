"""Benchmarks start, write what they have in one step, and stay readable; none is run here."""

import ast
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import scripts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_"))
NEEDS = ("ema_pytorch", "scipy", "transformers", "timm")


@pytest.mark.slow
def test_every_benchmark_explains_itself(tmp_path: Path) -> None:
    for package in NEEDS:
        pytest.importorskip(package)
    script = tmp_path / "all.py"
    script.write_text(f"""
import contextlib, io, runpy, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
for path in {list(map(str, SCRIPTS))!r}:
    sys.argv, text = [path, "--help"], io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    assert "--output" in text.getvalue(), path
""")
    code, printed = scripts.start(script, folder=tmp_path).finish()
    assert code == 0, printed


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_function_of_a_benchmark_is_longer_than_a_screen(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert not [each.name for each in functions if (each.end_lineno or 0) - each.lineno >= 60]


def _tree(path: Path) -> list[ast.stmt]:
    """The script with what it takes from its neighbours, beside the shared parts."""
    body = ast.parse(path.read_text()).body
    places = [each.module.replace(".", "/") for each in body if isinstance(each, ast.ImportFrom) and each.module]
    files = [BENCHMARKS / f"{place}.py" for place in places if place != "_shared"]
    return [*body, *(each for file in files if file.is_file() for each in _tree(file))]


def _calls(node: ast.AST) -> set[str]:
    calls = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    return {each.id if isinstance(each, ast.Name) else getattr(each, "attr", "") for each in calls}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_benchmarks_show_where_they_are_and_write_what_they_have(path: Path) -> None:
    tree = ast.Module(_tree(path), [])
    functions = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]
    loops = [each for each in ast.walk(tree) if isinstance(each, ast.For | ast.While)]
    imported = {name for each in tree.body if isinstance(each, ast.ImportFrom) for name in each.names}
    writers = {name.asname or name.name for name in imported if name.name == "write"}
    writers |= {each.name for each in functions if writers & _calls(each) and each.name != "main"}
    assert "progress" in _calls(tree)
    assert writers & _calls(tree)
    long = [function for function in functions if function.name in ("main", "run")]
    if any(isinstance(each, ast.For) for function in long for each in ast.walk(function)):
        assert any("progress" in _calls(loop) for loop in loops)
        assert any(writers & _calls(loop) for loop in loops)


@pytest.fixture(scope="module")
def shared() -> Any:
    specification = importlib.util.spec_from_file_location("_shared", BENCHMARKS / "_shared.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_results_are_written_whole_with_command_and_versions(shared: Any, tmp_path: Path) -> None:
    output = tmp_path / "results" / "found.json"
    for rows in ([1], [1, 2]):
        shared.write({**shared.header("lightning"), "rows": rows}, output)
        found = json.loads(output.read_text())
        assert found["rows"] == rows
        assert set(found["versions"]) == {"torch", "lightning", "python"}
        assert found["command"]
    assert [path.name for path in output.parent.iterdir()] == ["found.json"]
    shared.write({}, None)


def test_contestants_take_turns_and_rounds_that_warm_up_are_left_out(shared: Any) -> None:
    calls: list[str] = []
    found = shared.alternating({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm=1)
    assert calls == ["a", "b"] * 3
    assert found.keys() == {"a", "b"}
    assert shared.spread([3.0, 1.0, 2.0]) == [2.0, 1.0, 3.0]


def test_results_name_the_commit_and_whether_code_differs_from_it(shared: Any, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    for path in (folder / "_shared.py", folder / "results" / "found.json"):
        path.write_text("{}")
    shared.revision.__globals__["__file__"] = str(folder / "_shared.py")
    assert shared.revision() == "unknown"
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{4,}", commit := shared.revision())
    (folder / "results" / "found.json").write_text("[]")
    assert shared.revision() == commit
    (folder / "_shared.py").write_text("[]")
    assert shared.revision() == f"{commit}-dirty"
