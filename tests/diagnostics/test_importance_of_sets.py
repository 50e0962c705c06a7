"""What the doctor says of statistics that sets of weights are to be weighed by."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NetParts
from torch import Tensor, nn

from lightning_merge.diagnostics import examine
from lightning_merge.importance import Statistics, _file


class Net(NetParts, nn.Module):
    pass


def model(factor: float) -> Net:
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(factor)
    return net


def ones(net: nn.Module, value: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full_like(p, value) for name, p in net.named_parameters()}


A, B, BASE = model(1.0), model(1.1), model(0.9)


def damaged(value: float) -> Callable[[Path], Any]:
    def write(folder: Path) -> Path:
        facts = {"samples": 1, "labels": "true", "left_out": {}, "norm": value * value, "aliases": {}, "names": []}
        _file.write(str(folder / "s.safetensors"), "fisher", ones(A, value), {}, facts)
        return folder / "s.safetensors"

    return write


class Other(nn.Module):
    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.net = nn.ParameterDict({name: torch.ones(shape)})


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "all zero": (damaged(0.0), "those of a: .* are all zero"),
    "NaN": (damaged(float("nan")), "those of a: .* hold a NaN or an infinity"),
    "negative": (damaged(-1.0), "cannot be mean squares"),
    "no file": (lambda folder: folder / "none.safetensors", "there is no file"),
    "of another model": (
        lambda _: Statistics.of(o := Other("x", 2), "fisher", ones(o)),
        "another model: it has no `net",
    ),
    "of other shapes": (
        lambda _: Statistics("fisher", {"net.0.weight": torch.ones(3)}),
        r"shape \(3,\) instead of \(8, 4\)",
    ),
    "of more": (lambda _: Statistics("fisher", {"more": torch.ones(3)}), "its `more` is not in the weights"),
    "of the other": (lambda _: Statistics.of(B, "fisher", ones(B)), "`net.0.weight` differs.* They are those of b."),
    "of the base": (lambda _: Statistics.of(BASE, "fisher", ones(B)), "They are those of the base."),
    "of nobody": (
        lambda _: Statistics.of(model(3.0), "gram", {"net.0.weight": torch.eye(4)}),
        "measures those of a file.$",
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_statistics_that_cannot_weigh_a_set_are_found_and_named(name: str, tmp_path: Path) -> None:
    make, text = CASES[name]
    sets = {"a": A.state_dict(), "b": B.state_dict()}
    found = examine(sets, BASE.state_dict(), statistics={"a": make(tmp_path), "b": Statistics.of(B, "fisher", ones(B))})
    assert [finding.problem for finding in found.findings] == ["statistics"]
    assert re.search(text, found.findings[0].text)


def test_good_statistics_are_no_reason_and_must_be_of_a_set() -> None:
    sets = {"a": A.state_dict(), "b": B.state_dict()}
    known = {"a": Statistics.of(A, "fisher", ones(A)), "b": Statistics("adam", ones(B))}
    assert examine(sets, statistics=known).verdict == "merge"
    with pytest.raises(ValueError, match="`statistics` must be of candidates"):
        examine(sets, statistics={"c": known["a"]})
