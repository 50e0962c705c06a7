"""What steps write into, on the module and in the optimizer: a branch on the same batches trains as one alone does."""

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_table import DATA, Plain, batches, differences
from tiny import trainer
from torch import Tensor, nn

from lightning_merge.branches import Average
from lightning_merge.callbacks import Branching, Lookaround
from lightning_merge.schedules import EveryNSteps


def fit(module: Any, callback: Any, root: Path, **settings: Any) -> Any:
    run = trainer(root, [] if callback is None else [callback], max_epochs=2, **settings)
    run.fit(module, batches(DATA[:6]), batches(DATA[8:]))
    return module


class Remembers(Plain):
    """Adds what it has kept of earlier batches to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def prepare(self) -> None: ...

    def recall(self) -> Any: ...

    def keep(self, value: Tensor) -> None: ...

    def see(self, batch: Tensor) -> None: ...

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        before = self.recall()
        self.keep((self.first(batch) + before).mean(0).detach().clone())
        return (self.first(batch + before) - 1).square().sum()


class InATensor(Remembers):
    def prepare(self) -> None:
        self.hidden = torch.zeros(3)

    def recall(self) -> Tensor:
        return self.hidden.clone()

    def keep(self, value: Tensor) -> None:
        self.hidden.copy_(value)


class ByData(InATensor):
    """Where torch counts no write."""

    def keep(self, value: Tensor) -> None:
        self.hidden.data.copy_(value)


class OnALayer(InATensor):
    def prepare(self) -> None:
        self.first.hidden = torch.zeros(3)

    def recall(self) -> Tensor:
        return self.first.hidden.clone()  # type: ignore[union-attr, operator]

    def keep(self, value: Tensor) -> None:
        self.first.hidden.mul_(0).add_(value)  # type: ignore[union-attr, operator]


class LazilyInATensor(InATensor):
    """That is there from the first step on, so each branch makes its own."""

    def prepare(self) -> None: ...

    def recall(self) -> Tensor:
        self.hidden = getattr(self, "hidden", torch.zeros(3))
        return self.hidden.clone()


class InABuffer(InATensor):
    def prepare(self) -> None:
        self.register_buffer("hidden", torch.zeros(3), persistent=False)


class AssignsABuffer(InABuffer):
    def keep(self, value: Tensor) -> None:
        self.hidden = value


class InAListOfTensors(InATensor):
    def prepare(self) -> None:
        self.states = [torch.zeros(3), torch.zeros(3)]
        self.hidden = self.states[1]


class InAList(Remembers):
    def prepare(self) -> None:
        self.states: list[Any] = [None]

    def recall(self) -> Any:
        return 0.0 if self.states[0] is None else self.states[0]

    def keep(self, value: Tensor) -> None:
        self.states[0] = value


class InADict(Remembers):
    def prepare(self) -> None:
        self.states = {"h": {"first": torch.zeros(3)}}

    def recall(self) -> Tensor:
        return self.states["h"]["first"]

    def keep(self, value: Tensor) -> None:
        self.states["h"]["first"] = value


class InADeque(Remembers):
    def prepare(self) -> None:
        self.memory: deque[Tensor] = deque(maxlen=4)

    def recall(self) -> Any:
        return sum(self.memory) / 4

    def keep(self, value: Tensor) -> None:
        self.memory.append(value)


class State:
    def __init__(self) -> None:
        self.steps = 0


class InAnObject(Remembers):
    """Which gets its attribute with the first step."""

    def prepare(self) -> None:
        self.state = State()

    def recall(self) -> Any:
        return getattr(self.state, "hidden", 0.0)

    def keep(self, value: Tensor) -> None:
        self.state.hidden = value  # type: ignore[attr-defined]
        self.state.steps += 1


class IsReset(InATensor):
    """For all branches, between two epochs."""

    def on_train_epoch_start(self) -> None:
        self.hidden.zero_()


class IsReplaced(InATensor):
    def on_train_epoch_start(self) -> None:
        self.hidden = torch.full((3,), 0.5)


class IsEmptied(InADeque):
    def on_train_epoch_end(self) -> None:
        self.memory.clear()


class InAHiddenModule(InATensor):
    """In a list, where the module does not see it."""

    def prepare(self) -> None:
        self.teachers = [nn.Linear(3, 3)]
        nn.init.zeros_(self.teachers[0].bias)

    @property
    def hidden(self) -> Tensor:  # type: ignore[override]
        return self.teachers[0].bias.data

    def keep(self, value: Tensor) -> None:
        with torch.no_grad():
            self.teachers[0].bias.copy_(value)


class Memory:
    """A ring of rows, and how many there were."""

    def __init__(self) -> None:
        self.rows: list[Any] = [None] * 3
        self.at = 0

    def append(self, row: Tensor) -> None:
        self.rows[self.at % 3] = row
        self.at += 1


class InARing(Remembers):
    def prepare(self) -> None:
        self.memory = Memory()

    def recall(self) -> Any:
        return sum((row for row in self.memory.rows if row is not None), torch.zeros(3)) / 4

    def keep(self, value: Tensor) -> None:
        self.memory.append(value)


class InARingOfItsOwn(InARing):
    """Whose position is a number of the module."""

    def prepare(self) -> None:
        self.rows, self.at = torch.zeros(3, 3), 0

    def recall(self) -> Tensor:
        return self.rows.mean(0)

    def keep(self, value: Tensor) -> None:
        self.rows[self.at % 3] = value
        self.at += 1


class InATeacher(InATensor):
    """A frozen layer that follows the one that trains."""

    def prepare(self) -> None:
        self.teacher = nn.Linear(3, 3)
        self.teacher.load_state_dict(self.first.state_dict())
        self.teacher.requires_grad_(False)

    def recall(self) -> Tensor:
        return self.teacher.bias.detach().clone()

    @torch.no_grad()
    def keep(self, value: Tensor) -> None:
        for own, trained in zip(self.teacher.parameters(), self.first.parameters(), strict=True):
            own.lerp_(trained, 0.3)


class WithAnOptimizerOfItsOwn(InATensor):
    """That Lightning does not know."""

    def prepare(self) -> None:
        self.target = nn.Parameter(torch.zeros(3))
        self.hidden_optimizer = torch.optim.Adam([self.target], 0.1)

    def recall(self) -> Tensor:
        return self.target.detach().clone()

    def keep(self, value: Tensor) -> None:
        self.hidden_optimizer.zero_grad()
        (self.target - value).square().sum().backward()
        self.hidden_optimizer.step()

    def configure_optimizers(self) -> Any:
        trained = [*self.first.parameters(), *self.last.parameters()]
        return torch.optim.SGD(trained, 0.01, momentum=0.9)


KINDS = [
    InARing,
    InARingOfItsOwn,
    InATeacher,
    WithAnOptimizerOfItsOwn,
    InATensor,
    LazilyInATensor,
    ByData,
    OnALayer,
    InABuffer,
    AssignsABuffer,
    InAListOfTensors,
    InAList,
    InADict,
    InADeque,
    InAnObject,
    IsReset,
    IsReplaced,
    IsEmptied,
    InAHiddenModule,
]


@pytest.mark.parametrize("feeding", ["same", "turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_writes_is_the_branch_s_own(kind: type[Remembers], feeding: Any, tmp_path: Path) -> None:
    if feeding == "same":
        plain, branched = fit(kind(), None, tmp_path), fit(kind(), Lookaround(3, 2), tmp_path)
    else:  # every batch twice, once for each branch
        data = DATA[:6].repeat_interleave(2, 0)
        plain, branched = kind(), kind()
        trainer(tmp_path, max_epochs=2).fit(plain, batches(DATA[:6]))
        trainer(tmp_path, [Lookaround(2, 2, batches="turns")], max_epochs=2).fit(branched, batches(data))
    assert not differences(dict(branched.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("kind", [InATensor, AssignsABuffer, InADeque, InARing])
def test_a_branch_that_diverged_begins_its_state_anew(kind: type[Remembers], tmp_path: Path) -> None:
    class Spoilt(kind):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            branch = self.trainer.callbacks[0]._running.branches.active
            spoils = batch_idx == 1 and self.current_epoch == 0 and branch == 1
            return super().training_step(batch * float("nan") if spoils else batch, batch_idx)

    callback = Lookaround(2, 2)
    with pytest.warns(UserWarning, match=r"branches \[1\] hold a NaN"):
        fit(Spoilt(), callback, tmp_path)
    assert callback.revived == 1


def test_weights_that_are_frozen_and_written_to_are_merged_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Seen(InATeacher):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.seen_last.append(self.teacher.bias.clone())
            return loss

        def prepare(self) -> None:
            super().prepare()
            self.seen_last: list[Tensor] = []

    with caplog.at_level("INFO"):
        module = fit(Seen(), Lookaround(2, 100, [lambda batch: batch, lambda batch: 2 - batch]), tmp_path)
    first, second = module.seen_last[-2:]
    assert not torch.allclose(first, second)
    torch.testing.assert_close(module.teacher.bias, (first + second) / 2)
    assert "steps write to 2 frozen parameters, `teacher.weight` first, and each branch has its own" in caplog.text


def test_frozen_weights_that_hooks_write_to_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class ByHook(InATeacher):
        def keep(self, value: Tensor) -> None: ...

        def on_train_batch_end(self, *args: Any) -> None:
            super().keep(torch.zeros(3))

    with caplog.at_level("INFO"):
        fit(ByHook(), Lookaround(2, 2), tmp_path)
    assert "hooks between the turns write to 2 frozen parameters" in caplog.text


class Records(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[float] = []
        self.by_batch: dict[int, int] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rows.append(float(batch.mean()))
        self.by_batch[batch_idx] = self.by_batch.get(batch_idx, 0) + 1
        return self.loss(batch)


def test_what_steps_make_longer_is_a_record_of_all_branches_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        module = fit(Records(), Lookaround(3, 2), tmp_path)
    assert len(module.rows) == 36
    assert list(module.by_batch.values()) == [6] * 6
    assert caplog.text.count("`rows` of the module grows with each step, and all branches share it") == 1
    assert caplog.text.count("`by_batch` of the module grows") == 1


class RecordsInHooks(Records):
    def on_train_batch_end(self, *args: Any) -> None:
        self.kept.append(self.last.weight.detach().clone())

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []


def test_records_are_not_looked_through(tmp_path: Path) -> None:
    callback = Lookaround(2, 2)
    looked = []

    class Looks(RecordsInHooks):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            looked.append(len(callback._running.attributes._written._found))

    module = fit(Looks(), callback, tmp_path)
    assert len(module.kept) == 12
    assert len(set(looked[3:])) == 1


# ---- what optimizers keep outside of their `state`


class Slow(torch.optim.SGD):
    """Goes half of the way to slow weights, which it moves; they are in a dict of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.02)
        self.slow = self.make()

    def make(self) -> Any:
        return {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def of(self, parameter: Tensor) -> Tensor:
        return self.slow[parameter]  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.of(parameter).lerp_(parameter, 0.3)
                parameter.lerp_(self.of(parameter), 0.5)
        return loss


class SlowInItsState(Slow):
    def make(self) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = parameter.detach().clone()

    def of(self, parameter: Tensor) -> Tensor:
        return self.state[parameter]["slow"]  # type: ignore[no-any-return]


class SlowAtItsFirstStep(Slow):
    def make(self) -> Any:
        return None

    def of(self, parameter: Tensor) -> Tensor:
        if self.slow is None:
            self.slow = {}
        return self.slow.setdefault(parameter, parameter.detach().clone())  # type: ignore[no-any-return]


class SlowFromTheState(SlowInItsState):
    def make(self) -> Any: ...

    def of(self, parameter: Tensor) -> Tensor:
        return self.state[parameter].setdefault("slow", parameter.detach().clone())  # type: ignore[no-any-return]


class SlowInAList(Slow):
    def make(self) -> Any:
        self.order = [p for group in self.param_groups for p in group["params"]]
        return [p.detach().clone() for p in self.order]

    def of(self, parameter: Tensor) -> Tensor:
        return next(slow for slow, p in zip(self.slow, self.order, strict=True) if p is parameter)


class SlowByData(Slow):
    @torch.no_grad()
    def of(self, parameter: Tensor) -> Tensor:
        return super().of(parameter).data


class TwoInAList(torch.optim.Optimizer):
    """Steps an optimizer per group, which it has in a list."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})
        self.inner = [torch.optim.SGD([p], 0.01, momentum=0.9) for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for each in self.inner:
            each.step()
        return loss


class Momentum(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.01, momentum=0.9)


def ended(kind: type[torch.optim.Optimizer], root: Path, callback: Any) -> dict[str, Tensor]:
    class Module(Plain):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters())

    module = fit(Module(), callback, root)
    return dict(module.state_dict()) | (callback.raw_weights() if callback is not None else {})


@pytest.mark.parametrize(
    ("kind", "same_as"),
    [
        (Slow, SlowInItsState),
        (SlowInAList, SlowInItsState),
        (SlowByData, SlowInItsState),
        (SlowAtItsFirstStep, SlowFromTheState),
        (TwoInAList, Momentum),
    ],
)
def test_tensors_that_an_optimizer_keeps_elsewhere_are_the_branch_s_own(
    kind: Any, same_as: Any, tmp_path: Path
) -> None:
    views = [lambda batch: batch, lambda batch: 2 - batch]
    for make in (lambda: Lookaround(2, 2, views, buffers="average"), lambda: None):
        assert not differences(ended(kind, tmp_path, make()), ended(same_as, tmp_path, make()))


def test_such_tensors_have_no_mean(tmp_path: Path) -> None:
    callback = Branching(Average(), EveryNSteps(100), 2, optimizer_state="average")
    with pytest.raises(ValueError, match="Slow keeps tensors in `slow`, of which no mean is known"):
        ended(Slow, tmp_path, callback)
