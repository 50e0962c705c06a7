"""What is built and installed: two folders that are packages of another name, and the links that lead to them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = {"callbacks": "../callbacks", "recipes": "../recipes"}
BUILD = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a fresh interpreter; what it printed is part of the message if it fails where it must not."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False)


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources(folder: Path) -> set[str]:
    """What must be installed, as paths inside site-packages."""
    expected = {"lightning_merge/py.typed"}
    for path in (folder / "lightning_merge").rglob("*.py"):
        if not (set(LINKS) & set(path.parts[-2:-1])):
            expected.add(path.relative_to(folder).as_posix())
    for name in LINKS:
        for path in (folder / name).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                expected.add(f"lightning_merge/{path.relative_to(folder).as_posix()}")
    return expected


@pytest.fixture(scope="module", params=["links", "no links"])
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources; with ``core.symlinks=false`` git leaves a file that holds the target of each link."""
    pytest.importorskip("pip", reason="the tests of the package install it with pip")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("lightning_merge", *LINKS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name, target in LINKS.items():
        link = copy / "lightning_merge" / name
        link.unlink()
        if request.param == "links":
            link.symlink_to(target)
        else:
            link.write_text(target)
    return copy


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    succeed(python("-m", "pip", "install", *BUILD, "--target", str(target), str(checkout), cwd=target))
    return target


def test_links_are_tracked_and_relative():
    if not (ROOT / "lightning_merge" / "callbacks").is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert {name: os.readlink(ROOT / "lightning_merge" / name) for name in LINKS} == LINKS


@pytest.mark.slow
def test_wheel_holds_every_module_recipe_and_the_typing_marker_once(checkout, tmp_path):
    succeed(python("-m", "pip", "wheel", *BUILD, "--wheel-dir", str(tmp_path), str(checkout), cwd=tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == sources(checkout)


FOUND = """
import importlib.util, lightning_merge
print(lightning_merge.__file__)
print(importlib.util.find_spec("lightning_merge.callbacks").origin)
"""
"""Where the callbacks would be imported from; to import them takes seconds, since Lightning is imported too."""


@pytest.mark.slow
def test_installed_package_is_found_where_it_was_installed(installed, tmp_path):
    printed = succeed(python("-P", "-c", FOUND, cwd=tmp_path, PYTHONPATH=str(installed)))
    package = installed / "lightning_merge"
    assert printed.splitlines() == [str(package / "__init__.py"), str(package / "callbacks" / "__init__.py")]


@pytest.mark.slow
def test_installed_command_lists_the_recipes(installed, tmp_path):
    script = "from lightning_merge.cli import main; raise SystemExit(main(['recipes']))"
    printed = succeed(python("-P", "-c", script, cwd=tmp_path, PYTHONPATH=str(installed)))
    files = [path for path in ROOT.glob("recipes/*/*.yaml") if path.stem != "_base"]
    recipes = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in files}
    assert recipes
    assert recipes <= set(re.findall(r"[\w-]+/[\w-]+", printed))


IMPORTED = """
import lightning_merge.callbacks
print(lightning_merge.__file__)
print(lightning_merge.callbacks.__file__)
"""


@pytest.mark.slow
def test_editable_install_is_imported_from_the_checkout(checkout, tmp_path):
    links = (checkout / "lightning_merge" / "callbacks").is_symlink()  # the other way is imported in full
    succeed(python("-m", "pip", "install", *BUILD, "--target", str(tmp_path), "-e", str(checkout), cwd=tmp_path))
    # Without the site module, since it would find the editable install of this environment first.
    script = f"""
import site, sys
site.addsitedir({str(tmp_path)!r})
sys.path.append({sysconfig.get_path("purelib")!r})
{FOUND if links else IMPORTED}
"""
    package, callbacks = succeed(python("-P", "-S", "-c", script, cwd=tmp_path)).splitlines()
    assert package == str(checkout / "lightning_merge" / "__init__.py")
    assert Path(callbacks).resolve() == checkout.resolve() / "callbacks" / "__init__.py"


@pytest.mark.parametrize("name", LINKS)
def test_import_under_the_name_of_the_folder_names_the_right_import(name):
    done = python("-c", f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert re.search(rf"ImportError: .*lightning_merge\.{name}", done.stderr)


@pytest.mark.parametrize("name", LINKS)
def test_type_error_behind_a_link_is_found(name, tmp_path):
    pytest.importorskip("mypy", reason="mypy is in the `dev` extra")
    # With the settings and links of the project, and packages that import nothing: it checks them in a second.
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("lightning_merge", *LINKS):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    for link, target in LINKS.items():
        (tmp_path / "lightning_merge" / link).symlink_to(target)
    (tmp_path / name / "_planted.py").write_text('count: int = "three"\n')
    done = python("-m", "mypy", "--cache-dir", os.devnull, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(rf"lightning_merge/{name}/_planted\.py:1: error: Incompatible types", done.stdout)
