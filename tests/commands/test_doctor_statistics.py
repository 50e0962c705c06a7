"""``lightning-merge doctor --statistics``: each file's statistics are held against it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_merge.importance import Statistics

Run = Callable[..., tuple[int, str, str]]


def test_statistics_in_the_wrong_order_are_named(run: Run, tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.5)):
        net = nn.Linear(2, 2)
        nn.init.constant_(net.weight, value)
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
        ones = {each: torch.ones_like(p) for each, p in net.named_parameters()}
        Statistics.of(net, "fisher", ones).write(tmp_path / f"{name}.safetensors")
    code, out, _ = run("doctor", "a.pt", "b.pt", "--statistics", "b.safetensors", "a.safetensors")
    assert code == 0
    assert "verdict: do not merge as they are (statistics)" in out
    assert "They are those of b.pt." in out
    code, out, _ = run("doctor", "a.pt", "b.pt", "--statistics", "a.safetensors", "b.safetensors")
    assert "verdict: merge" in out
    code, _, err = run("doctor", "a.pt", "b.pt", "--statistics", "a.safetensors")
    assert code == 2
    assert "`--statistics` takes a file for each of 2 sets, got 1" in err
