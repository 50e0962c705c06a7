"""The bench of evidence: protocols are run seed by seed into files, from where these stand."""

import importlib
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import scripts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DEFINITION = f"""
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
from _evidence._protocol import Protocol
from evidence import main

@dataclass
class Killed(Protocol):
    claim, beside = "", "plain"

    def prepare(self, place):
        pass

    def run(self, seed, chosen):
        if seed == 2 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {{"view": {{"plain": float(seed), "better": seed + 1.0}}}}

sys.exit(main({{"killed": lambda size: Killed()}}, sys.argv[1:]))
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks/evidence.py``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("evidence")


@pytest.fixture
def make(bench: Any) -> Callable[..., Any]:
    """A protocol of random numbers, which knows what was asked of it."""
    from _evidence._protocol import Place, Protocol
    from _shared import alarm

    @dataclass
    class Noise(Protocol):
        claim = "better is better"
        beside = "plain"

        gain: float = 3.0
        endless: bool = False

        def __post_init__(self) -> None:
            self.asked: list[Any] = []

        def prepare(self, place: Place) -> None:
            self.asked.append("prepare")

        def choose(self) -> dict[str, Any]:
            self.asked.append("choose")
            return {"rate": 0.5}

        def run(self, seed: int, chosen: Mapping[str, Any]) -> Any:
            assert chosen == {"rate": 0.5}
            self.asked.append(seed)
            if self.endless:
                with alarm(0.1):
                    time.sleep(30)
            level = random.Random(seed).gauss(50, 1)
            return {"10 steps": {"plain": level, "better": level + self.gain + 0.1 * seed}}

    return Noise


def results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_seeds_that_are_there_are_not_run_again(bench: Any, make: Any, tmp_path: Path) -> None:
    output = tmp_path / "noise.json"
    for seeds, asked in ((2, ["prepare", "choose", 0, 1]), (3, ["prepare", 2]), (3, [])):
        noise = make()
        assert (
            bench.main({"noise": lambda size, noise=noise: noise}, ["--seeds", str(seeds), "--output", str(output)])
            == 0
        )
        assert noise.asked == asked
    found = results(output)
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert {"torch", "lightning", "timm", "python"} == set(found["versions"])
    assert found["device"] == "cpu, 1 thread"
    assert found["setting"] == {"gain": 3.0, "endless": False}
    assert all(run["revision"] and run["seconds"] >= 0 for run in found["runs"])


def test_differences_are_paired_and_have_intervals(bench: Any, make: Any, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "noise.json"
    argv = ["--seeds", "3", "--output", str(output), "--figure", str(tmp_path)]
    bench.main({"noise": lambda size: make()}, argv)
    better = results(output)["summary"]["10 steps"]["better"]
    # 3.0, 3.1 and 3.2, whose standard deviation is 0.1: t(0.975, 2) = 4.30265, over the root of 3
    assert better["difference"] == {"mean": pytest.approx(3.1), "half_width": pytest.approx(0.24841), "n": 3}
    assert better["score"]["half_width"] > 2 * better["difference"]["half_width"]
    printed = capsys.readouterr().out
    assert "+3.10 ± 0.25" in printed
    assert "10 steps" in printed
    assert "<svg" in (tmp_path / "noise.svg").read_text()


@pytest.mark.parametrize("change", ["gain", "size", "device"])
def test_results_of_another_setting_are_left_alone(bench: Any, make: Any, change: str, tmp_path: Path) -> None:
    output = tmp_path / "noise.json"
    argv = ["--seeds", "1", "--output", str(output)]
    bench.main({"noise": lambda size: make()}, argv)
    before = results(output)
    if change == "device":
        output.write_text(json.dumps(before := {**before, "device": "another"}))
    noise = make(gain=4.0 if change == "gain" else 3.0)
    code = bench.main({"noise": lambda size: noise}, [*argv, *(["--size", "full"] if change == "size" else [])])
    assert code == 1
    assert noise.asked == []
    assert results(output) == before


def test_a_search_without_runs_is_done_again_for_another_setting(bench: Any, make: Any, tmp_path: Path) -> None:
    output = tmp_path / "noise.json"
    bench.main({"noise": lambda size: make()}, ["--seeds", "0", "--output", str(output)])
    assert not output.exists()
    bench.main({"noise": lambda size: make(endless=True)}, ["--output", str(output)])
    assert results(output)["runs"] == []
    second = make(gain=4.0)
    assert bench.main({"noise": lambda size: second}, ["--seeds", "1", "--output", str(output)]) == 0
    assert second.asked == ["prepare", "choose", 0]


def test_time_ends_a_protocol_between_two_seeds(bench: Any, make: Any, tmp_path: Path) -> None:
    from _evidence._protocol import Place

    noise = make()
    left = lambda: -1.0 if 1 in noise.asked else 9.0  # noqa: E731
    assert not bench.fill("noise", noise, Place(), tmp_path / "noise.json", 9, left)
    assert noise.asked == ["prepare", "choose", 0, 1], "a third seed would have ended too late"


def test_a_seed_that_is_cut_off_is_not_counted(bench: Any, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    first, second = make(endless=True), make()
    start = time.perf_counter()
    assert bench.main({"long": lambda size: first, "next": lambda size: second}, ["--seeds", "1"]) == 0
    assert time.perf_counter() - start < 20
    assert (first.asked, second.asked) == (["prepare", "choose", 0], ["prepare", "choose", 0])
    assert results(tmp_path / "evidence-long.json")["runs"] == []


def test_no_protocol_is_begun_when_the_time_is_over(bench: Any, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    noise = make(endless=True)
    start = time.perf_counter()
    assert bench.main({"noise": lambda size: noise, "next": lambda size: noise}, ["--seconds", "0"]) == 0
    assert time.perf_counter() - start < 20
    assert 1 not in noise.asked


def test_a_protocol_whose_data_are_missing_is_left_out_and_the_others_run(
    bench: Any, make: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    noise = make()

    def no_data(size: str) -> Any:
        found = make()

        def prepare(place: Any) -> None:
            raise FileNotFoundError("no CIFAR-10 in here")

        found.prepare = prepare
        return found

    assert bench.main({"none": no_data, "noise": lambda size: noise}, ["--seeds", "1"]) == 1
    assert "none is left out: no CIFAR-10 in here" in capsys.readouterr().err
    assert noise.asked[-1] == 0


@pytest.mark.parametrize("gain", [3.0, 30.0])
def test_a_fresh_seed_is_held_against_the_committed_ones(bench: Any, make: Any, gain: float, tmp_path: Path) -> None:
    output = tmp_path / "noise.json"
    bench.main({"noise": lambda size: make()}, ["--seeds", "5", "--output", str(output)])
    before, noise = results(output), make(gain=gain)
    code = bench.main({"noise": lambda size: noise}, ["--check", "--output", str(output)])
    assert code == (gain != 3.0)
    assert noise.asked == ["prepare", 5]
    assert results(output) == before


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    script, output = tmp_path / "bench.py", tmp_path / "killed.json"
    script.write_text(DEFINITION)
    arguments = ["--seeds", "4", "--output", str(output)]
    code, printed = scripts.start(script, *arguments, folder=tmp_path).finish()
    assert code < 0, printed
    assert [run["seed"] for run in results(output)["runs"]] == [0, 1]
    code, printed = scripts.start(script, *arguments, folder=tmp_path).finish()
    assert code == 0, printed
    assert [run["seed"] for run in results(output)["runs"]] == [0, 1, 2, 3]


def test_the_protocols_say_what_they_compare(bench: Any) -> None:
    pytest.importorskip("timm")
    known = bench.protocols()
    assert known
    for name, protocol in known.items():
        for size in ("small", "full"):
            made = protocol(size)
            assert made.claim, name
            assert json.loads(json.dumps(made.setting())), name
        assert known[name]("small").setting() != known[name]("full").setting()
