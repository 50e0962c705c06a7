"""What belongs to a branch, to a group and to all, on training loops that do more than step one optimizer."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_table import DATA, VIEWS, CountsInGroup, Plain, Slows, SlowsByGroup, batches, differences, outcome
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import trainer
from torch import Tensor, nn

from lightning_merge.branches import Average, InTurn
from lightning_merge.callbacks import DART, PAPA, Branching, DiLoCo, ForkMerge, Lookaround, teacher
from lightning_merge.schedules import EveryNSteps


def fit(module: Any, callback: Any, root: Path, epochs: int = 1, **settings: Any) -> Any:
    run = trainer(root, [] if callback is None else [callback], max_epochs=epochs, **settings)
    run.fit(module, batches(DATA[:6]), batches(DATA[8:]))
    return module


class StepsItsSchedule(Plain):
    """By hand, once per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@pytest.mark.parametrize("feeding", ["same", "turns"])
def test_a_schedule_that_the_module_steps_moves_once_per_group(feeding: Any, tmp_path: Path) -> None:
    module = fit(StepsItsSchedule(), Lookaround(2, 2, batches=feeding), tmp_path)
    groups = 6 if feeding == "same" else 3
    assert module.rates == [0.5**group / 2 for group in range(groups) for _ in range(2)]


class CountsOnce(Plain):
    """In an attribute that there is from its first step on."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.counted = getattr(self, "counted", 0) + 1
        return self.loss(batch)


def test_a_number_that_the_first_turn_assigns_counts_all_turns(tmp_path: Path) -> None:
    assert fit(CountsOnce(), Lookaround(3, 2), tmp_path).counted == 18


class AddsAGroup(Plain):
    """In the middle of a turn, with a rate of its own that it then changes."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Parameter(torch.ones(1))
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        groups: Any = self.trainer.optimizers[0].param_groups
        if batch_idx == 1 and len(groups) == 1:
            self.trainer.optimizers[0].add_param_group({"params": [self.later], "lr": 0.1})
        if batch_idx > 1:
            self.rates.append(groups[1]["lr"])
            groups[1]["lr"] /= 2
        return self.loss(batch) * self.later.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p is not self.later], 0.01)


def test_a_group_that_a_step_adds_is_the_optimizer_s_for_every_branch(tmp_path: Path) -> None:
    module = fit(AddsAGroup(), Lookaround(2, 2), tmp_path)
    assert module.rates == [0.1 / 2**group for group in range(4) for _ in range(2)]
    assert module.later != 1


class SetsItsRate(StepsItsSchedule):
    """Without a schedule, in the group itself."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.5

    def lr_schedulers(self) -> Any:
        class Nothing:
            def step(self) -> None: ...

        return Nothing()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


def test_a_rate_that_the_module_sets_is_the_group_s(tmp_path: Path) -> None:
    module = fit(SetsItsRate(), Lookaround(3, 2), tmp_path)
    assert module.rates == [0.5**group / 2 for group in range(6) for _ in range(3)]


@pytest.mark.parametrize(("branches", "frequency"), [(2, 1), (2, 2), (3, 2), (2, 3)])
def test_a_frequency_counts_groups(branches: int, frequency: int, tmp_path: Path) -> None:
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            self.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
            schedule = {"scheduler": self.schedule, "interval": "step", "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    module = fit(Scheduled(), Lookaround(branches, 2, batches="turns"), tmp_path, epochs=2)
    assert module.schedule.last_epoch == 12 // branches // frequency


class Recurrent(Plain):
    """Carries a state from batch to batch."""

    hidden: Any = None
    counted = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.counted += 1
        before = torch.zeros(3) if self.hidden is None else self.hidden
        self.hidden = (self.first(batch) + before).mean(0).detach()
        return (self.first(batch + before) - 1).square().sum()


class Forgets(Recurrent):
    def on_train_epoch_start(self) -> None:
        self.hidden = None


class OnALayer(Recurrent):
    """Keeps it on a layer of torch, as an attribute that the layer has not had."""

    @property
    def hidden(self) -> Any:
        return vars(self.first).get("hidden")

    @hidden.setter
    def hidden(self, value: Any) -> None:
        self.first.hidden = value


@pytest.mark.parametrize("kind", [Recurrent, Forgets, OnALayer])
def test_a_state_that_a_step_assigns_is_the_branch_s_own(kind: type[Recurrent], tmp_path: Path) -> None:
    plain, branched = fit(kind(), None, tmp_path, 2), fit(kind(), Lookaround(3, 2), tmp_path, 2)
    assert not differences(dict(branched.state_dict()), dict(plain.state_dict()))
    assert torch.allclose(branched.hidden, plain.hidden)
    assert (plain.counted, branched.counted) == (12, 36)  # numbers count the steps of all


class Clips(Plain):
    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.3, 0.3)


def test_weights_that_a_hook_changes_for_one_branch_are_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"was changed between two training steps, as `on_train_batch_end`"):
        fit(Clips(), Lookaround(2, 2, VIEWS), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*between two training steps.*")
        fit(Plain(), Lookaround(2, 2, VIEWS), tmp_path, 2)
        fit(Clips(), Lookaround(1, 2), tmp_path)


class Thing:
    """A batch that is no container."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Uncopied(Thing):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("holds a lock")


class WritesToItsBatch(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch.x = batch.x / 2 + 1
        batch.x.mul_(0.5)
        return self.loss(batch.x)


def things(kind: type[Thing]) -> Any:
    return torch.utils.data.DataLoader(
        [kind(each.clone()) for each in DATA[:6]], batch_size=None, collate_fn=lambda b: b
    )


def test_a_batch_that_is_an_object_is_copied_for_each_branch_or_refused(tmp_path: Path) -> None:
    plain, branched = WritesToItsBatch(), WritesToItsBatch()
    trainer(tmp_path, max_epochs=1).fit(plain, things(Thing))
    trainer(tmp_path, [Lookaround(3, 2)], max_epochs=1).fit(branched, things(Thing))
    assert not differences(dict(branched.state_dict()), dict(plain.state_dict()))
    with pytest.raises(ValueError, match=r"a batch \(Uncopied\) cannot be copied: TypeError: holds a lock"):
        trainer(tmp_path, [Lookaround(3, 2)], max_epochs=1).fit(WritesToItsBatch(), things(Uncopied))


class OnlyTheSecondSteps(Plain):
    """The optimizer that ends turns never does after the first batch; another one goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen_last: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers()[int(batch_idx > 0) :]:  # type: ignore[index]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        self.seen_last.append(self.last.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), 0.01) for each in (self.first, self.last)]


def test_what_any_optimizer_has_moved_is_in_the_mean(tmp_path: Path) -> None:
    module = fit(OnlyTheSecondSteps(), Lookaround(2, 1, VIEWS), tmp_path)
    first, second = module.seen_last[-2:]
    assert not torch.allclose(first, second)
    torch.testing.assert_close(module.last.weight.detach(), (first + second) / 2)


def test_counters_in_groups_are_averaged_and_reset(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    optimizer = CountsInGroup(module.parameters())
    branches = InTurn(module, [optimizer], 2)
    for branch, steps in ((0, 1), (1, 3)):
        branches.activate(branch)
        for _ in range(steps):
            module(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        assert optimizer.param_groups[0]["k"] == steps
    saved = branches.save()
    branches.average_optimizers()
    for branch in (0, 1):
        branches.activate(branch)
        assert optimizer.param_groups[0]["k"] == 3
    branches.activate(1)
    branches.load(saved)
    branches.load_optimizers(saved)
    branches.activate(0)
    assert optimizer.param_groups[0]["k"] == 1
    branches.reset_optimizers({0, 1})
    assert "k" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda p: torch.optim.Adafactor(p, 0.01), "Adafactor keeps `row_var`"),
        (lambda p: torch.optim.LBFGS(p, max_iter=2), "LBFGS keeps"),
    ],
)
def test_a_state_of_which_no_mean_is_known_is_refused_after_the_first_group(
    make: Any, kept: str, tmp_path: Path
) -> None:
    class Other(Plain):
        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    callback = Branching(Average(), EveryNSteps(100), 2, optimizer_state="average")
    with pytest.raises(ValueError, match=kept):
        fit(Other(), callback, tmp_path)
    fit(Other(), Branching(Average(), EveryNSteps(2), 2), tmp_path)


class Poisoned(Plain):
    """The second branch turns to NaN in the last batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        branch = next(each for each in callbacks if isinstance(each, Branching))._running.branches.active
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 5 and branch == 1 else 1.0)


@pytest.mark.parametrize("make", [lambda: Lookaround(2, 4), lambda: PAPA(2, 4), lambda: DiLoCo(2, 4, batches="same")])
def test_a_branch_that_diverged_is_not_published(make: Any, tmp_path: Path) -> None:
    module = Poisoned()
    with pytest.warns(UserWarning, match=r"branches \[1\] hold a NaN.*published is the mean of the others"):
        fit(module, make(), tmp_path)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


@pytest.mark.parametrize("schedule", ["one cycle", "cyclic"])
def test_the_pull_is_never_more_than_was_asked_for(schedule: str, tmp_path: Path) -> None:
    class Scheduled(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            rates: Any = torch.optim.lr_scheduler
            if schedule == "one cycle":
                made = rates.OneCycleLR(optimizer, 0.01, total_steps=20, cycle_momentum=False)
            else:
                made = rates.CyclicLR(optimizer, 0.001, 0.01, step_size_up=3, cycle_momentum=False)
            return [optimizer], [{"scheduler": made, "interval": "step"}]

    papa = PAPA(2, 1, pull=0.3, augmentations=VIEWS)
    pulls: list[float] = []
    mix = InTurn.mix

    def noted(self: InTurn, matrix: Any) -> None:
        pulls.append(2 * matrix[0][1])
        mix(self, matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InTurn, "mix", noted)
        fit(Scheduled(), papa, tmp_path, 2)
    assert len(pulls) == 12
    assert 0.29 < max(pulls) <= 0.3 + 1e-9


def test_a_file_of_an_unfrozen_layer_resumes_where_the_hook_has_not_run_yet(tmp_path: Path) -> None:
    class Thaws(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.first.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.first.requires_grad_(self.current_epoch >= 1)

    def run(module: Any, epochs: int, **resume: Any) -> dict[str, Tensor]:
        callbacks = [PAPA(2, 2, 0.2, VIEWS), ModelCheckpoint(tmp_path / str(epochs), "{epoch}", save_top_k=-1)]
        trainer(tmp_path, callbacks, max_epochs=epochs).fit(module, batches(DATA[:6]), **resume)
        return dict(module.state_dict())

    whole = run(Thaws(), 3)
    run(Thaws(), 2)
    assert not differences(run(Thaws(), 3, ckpt_path=tmp_path / "2" / "epoch=1.ckpt"), whole)


def test_two_steps_of_sam_end_a_turn(tmp_path: Path) -> None:
    class SAM(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.01})
            self.base = torch.optim.SGD(self.param_groups, 0.01, momentum=0.9)
            self.param_groups = self.base.param_groups

        @torch.no_grad()
        def second_step(self) -> None:
            self.base.step()
            self.base.zero_grad()

        def first_step(self) -> None: ...

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise NotImplementedError

    class InTwo(StepsItsSchedule):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.first_step()
            self.manual_backward(self.loss(batch))
            optimizer.second_step()

        def configure_optimizers(self) -> Any:
            return SAM(self.parameters())

    callback = Lookaround(2, 2)
    module = fit(InTwo(), callback, tmp_path)
    assert callback.merges == 3

    class Momentum(Plain):
        def see(self, batch: Tensor) -> None: ...

    # Each branch has its own momentum, which is the inner optimizer's.
    expected = dict(fit(Momentum(), None, tmp_path).state_dict())
    assert not differences(dict(module.state_dict()), expected)


def test_a_second_fit_says_that_it_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = DiLoCo(2, 2)
    fit(Plain(), callback, tmp_path)
    other = Plain()
    other.load_state_dict({name: tensor + 1 for name, tensor in other.state_dict().items()})
    with caplog.at_level("INFO"):
        fit(other, callback, tmp_path)
    assert "starts anew: the live weights are not those that its last fit left" in caplog.text


def test_a_step_of_forkmerge_may_return_nothing(tmp_path: Path) -> None:
    class Skips(Plain):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx == 1 else {"losses": {"a": self.loss(batch)}}

    fork = ForkMerge({"one": {"a": 1.0}, "two": {"a": 0.5}}, 2, score=lambda m, b: (-m.loss(b), len(b)))
    fit(Skips(), fork, tmp_path)
    assert fork.merges == 3


def test_a_teacher_calls_no_eval(tmp_path: Path) -> None:
    class Merges(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            assert mode, "adapters are merged into the weights"
            return super().train(mode)

    class Student(Plain):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with teacher(self, "lookaround"):
                assert not self.first.training
            return self.loss(batch)

    module = Student()
    module.first = Merges(3, 3)
    run = trainer(tmp_path, [Lookaround(2, 2, buffers="average")], max_epochs=1)
    run.fit(module, batches(DATA[:6]))


def test_layers_that_are_dropped_may_wait_in_host_memory(tmp_path: Path) -> None:
    class Drops(Plain):
        """A branch may not have stepped a layer when another one has."""

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.trainer.optimizers[0].zero_grad(set_to_none=True)
            return self.loss(batch) if float(batch.mean()) > 0.3 else self.last(batch).square().sum()

    kept = [outcome(Drops(), Lookaround(2, 2, VIEWS, inactive=each), tmp_path) for each in ("device", "cpu")]
    assert not differences(*kept)


def test_the_counter_of_a_group_survives_a_resume(tmp_path: Path) -> None:
    def run(module: Any, epochs: int, **resume: Any) -> dict[str, Tensor]:
        callbacks = [Lookaround(2, 4, VIEWS), ModelCheckpoint(tmp_path / str(epochs), "{epoch}", save_top_k=-1)]
        trainer(tmp_path, callbacks, max_epochs=epochs).fit(module, batches(DATA[:6]), **resume)
        return dict(module.state_dict())

    run(SlowsByGroup(), 1)
    again = run(SlowsByGroup(), 2, ckpt_path=tmp_path / "1" / "epoch=0.ckpt")
    assert not differences(again, run(Slows(), 2))


@pytest.mark.filterwarnings("ignore:.*was changed between two training steps")
def test_weights_that_a_hook_changes_right_after_a_merge_resume_as_they_are(tmp_path: Path) -> None:
    def run(epochs: int, **resume: Any) -> dict[str, Tensor]:
        module = Clips()
        callbacks = [Lookaround(2, 3, VIEWS), ModelCheckpoint(tmp_path / str(epochs), "{epoch}", save_top_k=-1)]
        trainer(tmp_path, callbacks, max_epochs=epochs).fit(module, batches(DATA[:6]), **resume)
        return dict(module.state_dict())

    whole = run(3)
    run(2)
    assert not differences(run(3, ckpt_path=tmp_path / "2" / "epoch=1.ckpt"), whole, 0.0)


class Position:
    """A loader that Lightning sets to where it was."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        first, self.next = self.next, 0
        for number in range(first, 6):
            self.at = number + 1
            yield DATA[number]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["at"] % 6


def test_branches_whose_start_is_a_share_of_the_run_resume_in_mid_epoch_at_the_next_batch(tmp_path: Path) -> None:
    def run(folder: str, **resume: Any) -> dict[str, Tensor]:
        callbacks = [DART(2, 3, 0.5, VIEWS, buffers="average")]
        saver = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = Plain()
        trainer(tmp_path, [*callbacks, saver], max_epochs=2).fit(module, Position(), **resume)
        return dict(module.state_dict())

    whole = run("whole")
    assert not differences(run("again", ckpt_path=tmp_path / "whole" / "step=2.ckpt"), whole, 0.0)
