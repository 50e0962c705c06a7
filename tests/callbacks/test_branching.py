"""Branches in a real Trainer: equal to independent replicas bit for bit, whatever the loop does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from branch_table import POLICIES
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, NetParts, batches, differing, of, raw_of, read, score, trainer, validation
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.branches import Average
from lightning_merge.callbacks import EMA, Branching, Lookaround
from lightning_merge.schedules import EveryNEpochs, EveryNSteps


def bent(by: float) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda batch: [batch[0] + by * batch[0].square(), batch[1]]


BENDS = [bent(0.3 * branch) for branch in range(3)]


class TwoGroupsParts(NetParts):
    """Weight decay for matrices only, by AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() == 1]
        return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}], lr=0.01)


class TiedParts(NetParts):
    """One matrix used twice."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.net[2].weight = self.net[0].weight


class FrozenParts(NetParts):
    """The first layer does not train."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__(norm)
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad((p for p in self.parameters() if p.requires_grad), lr=0.1)


KINDS: dict[str, type] = {"momentum": NetParts, "two groups": TwoGroupsParts, "tied": TiedParts, "frozen": FrozenParts}


def replicas(module: Any, data: Any, k: int, count: int = 3, accumulate: int = 1, turns: bool = False) -> list[Any]:
    """As many independent modules with optimizers of their own, averaged every ``k`` steps by a plain loop."""
    modules = [copy.deepcopy(module) for _ in range(count)]
    optimizers = [each.configure_optimizers() for each in modules]
    data = list(data)
    for number in range(len(data) // accumulate):
        window = data[number * accumulate : (number + 1) * accumulate]
        chosen = [number % count] if turns else range(count)
        for j in chosen:
            optimizers[j].zero_grad()
            for batch in window:
                loss = nn.functional.mse_loss(modules[j].net(BENDS[j](batch)[0]), batch[1])
                (loss / accumulate).backward()
            optimizers[j].step()
        group, rest = divmod(number + 1, count if turns else 1)
        if rest == 0 and group % k == 0:
            for parameters in zip(*(each.parameters() for each in modules), strict=True):
                mean = parameters[0].detach().clone()
                for n, parameter in enumerate(parameters[1:], start=2):
                    mean.lerp_(parameter.detach(), 1 / n)
                for parameter in parameters:
                    parameter.data.copy_(mean)
    return modules


def branches_of(callback: Branching) -> list[dict[str, Tensor]]:
    """The parameters of every branch after a fit."""
    own = callback._running.branches
    raw = callback.raw_weights()
    return [{name: raw[name] for name in own.live} if j == own.active else own.weights(j) for j in own.own]


@pytest.mark.parametrize("inactive", ["device", "cpu"])
@pytest.mark.parametrize("feeding", ["same", "turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_equal_independent_replicas_bit_for_bit(
    kind: str, feeding: Any, inactive: Any, tmp_path: Path
) -> None:
    module = of(KINDS[kind])()
    expected = replicas(module, batches(12), k=2, turns=feeding == "turns")
    lookaround = Lookaround(3, 2, BENDS, feeding, inactive=inactive)
    trainer(tmp_path, [lookaround], max_epochs=1, limit_train_batches=12).fit(module, batches(12))
    for replica, branch in zip(expected, branches_of(lookaround), strict=True):
        assert branch
        assert not differing({name: dict(replica.named_parameters())[name] for name in branch}, branch)


@pytest.mark.parametrize("feeding", ["same", "turns"])
def test_accumulated_gradients_belong_to_their_branch(feeding: Any, tmp_path: Path) -> None:
    module = Net()
    expected = replicas(module, batches(18), k=2, accumulate=3, turns=feeding == "turns")
    lookaround = Lookaround(3, 2, BENDS, feeding)
    run = trainer(tmp_path, [lookaround], max_epochs=1, accumulate_grad_batches=3)
    run.fit(module, batches(18))
    for replica, branch in zip(expected, branches_of(lookaround), strict=True):
        assert not differing(replica.state_dict(), branch)
    assert run.global_step == 6
    assert lookaround.steps == (18 if feeding == "same" else 6)


@pytest.mark.parametrize("feeding", ["same", "turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_branch_is_the_plain_optimizer_bit_for_bit(kind: str, feeding: Any, tmp_path: Path) -> None:
    plain = of(KINDS[kind])(norm=True)
    branched = copy.deepcopy(plain)
    trainer(tmp_path, max_epochs=2).fit(plain, batches())
    lookaround = Lookaround(1, 2, batches=feeding, buffers="shared")
    run = trainer(tmp_path, [lookaround], max_epochs=2)
    run.fit(branched, batches())
    assert not differing(plain, branched)
    assert run.global_step == 8
    assert lookaround.merges == 4


class AllAtOnceParts(NetParts):
    """Manual optimization, two optimizers, the second one stepped at every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1, 0.9), torch.optim.Adam(self.net[2].parameters(), 0.01)]


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    module = of(AllAtOnceParts)()
    modules = [copy.deepcopy(module) for _ in range(2)]
    optimizers = [each.configure_optimizers() for each in modules]
    for number, batch in enumerate(batches(6)):
        for j in range(2):
            for optimizer in optimizers[j][: 1 + number % 2]:
                optimizer.zero_grad()
                modules[j].loss(BENDS[j](batch)).backward()
                optimizer.step()
        if number % 3 == 2:
            for parameters in zip(*(each.parameters() for each in modules), strict=True):
                mean = parameters[0].detach().lerp(parameters[1].detach(), 0.5)
                for parameter in parameters:
                    parameter.data.copy_(mean)
    lookaround = Lookaround(2, 3, BENDS[:2])
    run = trainer(tmp_path, [lookaround], max_epochs=1)
    run.fit(module, batches(6))
    assert lookaround.merges == 2
    assert not differing(modules[1].state_dict(), branches_of(lookaround)[1])
    assert not differing(modules[0].state_dict(), branches_of(lookaround)[0])
    assert run.global_step == 9  # as without the callback: six steps of one optimizer, three of the other


def test_schedules_move_once_per_group(tmp_path: Path) -> None:
    class Halving(NetParts):
        rates: list[float]

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    def rates(**settings: Any) -> list[float]:
        module = of(Halving)(lr=0.8)
        module.rates = []
        trainer(tmp_path, [Lookaround(2, 2, **settings)], max_epochs=1).fit(module, batches(4))
        return module.rates

    assert rates() == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]
    assert rates(batches="turns") == [0.8, 0.8, 0.4, 0.4]

    module = of(Halving)(lr=0.8)
    module.rates = []
    per_step = Branching(Average(), EveryNSteps(2), 2, batches="turns", schedulers="step")
    trainer(tmp_path, [per_step], max_epochs=1).fit(module, batches(4))
    assert module.rates == [0.8, 0.4, 0.2, 0.1]


def repeated(n: int) -> DataLoader[Any]:
    """The same batch over and over, so that a run resumed within an epoch sees what it would have seen."""
    return DataLoader([next(iter(batches(1)))] * n, batch_size=None)


def mean_of(sets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in sets]).mean(0) for name in sets[0]}


@pytest.mark.parametrize("buffers", ["shared", "average", "recompute"])
def test_validation_files_and_the_final_model_hold_the_mean(buffers: Any, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1)
    # Five batches and an average every second group: no epoch ends with an average.
    lookaround = Lookaround(3, 2, BENDS, buffers=buffers, validate="both")
    module = Net(norm=True)
    run = trainer(tmp_path, [lookaround, checkpoint], max_epochs=3)
    run.fit(module, batches(5), validation())
    for file in map(read, sorted(tmp_path.glob("step=*.ckpt"))):
        saved, section = file["state_dict"], file["lightning_merge"]
        assert section["holds"] == "lookaround"
        assert section["measured"]
        assert section["score"] == pytest.approx(score(saved, norm=True), rel=1e-6)
        state = section["states"]["lookaround"]
        sets = [{**raw_of(file), **own} for own in state["branches"]["weights"].values()] + [raw_of(file)]
        assert len(sets) == (1 if file["global_step"] == 10 else 3)
        expected = mean_of([{name: t for name, t in each.items() if t.is_floating_point()} for each in sets])
        for name, tensor in expected.items():
            if "running" not in name:
                torch.testing.assert_close(saved[name], tensor)
    final = read(lookaround.final_path)
    assert not differing(final["state_dict"], module)
    assert score(module.state_dict(), norm=True) == pytest.approx(lookaround.final_metrics["val/loss"], rel=1e-6)
    assert run.callback_metrics["val/loss"] != run.callback_metrics["raw/val/loss"]
    raw = raw_of(final)
    assert not differing(lookaround.raw_weights(), {name: raw[name] for name in module.state_dict()})


@pytest.mark.parametrize("feeding", ["same", "turns"])
@pytest.mark.parametrize("settings", [{"buffers": "average"}, {}, {"optimizer_state": "average", "inactive": "cpu"}])
def test_a_resumed_run_equals_the_uninterrupted_one_from_every_file(
    feeding: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    def fit(folder: str, ckpt_path: Path | None = None) -> tuple[Any, Lookaround]:
        checkpoint = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        lookaround = Lookaround(3, 2, BENDS, feeding, **settings)
        module = of(TwoGroupsParts)(norm=True)
        run = trainer(tmp_path, [lookaround] if ckpt_path else [lookaround, checkpoint], max_epochs=1)
        run.fit(module, repeated(11), ckpt_path=ckpt_path)
        return module, lookaround

    whole, first = fit("whole")
    assert first.merges == (5 if feeding == "same" else 1)
    files = sorted((tmp_path / "whole").glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(files) == 11
    for file in files:
        again, second = fit(file.stem, file)
        assert not differing(whole, again)
        assert (first.steps, first.groups, first.merges) == (second.steps, second.groups, second.merges)
        for one, other in zip(branches_of(first), branches_of(second), strict=True):
            assert not differing(one, other)


def test_a_file_written_at_a_merge_holds_one_set_of_weights(tmp_path: Path) -> None:
    class WideParts(NetParts):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 20_000), nn.Linear(20_000, 1))

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, [Lookaround(3, 2, BENDS), checkpoint], max_epochs=1).fit(of(WideParts)(), batches(4))
    size = {step: (tmp_path / f"step={step}.ckpt").stat().st_size / (4 * 120_001) for step in (1, 2, 3, 4)}
    # Copies of the weights: mean, raw, two branches, the last merge, three momenta; at a merge one and three momenta.
    assert [round(size[step]) for step in (1, 2, 3, 4)] == [8, 4, 8, 4]


def test_a_second_fit_goes_on_with_the_branches(tmp_path: Path) -> None:
    class PlainStepsParts(NetParts):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = repeated(5)
    once, twice = of(PlainStepsParts)(), of(PlainStepsParts)()
    one, two = Lookaround(3, 4, BENDS), Lookaround(3, 4, BENDS)
    trainer(tmp_path, [one], max_epochs=2).fit(once, data)
    for _ in range(2):
        trainer(tmp_path, [two], max_epochs=1).fit(twice, data)
    assert not differing(once, twice)
    for left, right in zip(branches_of(one), branches_of(two), strict=True):
        assert not differing(left, right)


def test_a_schedule_of_epochs_merges_before_validation(tmp_path: Path) -> None:
    branching = Branching(Average(), EveryNEpochs(), 3, augmentations=BENDS, validate="both", buffers="shared")
    run = trainer(tmp_path, [branching], max_epochs=2)
    run.fit(Net(), batches(3), validation())
    assert branching.merges == 2
    assert run.callback_metrics["val/loss"] == run.callback_metrics["raw/val/loss"]


def test_an_average_beside_it_is_measured_and_saved_too(tmp_path: Path) -> None:
    lookaround, ema = Lookaround(3, 2, BENDS), EMA(decay=0.5)
    run = trainer(tmp_path, [lookaround, ema, ModelCheckpoint(tmp_path, monitor="ema/val/loss")], max_epochs=1)
    run.fit(Net(), batches(5), validation())
    assert ema.updates == 15
    assert {"val/loss", "ema/val/loss"} <= run.callback_metrics.keys()
    (path,) = tmp_path.glob("epoch=*.ckpt")
    assert read(path)["lightning_merge"]["holds"] == "ema"
    assert score(read(path)["state_dict"]) == pytest.approx(run.callback_metrics["ema/val/loss"].item(), rel=1e-6)


class PoisonedParts(NetParts):
    """The loss of some branches is NaN in the sixth batch."""

    def __init__(self, poisoned: tuple[int, ...], norm: bool = False) -> None:
        super().__init__(norm)
        self.poisoned = poisoned
        self.calls = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        branch, self.calls = self.calls % 3, self.calls + 1
        factor = float("nan") if batch_idx == 5 and branch in self.poisoned else 1.0
        return self.loss(batch) * factor


def test_a_branch_that_diverged_is_left_out_of_the_merge(tmp_path: Path) -> None:
    module = of(PoisonedParts)((1,), norm=True)
    lookaround = Lookaround(3, 4, BENDS, buffers="shared")
    run = trainer(tmp_path, [lookaround], max_epochs=1)
    with pytest.warns(UserWarning, match=r"branches \[1\] hold a NaN or an infinity after group 8.*mean of the others"):
        run.fit(module, repeated(8))
    assert lookaround.revived == 1
    assert all(tensor.isfinite().all() for each in branches_of(lookaround) for tensor in each.values())
    assert all(buffer.isfinite().all() for buffer in module.buffers())
    # Branches 0 and 2 as if they had been alone since the merge before.
    start = of(PoisonedParts)((), norm=True)
    first = Lookaround(3, 4, BENDS, buffers="shared")
    half = trainer(tmp_path, [first, ModelCheckpoint(tmp_path, "half")], max_epochs=1)
    half.fit(start, repeated(4))
    expected = []
    for branch in (0, 2):
        alone = of(NetParts)(norm=True)
        optimizer = alone.configure_optimizers()
        alone.load_state_dict(start.state_dict())
        states = read(tmp_path / "half.ckpt")
        own = states["lightning_merge"]["states"]["lookaround"]["branches"]["optimizers"].get(branch)
        state = states["optimizer_states"][0]["state"] if own is None else own[0]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for _ in range(4):
            optimizer.zero_grad()
            alone.loss(BENDS[branch](next(iter(batches(1))))).backward()
            optimizer.step()
        expected.append(dict(alone.named_parameters()))
    for name, tensor in module.named_parameters():
        torch.testing.assert_close(tensor, (expected[0][name] + expected[1][name]) / 2)


def test_when_all_branches_diverged_training_ends_with_the_last_good_merge(tmp_path: Path) -> None:
    good = of(PoisonedParts)((), norm=True)
    trainer(tmp_path / "good", [Lookaround(3, 4, BENDS, buffers="shared")], max_epochs=1).fit(good, repeated(4))
    module, files = of(PoisonedParts)((0, 1, 2), norm=True), ModelCheckpoint(tmp_path)
    lookaround = Lookaround(3, 4, BENDS, buffers="shared")
    run = trainer(tmp_path, [lookaround, files], max_epochs=3)
    with pytest.warns(UserWarning, match="all 3 branches hold a NaN.*weights of merge 1, the last good one"):
        run.fit(module, repeated(8))
    assert run.current_epoch == 1
    assert not differing(good, module)
    assert not differing(read(lookaround.final_path)["state_dict"], good)


NEVER_EQUAL = ("pairs", "pull", "shuffle")
"""Policies after whose merges branches differ, and that keep no weights of all."""


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore")
def test_whatever_the_policy_a_run_whose_branches_all_diverged_ends_with_good_weights_or_says_why(
    name: str, tmp_path: Path
) -> None:
    module = of(PoisonedParts)((0, 1, 2), norm=True)
    measure = (lambda own, batch: (-own.loss(batch), 1)) if POLICIES[name]().needs_score else None
    callback = Branching(POLICIES[name](), EveryNSteps(2), 2, augmentations=BENDS[:2], score=measure)
    run = trainer(tmp_path, [callback], max_epochs=3)
    if name in NEVER_EQUAL:
        with pytest.raises(RuntimeError, match="and its policy keeps no weights to go back to"):
            run.fit(module, repeated(8), validation())
        return
    with pytest.warns(UserWarning, match="all 2 branches hold a NaN.*Training stops with the weights of merge"):
        run.fit(module, repeated(8), validation())
    assert run.current_epoch == 1
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert all(tensor.isfinite().all() for each in branches_of(callback) for tensor in each.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": 0}, "`branches` must be at least 1, got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        ({"augmentations": [abs]}, "`augmentations` must have one entry for each of the 3 branches, got 1"),
        ({"batches": "each"}, "`batches` must be one of 'same', 'turns', 'own', got 'each'"),
        ({"optimizer_state": "drop"}, "`optimizer_state` must be one of 'keep', 'average', 'reset'"),
        ({"buffers": "mean"}, "`buffers` must be one of 'shared', 'average', 'recompute', got 'mean'"),
        ({"inactive": "disk"}, "`inactive` must be one of 'device', 'cpu', got 'disk'"),
        ({"name": "raw"}, "`name` must be a word other than 'raw'"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lookaround(**arguments)


def test_two_sets_of_branches_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, [Lookaround(), Lookaround(name="second")])
    with pytest.raises(ValueError, match="one Trainer trains one set of branches"):
        run.fit(Net(), batches())


def test_a_file_of_another_number_of_branches_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, [Lookaround(3, 2), ModelCheckpoint(tmp_path, "file")], max_epochs=1).fit(Net(), batches(3))
    run = trainer(tmp_path, [Lookaround(2, 2)], max_epochs=2)
    with pytest.raises(ValueError, match="goes on with 3 branches, and `branches` is 2"):
        run.fit(Net(), batches(3), ckpt_path=tmp_path / "file.ckpt")
