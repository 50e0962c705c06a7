"""The benchmark of one device: it runs in full on a CPU, what fails is a line, and time is kept."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import scripts
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _device._session import Session

    return Session(torch.device("cpu"), 30.0, tmp_path / "found.json")


def lines(session: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(session.output.read_text())["lines"]
    return found


def test_what_fails_is_a_line_and_the_parts_after_it_run(session: Any) -> None:
    def broken(session: Any) -> None:
        with session.guarded("first"):
            raise ValueError("no such\n thing")
        session.say("second", number=1 / 3)
        raise RuntimeError("the rest")

    session.run({"broken": (broken, 0.5), "whole": (lambda session: session.say("third"), 0.5)})
    found = [(line["part"], line["what"], line.get("failed")) for line in lines(session)]
    assert found == [
        ("broken", "first", "ValueError: no such thing"),
        ("broken", "second", None),
        ("broken", "the whole part", "RuntimeError: the rest"),
        ("broken", "time", None),
        ("whole", "third", None),
        ("whole", "time", None),
    ]
    assert lines(session)[1]["number"] == 0.333


def test_a_part_is_cut_off_when_its_time_is_over_and_what_it_found_is_kept(session: Any) -> None:
    def endless(session: Any) -> None:
        session.say("found", x=1)
        while True:
            with session.guarded("each"):
                time.sleep(0.01)

    start = time.perf_counter()
    session.run({"endless": (endless, 0.02), "next": (lambda session: session.say("found", x=2), 0.5)})
    assert time.perf_counter() - start < 5
    found = lines(session)
    assert [line.get("x") for line in found if line["what"] == "found"] == [1, 2]
    assert [line["cut_off"] for line in found if line["what"] == "time"] == [True, False]


def test_the_table_shows_every_row(session: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session.run({"part": (lambda session: session.say("what", table={"EMA": {"ms": 2.0}}), 0.5)})
    assert "EMA" in capsys.readouterr().err.splitlines()[-2]


@pytest.mark.slow
def test_it_runs_in_full_on_a_cpu(tmp_path: Path) -> None:
    for package in ("timm", "ema_pytorch"):
        pytest.importorskip(package)
    output = tmp_path / "device.json"
    options = ["--seconds", 200, "--device", "cpu", "--output", output]
    code, printed = scripts.start(BENCHMARKS / "device.py", *options, folder=tmp_path).finish(240)
    assert code == 0, printed
    found = json.loads(output.read_text())["lines"]
    assert [json.loads(line) for line in printed.splitlines() if line.startswith("{")] == found
    assert not [line for line in found if "failed" in line]
    times = {line["part"]: line["cut_off"] for line in found if line["what"] == "time"}
    parts = ("reads", "small", "updates", "combiners", "online", "large", "sharded", "memory", "compiled")
    assert times == dict.fromkeys(parts, False)
    measured = {name for line in found for name in line.get("table", ())}
    assert {"EMA", "timm", "torch swa_utils", "ema-pytorch", "TIES, stream", "OnTIES, density 0.5"} <= measured
