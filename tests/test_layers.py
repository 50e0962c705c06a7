"""Which layer may import what. The engine is plain torch, callbacks know no data, the command starts fast.

What tests the engine is in the folder of that name, and needs no Lightning either.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from sources import ROOT, sources, tree

OPTIONAL = {
    "optuna",
    "safetensors",
    "fsspec",
    "scipy",
}  # the engine imports them inside functions that say what to install
RECIPES_ONLY = {"timm", "torchvision", "yaml", "omegaconf", "jsonargparse", "sklearn", "matplotlib", "rich"}


@cache
def imports(path: Path, at_top_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in tree(path).body if at_top_only else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer(name: str) -> str:
    """``callbacks`` or ``recipes`` for our own modules of these layers, else the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "lightning_merge" and parts[1:2] in (["callbacks"], ["recipes"]) else parts[0]


def foreign(names: set[str]) -> set[str]:
    return {layer(name) for name in names} - set(sys.stdlib_module_names) - {"lightning_merge"}


# What a user starts or imports by a short name: it leads to every layer.
COMMANDS = [
    ROOT / "lightning_merge" / "cli.py",
    ROOT / "lightning_merge" / "pytest_plugin.py",
    *sources("lightning_merge/compat"),
    *sources("lightning_merge/_commands"),
]
TRANSFORMERS = sources("lightning_merge/transformers")
ENGINE = [path for path in sources("lightning_merge") if path not in (*COMMANDS, *TRANSFORMERS)]
CALLBACKS = sources("callbacks")


def test_layers_are_found():
    assert ROOT / "lightning_merge" / "weights" / "_arithmetic.py" in ENGINE
    assert ROOT / "callbacks" / "__init__.py" in CALLBACKS
    assert not set(ENGINE) & set(CALLBACKS)


def test_engine_imports_torch_and_numpy_only():
    for path in ENGINE:
        allowed = {"torch", "numpy"} | ({"torchmetrics"} if "continual" in path.parts else set())
        assert foreign(imports(path)) <= allowed | OPTIONAL, path
        assert foreign(imports(path, at_top_only=True)) <= allowed, path


def test_callbacks_import_nothing_of_the_recipes():
    for path in CALLBACKS:
        names = imports(path)
        assert not foreign(names) & {"recipes", *RECIPES_ONLY}, path
        assert "lightning_merge.cli" not in names, path


def test_what_is_for_transformers_imports_that_and_the_engine():
    assert TRANSFORMERS
    for path in TRANSFORMERS:
        names = imports(path)
        assert foreign(names) <= {"torch", "transformers"}, path
        assert not {layer(name) for name in names} & {"callbacks", "recipes"}, path


def test_command_imports_everything_else_when_it_is_needed():
    assert foreign(imports(ROOT / "lightning_merge" / "cli.py", at_top_only=True)) == set()


def test_only_weights_calls_the_private_foreach_functions():
    callers = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in ("lightning_merge", "callbacks", "recipes")
        for path in sources(folder)
        if "torch._foreach" in path.read_text(encoding="utf-8")
    }
    assert callers == {"lightning_merge/weights"}


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """Packages in memory of one fresh interpreter after the command, the engine, and all with torchmetrics."""
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in ENGINE)
    assert "lightning_merge.rules" in names
    plain = [name for name in names if not name.startswith("lightning_merge.continual")]
    stages = ("lightning_merge, lightning_merge.cli, lightning_merge.recipes", ", ".join(plain), ", ".join(names))
    show = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    script = "\n".join(["import sys", *(f"import {stage}\n{show}" for stage in stages)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_package_and_command_load_no_torch(loaded):
    assert "lightning_merge" in loaded[0]
    assert "torch" not in loaded[0]


def test_engine_loads_no_lightning(loaded):
    _, plain, everything = loaded
    assert "torch" in plain
    assert not plain & {"lightning", "pytorch_lightning", "lightning_fabric", *OPTIONAL, *RECIPES_ONLY}
    # torchmetrics imports matplotlib and torchvision by itself where they are installed.
    assert "torchmetrics" in everything
    assert not everything & {"lightning", "pytorch_lightning", "lightning_fabric", "omegaconf", "jsonargparse"}


# ---- tests

BESIDE = {
    "_averaging": "averaging",
    "_commands": "commands",
    "_report": "report",
    "compat": "callbacks",  # it is Lightning's callbacks by name
}
"""Where packages are tested that have no folder of their own name."""
MODULES = "engine"
"""Where modules that are in no package are tested."""
PACKAGES = {path.parent.name for path in sources("lightning_merge") if path.parent.parent.name == "lightning_merge"}
WITH_LIGHTNING = {"_commands", "compat", "files", "transformers"}
"""``files`` reads and writes what Lightning writes and reads."""
ENGINE_TESTS = [
    path
    for folder in (MODULES, *(BESIDE.get(package, package) for package in sorted(PACKAGES - WITH_LIGHTNING)))
    for path in sources(f"tests/{folder}")
]
HELPERS = {path.stem: path for path in sources("tests") if not path.name.startswith("test_")}


def test_tests_are_in_folders_of_the_packages_names():
    tested = {path.parent.name for path in sources("tests") if path.parent != ROOT / "tests"}
    assert tested - {MODULES, "callbacks", "recipes", "golden"} == {BESIDE.get(name, name) for name in PACKAGES} - {
        "callbacks"
    }


def test_tests_of_the_engine_are_collected_without_lightning():
    """One that compares with it imports it itself, by ``importorskip``."""
    assert len(ENGINE_TESTS) > 30
    waiting, seen = list(ENGINE_TESTS), set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        names = imports(path, at_top_only=True)
        assert not foreign(names) & {"lightning", "pytorch_lightning", "callbacks", "recipes"}, path
        assert not {f"lightning_merge.{name}" for name in WITH_LIGHTNING - {"files"}} & names, path
        waiting += [HELPERS[name] for name in names & HELPERS.keys() if HELPERS[name] not in seen]
