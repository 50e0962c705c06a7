"""A step that calls the `step` of its base class is one step, whatever else has made an optimizer of that class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from branch_table import CountsInGroup, Plain, SlowsByGroup, outcome
from tiny import Walk, differing, steps, trainer
from torch import nn

from lightning_merge._whole_steps import hook_whole_steps
from lightning_merge.callbacks import EMA, Anchor, Lookaround


class Inner(torch.optim.SGD): ...


class Outer(Inner):
    """Evaluates the closure itself, as optimizers of users do."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


class Stepping(Walk):
    def __init__(self, optimizer: type[torch.optim.SGD]) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=1.0)


@pytest.fixture(autouse=True)
def _others_have_made_one() -> None:
    for kind in (Inner, CountsInGroup):
        kind([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("make", [lambda: EMA(decay=0.5), lambda: Anchor(0.1)], ids=["EMA", "Anchor"])
def test_an_average_and_an_anchor_see_it_once(make: Any, tmp_path: Path) -> None:
    def run(optimizer: type[torch.optim.SGD]) -> Any:
        module = Stepping(optimizer)
        trainer(tmp_path, [make()], max_epochs=1).fit(module, steps(4))
        return module

    assert not differing(run(Outer), run(torch.optim.SGD))


class CountsByItsBase(CountsInGroup):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group["k"] = 0

    def begin(self, group: dict[str, Any]) -> None:
        group["k"] += 1

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class CountsInDict(CountsInGroup):
    """In a container in the group, which it writes to."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group |= {"counts": {"k": 0}, "trail": []}

    def begin(self, group: dict[str, Any]) -> None:
        group["counts"]["k"] += 1
        group["trail"].append(group["counts"]["k"])

    def count(self, group: dict[str, Any], parameter: torch.Tensor) -> int:
        assert len(group["trail"]) == group["counts"]["k"]
        return int(group["counts"]["k"])


@pytest.mark.parametrize("kind", [CountsByItsBase, CountsInDict])
def test_what_it_counts_belongs_to_the_branch(kind: Any, tmp_path: Path) -> None:
    class Other(Plain):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters())

    assert not differing(
        outcome(Other(), Lookaround(2, 2), tmp_path), outcome(SlowsByGroup(), Lookaround(2, 2), tmp_path)
    )


def test_a_step_that_raised_hides_none_of_those_that_follow() -> None:
    class Failing(Inner):
        fails = False

        def step(self, closure: Any = None) -> Any:
            super().step()
            if self.fails:
                raise RuntimeError("out of memory")

    seen: list[str] = []
    optimizer = Failing([nn.Parameter(torch.zeros(1))])
    handles = hook_whole_steps(optimizer, lambda *_: seen.append("before"), lambda *_: seen.append("after"))
    optimizer.step()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert seen == ["before", "after", "before", "before", "after"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 5
