"""What a module changes after the step of a turn is for the next group, in every branch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_table import DATA, ByHand, Late, Plain, batches, branching, differences, outcome
from tiny import trainer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_merge.branches import Average
from lightning_merge.callbacks import Branching
from lightning_merge.schedules import EveryNSteps


class Changes(Plain):
    """Its first layer trains from the fifth batch on, which ``optimizer_step`` sees to after the fourth step."""

    phase, done = 0, 0

    def __init__(self) -> None:
        super().__init__()
        self.change(False)

    def change(self, trains: bool) -> None:
        self.first.requires_grad_(trains)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.done += 1
        if self.global_step == 3:  # Lightning counts afterwards
            self.change(True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.see(batch)
        hidden = self.first(batch) if self.is_trained() else self.first(batch).detach()
        return (self.last(hidden.tanh()) - 1).square().sum()

    def is_trained(self) -> bool:
        return True


class Phase(Changes):
    def change(self, trains: bool) -> None:
        self.phase = int(trains)

    def is_trained(self) -> bool:
        return self.phase == 1


class Count(Changes):
    def change(self, trains: bool) -> None: ...

    def is_trained(self) -> bool:
        return self.done > 3


class Mode(Changes):
    def change(self, trains: bool) -> None:
        self.first.train(trains)

    def on_train_start(self) -> None:
        self.first.eval()  # Lightning has put all into training mode

    def is_trained(self) -> bool:
        return self.first.training


class AddsGroup(Changes):
    def change(self, trains: bool) -> None:
        super().change(trains)
        if trains:
            optimizer: Any = self.trainer.optimizers[0]
            optimizer.add_param_group({"params": list(self.first.parameters())})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.last.parameters(), 0.01, momentum=0.9)


class AddsGroupOnce(AddsGroup):
    def change(self, trains: bool) -> None:
        if not trains or len(self.trainer.optimizers[0].param_groups) == 1:
            super().change(trains)


class InManualSteps(ByHand):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.see(batch)
        super().training_step(batch, batch_idx)
        if self.global_step == 4:
            self.first.requires_grad_(True)


KINDS: list[Callable[[], Plain]] = [Changes, Phase, Count, Mode, AddsGroup, AddsGroupOnce, InManualSteps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["average", "pull", "outer step"])
def test_what_is_changed_after_a_step_reaches_no_branch_early(kind: Any, policy: str, tmp_path: Path) -> None:
    found, expected = (outcome(each(), branching(policy), tmp_path) for each in (kind, Late))
    assert not differences(found, expected)


def test_what_stood_still_for_the_step_alone_is_left_as_it_is(tmp_path: Path) -> None:
    class Toggles(ByHand):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            assert self.first.weight.requires_grad
            self.see(batch)
            self.first.requires_grad_(False)
            super().training_step(batch, batch_idx)
            self.first.requires_grad_(True)

    class Never(Plain):
        def loss(self, batch: Tensor) -> Tensor:
            return (self.last(self.first(batch).detach().tanh()) - 1).square().sum()

    found, expected = (outcome(each(), branching("average"), tmp_path) for each in (Toggles, Never))
    assert not differences(found, expected)


class Averages(Plain):
    """Its mean of the first layer is copied after the first step, and follows after the others."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = AveragedModel(self.first, multi_avg_fn=get_ema_multi_avg_fn(0.8)).requires_grad_(False)

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + (self.mean(batch) - self.first(batch)).square().sum()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.mean.update_parameters(self.first)


def test_frozen_weights_that_each_turn_writes_to_are_each_branch_s_own(tmp_path: Path) -> None:
    alone = Averages()
    trainer(tmp_path, max_epochs=2).fit(alone, batches(DATA[:5]), batches(DATA[8:]))
    found = outcome(Averages(), Branching(Average(), EveryNSteps(3), 2, buffers="average"), tmp_path)
    expected = {f"published {name}": tensor for name, tensor in alone.state_dict().items()}
    assert not differences({name: found[name] for name in expected}, expected)


def test_in_turns_it_waits_for_the_end_of_the_group(tmp_path: Path) -> None:
    trained: list[bool] = []

    class Notes(Changes):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            trained.append(self.first.weight.requires_grad)
            return super().training_step(batch, batch_idx)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if self.global_step == 4:  # the first turn of the third group
                self.change(True)

        def change(self, trains: bool) -> None:
            if not trains or self.global_step == 4:
                super().change(trains)

    outcome(Notes(), Branching(Average(), EveryNSteps(3), 2, batches="turns"), tmp_path)
    assert trained == [False] * 6 + [True] * 4
