"""The average as a teacher inside ``training_step``: its outputs, and a student that notices nothing."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, SWA, teacher
from lightning_merge.selections import Selection


class Student(tiny.Net):  # type: ignore[misc]
    """Distils from its average; with ``second`` from a second module that is kept by hand."""

    def __init__(self, second: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(*self.net[:2], nn.Dropout(0.5), self.net[2])
        self.kept = [deepcopy(self.net).eval()] if second else []  # in a list: no submodule
        self.targets: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        before = self(batch[0])  # a graph that exists while the teacher is in place
        if self.kept:
            with torch.no_grad():
                target = self.kept[0](batch[0])
        else:
            with teacher(self, "ema"):
                target = self(batch[0])
        self.targets.append(target)
        return (before - target).square().mean() + (self(batch[0]) - batch[1]).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        for average in self.kept:
            for mine, live in zip(average.parameters(), self.net.parameters(), strict=True):
                mine.data.lerp_(live.data, 0.5)


def run(module: Any, root: Path, callbacks: list[Any]) -> Any:
    torch.manual_seed(3)
    tiny.trainer(root, callbacks, max_epochs=2).fit(module, tiny.batches())
    return module


def test_student_and_targets_are_those_of_a_second_module_kept_by_hand(tmp_path: Path) -> None:
    """Bit for bit, dropout included: the exchange touches neither the graph nor the random numbers."""
    by_hand = run(Student(second=True), tmp_path, [])
    ema = EMA(decay=0.5)
    ours = run(Student(), tmp_path, [ema])
    assert len(ours.targets) == 8
    for mine, theirs in zip(ours.targets, by_hand.targets, strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    assert tiny.differing(ema.raw_weights(), {f"net.{n}": t for n, t in by_hand.net.state_dict().items()}) == []


def test_modes_and_weights_are_the_students_again_also_after_an_exception(tmp_path: Path) -> None:
    class Broken(tiny.Net):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.net[1].eval()  # a layer that the user froze
            modes, before = [part.training for part in self.modules()], tiny.values(self)
            try:
                with teacher(self, "ema"):
                    assert not any(part.training for part in self.modules())
                    assert not torch.is_grad_enabled()
                    raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            assert [part.training for part in self.modules()] == modes
            assert tiny.differing(tiny.values(self), before) == []
            return super().training_step(batch, batch_idx)

    run(Broken(norm=True), tmp_path, [EMA(decay=0.5)])


def test_the_average_and_its_buffers_stay_as_they_are(tmp_path: Path) -> None:
    class Trains(tiny.Net):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with teacher(self, "ema"):
                self.train()  # a mean teacher that normalises by its batch writes to the buffers in place
                self(batch[0])
            return super().training_step(batch, batch_idx)

    with_teacher, without = EMA(decay=0.5), EMA(decay=0.5)
    run(Trains(norm=True), tmp_path, [with_teacher])
    run(tiny.Net(norm=True), tmp_path, [without])
    assert tiny.differing(with_teacher.merged_weights(), without.merged_weights()) == []


def test_until_the_average_is_ready_the_raw_weights_serve(tmp_path: Path) -> None:
    outputs: list[bool] = []

    class Looks(tiny.Net):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with teacher(self, "ema"):
                target = self(batch[0])
            outputs.append(torch.equal(target, self(batch[0])))
            return super().training_step(batch, batch_idx)

    run(Looks(), tmp_path, [EMA(decay=0.5, start_step=4)])
    assert outputs == [True] * 5 + [False] * 3


def test_one_of_several_averages_is_chosen_by_name(tmp_path: Path) -> None:
    class Two(tiny.Net):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            for average in self.trainer.callbacks[:2]:
                with teacher(self, average.name):
                    if average.updates:
                        assert tiny.differing(tiny.values(self), average.merged_weights()) == []
            return super().training_step(batch, batch_idx)

    run(Two(), tmp_path, [EMA(decay=0.9, name="slow"), EMA(decay=0.1, name="fast")])


@pytest.mark.parametrize(
    ("callback", "name", "match"),
    [
        (EMA(), "slow", r"`name` must be that of an average.*got 'slow'; there are: ema"),
        (SWA(), "swa", r"measures BatchNorm statistics only when it is published.*buffers='copy'"),
        (EMA(selection=Selection(buffers="recompute")), "ema", "measures BatchNorm statistics only"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(callback: Any, name: str, match: str, tmp_path: Path) -> None:
    class Asks(tiny.Net):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with teacher(self, name):
                return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=match):
        run(Asks(norm=True), tmp_path, [callback])
