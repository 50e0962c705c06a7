"""The manners of the command line: options in full, what was likely meant, one line at the end."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_merge._commands import _needs, fit
from lightning_merge._commands._mistakes import worker_was_told_to_end
from lightning_merge.diagnostics import examine
from lightning_merge.search import Grid, search

Run = Callable[..., Any]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 1}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


# What is typed after the command and its file, the option that is named, and the one that was likely meant.
ABBREVIATED = {
    "export": (["out.pt", "--forc"], "--forc", "--force"),
    "average": (["--out", "m.pt", "--patt", "a.ckpt"], "--patt", "--pattern"),
    "soup": (["--out", "m.pt", "--weigh", "raw"], "--weigh", "--weights"),
    "doctor": (["--poin", "2"], "--poin", "--points"),
    "unlearn": (["--task", "a", "--kee", "0.5"], "--kee", "--keep"),
}


@pytest.mark.parametrize("command", ABBREVIATED)
def test_options_are_taken_in_full_only(command: str, run: Run, file: Path) -> None:
    typed, option, meant = ABBREVIATED[command]
    code, _, err = run(command, file.parent if command == "average" else file, *typed)
    assert code == 2
    assert f"unrecognized arguments: {option}" in err
    assert f"Did you mean {meant}?" in err
    assert not Path("m.pt").exists()


def test_help_calls_the_command_by_its_name_however_it_was_started(run: Run) -> None:
    assert run("test", "--help")[1].startswith("usage: lightning-merge ")  # here `sys.argv[0]` is another


@pytest.mark.parametrize(("typed", "meant"), [("recipe", "recipes"), ("SOUP", "soup"), ("--versio", "--version")])
def test_a_command_that_is_none_gets_the_one_that_was_likely_meant(typed: str, meant: str, run: Run) -> None:
    code, _, err = run(typed)
    assert code == 2
    assert f"Did you mean {meant}?" in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--trainer.max_epoch", "3"], ["unrecognized arguments: --trainer.max_epoch", "`--trainer.max_epochs`?"]),
        (["--trainer.callbacks.start_epohc", "3"], ["'start_epohc' is not accepted. Did you mean `start_epoch`?"]),
    ],
    ids=lambda value: value[0],
)
def test_mistyped_options_of_a_run_are_named_with_what_was_meant(
    arguments: list[str], parts: list[str], run: Run
) -> None:
    code, _, err = run("run", "digits/swa", *arguments, "--print_config")
    assert code == 2
    assert all(part in err for part in parts), err
    assert not err.strip().splitlines()[-2].endswith(":")


def test_what_is_required_is_named_as_it_is_typed(run: Run) -> None:
    code, _, err = run("fit")
    assert code == 2
    assert "required: `--model`" in err


def test_what_is_missing_is_said_with_what_to_type(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lightning-merge recipes digits/swa > mine.yaml" in run("fit")[2]
    assert "Type: lightning-merge run digits/swa" in run("run")[2]
    real = _needs.find_spec
    monkeypatch.setattr(_needs, "find_spec", lambda name: None if name == "transformers" else real(name))
    code, _, err = run("run", "preference/dpo")
    assert code == 2
    assert err.splitlines()[-1] == 'pip install "lightning-merge[preference]"'


@pytest.mark.parametrize(
    ("missing", "first"), [("sft", "preference/sft --data.pairs FILE"), ("base", "preference/base --data.text FILE")]
)
def test_a_recipe_that_starts_from_another_names_the_command(
    missing: str, first: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: dict[str, Any] = {"__name__": "lightning_merge.recipes"}  # where the error is raised that is a user's
    text = f"there is no file runs/preference/{missing}/version_0/checkpoints/last.ckpt."
    exec(f"def main(arguments): raise ValueError({text!r})", ours)
    monkeypatch.setattr(fit, "main", ours["main"])
    code, _, err = run("run", "preference/dpo", "--data.pairs", "pairs.jsonl")
    assert code == 2
    assert err.strip().endswith(f"Type this first: lightning-merge run {first}")


def test_the_package_is_run_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_merge", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("lightning-merge ")


@pytest.mark.parametrize("command", ["diff", "doctor"])
def test_a_set_that_is_missing_is_named_also_where_one_file_is_given(command: str, run: Run, file: Path) -> None:
    code, _, err = run(command, f"{file}:swaa", *([file] if command == "doctor" else []))
    assert code == 2
    assert "no set called 'swaa'" in err


def test_the_end_of_a_worker_by_sigterm_is_no_error_of_its_own() -> None:
    def fails(exitcode: int, text: str) -> Exception:
        class Loader:
            _workers = [SimpleNamespace(exitcode=exitcode)]  # noqa: RUF012

            def next(self) -> None:
                raise RuntimeError(text)

        try:
            Loader().next()
        except RuntimeError as error:
            return error
        raise AssertionError

    text = "DataLoader worker (pid(s) 3) exited unexpectedly"
    assert worker_was_told_to_end(fails(-SIGTERM, text))
    assert not worker_was_told_to_end(fails(-9, text))
    assert not worker_was_told_to_end(fails(-SIGTERM, "another error"))


def test_an_examination_says_which_is_better() -> None:
    sets = {"raw": {"w": torch.tensor([1.0, 1.0])}, "ema": {"w": torch.tensor([2.0, 2.0])}}
    for sign, word in ((1, "worse"), (-1, "better")):
        found = examine(sets, loss=lambda weights, sign=sign: sign * float(weights["w"].sum()))
        assert found.report().startswith(f"verdict: merge; ema is {word} than raw by 2\n")
        assert found.summary() == f"ema is {word} than raw by 2 in loss; the weights lie in one basin."
    same = examine({"raw": sets["raw"], "ema": sets["raw"]}, loss=lambda weights: 1.0)
    assert same.report().startswith("verdict: nothing to merge (identical)\n")
    assert same.summary().startswith("nothing to merge (identical): raw and ema are the same weights")
    assert examine({"a": sets["raw"]}).summary() == "nothing speaks against merging."


def test_a_summary_says_that_statistics_were_measured_again() -> None:
    sets = {"raw": {"w": torch.tensor([1.0, 1.0])}, "ema": {"w": torch.tensor([2.0, 2.0])}}
    found = examine(sets, loss=lambda weights: float(weights["w"].sum()), measure_statistics=lambda weights: weights)
    assert "ema is worse than raw by 2 in loss (BatchNorm statistics of both measured again)" in found.summary()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"score": ', b'"score": "x", "was": '),
        (b'"score": ', b'"score": true, "was": '),
        (b'"score"', b'"sc\xffre"'),
        (b'"coefficients": [', b'"coefficients": ["a", '),
    ],
    ids=["text", "flag", "no text", "text among coefficients"],
)
def test_a_log_with_something_else_in_it_is_refused_by_line(old: bytes, new: bytes, tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"

    def go() -> float:
        return search(lambda shares: sum((c - 0.3) ** 2 for c in shares), 2, Grid(), budget=30, log=log).score

    best = go()
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], lines[1].replace(old, new), *lines[2:]]))
    with pytest.raises(ValueError, match=r"search\.jsonl, line 2, holds what no search wrote"):
        go()
    log.write_bytes(b"".join([lines[0], lines[1].replace(b'"score": ', b'"score": NaN, "was": '), *lines[2:]]))
    assert go() <= best + 1
