"""ForkMerge through a real Trainer: the published search, task weights, its own evaluation, and bad input."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from tiny import batches, differing, read, steps, trainer, validation
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.branches import BestMix
from lightning_merge.callbacks import Branching, ForkMerge
from lightning_merge.schedules import EveryNSteps
from lightning_merge.search import Greedy, Grid, Line

# FM-1: where each branch is at the merge; the criterion is highest at `BEST`.
ENDS = {"0": (1.0, 0.0, 2.0), "3": (0.0, 1.0, 1.0), "5": (2.0, 2.0, -1.0)}
BEST = (0.55, 0.70, 1.15)
ALONE = {name: {name: 1.0} for name in ENDS}


class Ends(pl.LightningModule):
    """One step at rate 1 on the loss of a task leads to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.measured: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        return {"losses": {name: (self.w * (self.w.detach() - self.end(name))).sum() for name in ENDS}}

    def score_step(self, batch: Tensor) -> tuple[Tensor, int]:
        self.measured.append(self.w.tolist())
        return 1 - (self.w - torch.tensor(BEST, dtype=torch.float64)).square().sum(), 1

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/criterion", 1 - (self.w - torch.tensor(BEST, dtype=torch.float64)).square().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    @staticmethod
    def end(name: str) -> Tensor:
        return torch.tensor(ENDS[name], dtype=torch.float64)


def test_the_search_follows_the_published_run(tmp_path: Path) -> None:
    module, fork = Ends(), ForkMerge(ALONE, every_n_steps=1, previous=False)
    run = trainer(tmp_path, [fork], max_epochs=1, precision="64-true")
    run.fit(module, steps(1), steps(1))
    scores = [1 - sum((a - b) ** 2 for a, b in zip(w, BEST, strict=True)) for w in module.measured]
    expected = [-0.415, 0.585, -7.415]  # the branches alone, which give the order 3, 0, 5
    expected += [0.8350000000, 0.9115306122, 0.9131250000, 0.8812962963, 0.8350000000]
    expected += [0.9966735537, 0.9378645833, 0.7969082840, 0.6095535714, 0.3975000000]
    assert scores == pytest.approx(expected, abs=1e-10)
    (merge,) = fork.history
    assert list(merge["shares"].values()) == pytest.approx([0.3409090909, 0.5681818182, 0.0909090909], abs=1e-10)
    assert merge["score"] == pytest.approx(0.9966735537, abs=1e-10)
    assert (merge["evaluations"], merge["rejected"], merge["previous"]) == (13, 0, False)
    assert module.w.tolist() == pytest.approx([0.5227272727, 0.75, 1.1590909091], abs=1e-10)
    assert run.callback_metrics["val/criterion"] == pytest.approx(0.9966735537, abs=1e-6)


def test_two_branches_are_searched_along_the_whole_line(tmp_path: Path) -> None:
    for search in (None, Line(evaluations=40)):
        module, fork = Ends(), ForkMerge({n: {n: 1.0} for n in ("3", "0")}, every_n_steps=1, search=search)
        trainer(tmp_path, [fork], max_epochs=1, precision="64-true").fit(module, steps(1), steps(1))
        # The share of "0" at the point of the line from "3" to "0" that is nearest to BEST; the line is sqrt(3) long.
        nearest = sum((b - e) * (d - e) for b, e, d in zip(BEST, ENDS["3"], ENDS["0"], strict=True)) / 3
        share = fork.history[0]["shares"]["0"]
        assert share == pytest.approx(nearest, abs=0.05 if search is None else 1e-6)


def test_the_last_merge_is_kept_when_nothing_is_better(tmp_path: Path) -> None:
    class Away(Ends):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
            outputs = super().training_step(batch, batch_idx)
            return outputs if batch_idx == 0 else {"losses": {name: self.w.sum() for name in ENDS}}

    module, fork = Away(), ForkMerge({"3": {"3": 1.0}, "0": {"0": 1.0}}, every_n_steps=1)
    trainer(tmp_path, [fork], max_epochs=1, precision="64-true").fit(module, steps(2), steps(1))
    first, second = fork.history
    assert not first["previous"]
    assert second["previous"]
    assert second["score"] == first["score"]
    assert set(second["shares"].values()) == {0.0}
    assert module.w.tolist() == pytest.approx([0.3, 0.7, 1.3])


@pytest.mark.parametrize(("margin", "kept"), [(0.0, False), (0.089, False), (0.091, True)])
def test_a_gain_below_the_margin_keeps_the_last_merge(margin: float, kept: bool, tmp_path: Path) -> None:
    class Nearer(Ends):
        """Both branches end where the score is 0.91 at first, then where it is 1."""

        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
            end = torch.tensor(BEST, dtype=torch.float64) - torch.tensor([0.0 if batch_idx else 0.3, 0.0, 0.0])
            return {"losses": {name: (self.w * (self.w.detach() - end)).sum() for name in ENDS}}

    module = Nearer()
    fork = ForkMerge({"3": {"3": 1.0}, "0": {"0": 1.0}}, every_n_steps=1, search=Grid(0.5), min_gain=margin)
    trainer(tmp_path, [fork], max_epochs=1, precision="64-true").fit(module, steps(2), steps(1))
    first, second = fork.history
    assert (first["previous"], second["previous"], second["evaluations"]) == (False, kept, 4)
    assert second["score"] == pytest.approx(0.91 if kept else 1.0)
    assert module.w.tolist() == pytest.approx([0.25 if kept else 0.55, 0.7, 1.15])


# ---- training


class TasksParts:
    """A trunk, a head for the target, a head for an auxiliary task."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh())
        self.head, self.other = nn.Linear(8, 1), nn.Linear(8, 1)
        self.asked: list[str] = []
        self.helped = 0

    def target(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(self.trunk(batch[0])), batch[1])

    def auxiliary(self, batch: list[Tensor]) -> Tensor:
        self.helped += 1
        return nn.functional.mse_loss(self.other(self.trunk(5 + batch[0])), batch[0].sum(1, keepdim=True))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        return {"losses": {"target": lambda: self.target(batch), "helper": lambda: self.auxiliary(batch)}}

    def score_step(self, batch: list[Tensor]) -> tuple[Tensor, int]:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert self.trainer.validating
        self.log("never", 1.0)
        return -self.target(batch) * len(batch[0]), len(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.target(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Tasks(TasksParts, pl.LightningModule):
    pass


BRANCHES = {"alone": {"target": 1.0}, "joint": {"target": 1.0, "helper": 0.5}}


def branches_of(callback: Branching) -> list[dict[str, Tensor]]:
    own, raw = callback._running.branches, callback.raw_weights()
    return [{name: raw[name] for name in own.live} if j == own.active else own.weights(j) for j in own.own]


def test_every_branch_trains_on_its_own_mixture_of_tasks(tmp_path: Path) -> None:
    module = Tasks()
    expected = []
    for weight in (0.0, 0.5):
        alone = Tasks()
        optimizer = alone.configure_optimizers()
        for batch in batches(4):
            optimizer.zero_grad()
            loss = alone.target(batch)
            (loss + weight * alone.auxiliary(batch) if weight else loss).backward()
            optimizer.step()
        expected.append(dict(alone.named_parameters()))
    fork = ForkMerge(BRANCHES, every_n_steps=10)
    trainer(tmp_path, [fork], max_epochs=1).fit(module, batches(4), validation())
    assert module.helped == 4  # the branch without the task does not compute its loss
    for found, branch in zip(branches_of(fork), expected, strict=True):
        assert found.keys() == branch.keys()
        assert not differing(found, branch)


def test_heads_of_auxiliary_tasks_are_no_part_of_the_merge(tmp_path: Path) -> None:
    module = Tasks()
    alone = Tasks()
    optimizer = alone.configure_optimizers()
    for batch in batches(4):
        optimizer.zero_grad()
        (alone.target(batch) + 0.5 * alone.auxiliary(batch)).backward()
        optimizer.step()
    fork = ForkMerge(BRANCHES, every_n_steps=4, heads=["other.*"])
    trainer(tmp_path, [fork], max_epochs=1).fit(module, batches(4), validation())
    assert fork.merges == 1
    assert "other.weight" not in fork._running.branches.live
    assert torch.equal(module.other.weight, alone.other.weight)


@pytest.mark.parametrize("buffers", ["recompute", "average", "shared"])
def test_candidates_are_measured_as_validation_does_and_training_notices_nothing(buffers: Any, tmp_path: Path) -> None:
    module = Tasks(norm=True)
    fork = ForkMerge(BRANCHES, every_n_steps=4, buffers=buffers)
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, [fork], max_epochs=2, logger=logger, log_every_n_steps=1)
    run.fit(module, batches(4), validation())
    assert module.training
    assert "never" not in run.callback_metrics
    assert module.helped == 8  # statistics are those of the first branch's tasks
    # Validation right after the merge finds what the search found.
    assert run.callback_metrics["val/loss"] == pytest.approx(-fork.history[-1]["score"], rel=1e-5)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert {"forkmerge/alone", "forkmerge/joint", "forkmerge/score"} <= set(rows.splitlines()[0].split(","))


def test_the_last_merge_is_what_is_published_in_between(tmp_path: Path) -> None:
    four, six = Tasks(), Tasks()
    trainer(tmp_path, [ForkMerge(BRANCHES, every_n_steps=4)], max_epochs=1).fit(four, batches(4), validation())
    trainer(tmp_path, [ForkMerge(BRANCHES, every_n_steps=4)], max_epochs=1).fit(six, batches(6), validation())
    assert not differing(dict(four.named_parameters()), dict(six.named_parameters()))


@pytest.mark.parametrize("heads", [(), ("other.*",)])
def test_a_resumed_run_equals_the_uninterrupted_one(heads: Any, tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Path | None = None) -> tuple[Any, ForkMerge]:
        checkpoint = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fork, module = ForkMerge(BRANCHES, every_n_steps=3, heads=heads), Tasks(norm=True)
        run = trainer(tmp_path, [fork, checkpoint], max_epochs=1)
        run.fit(module, repeated(7), validation(), ckpt_path=ckpt_path)
        return module, fork

    whole, first = fit("whole")
    assert len(first.history) == 2
    for step in (1, 3, 5):
        again, second = fit(f"from-{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert not differing(whole, again)
        assert first.history == second.history


def repeated(n: int) -> DataLoader[Any]:
    return DataLoader([next(iter(batches(1)))] * n, batch_size=None)


def test_a_data_module_may_have_images_for_the_merge_alone(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches(2)

        def merge_dataloader(self) -> Any:
            return batches(3, size=2, seed=5)

    module, fork = Tasks(), ForkMerge(BRANCHES, every_n_steps=2)
    trainer(tmp_path, [fork], max_epochs=1).fit(module, datamodule=Data())
    with torch.no_grad():
        losses = [module.target(batch) for batch in batches(3, size=2, seed=5)]
    assert fork.history[0]["score"] == pytest.approx(-torch.stack(losses).mean().item(), rel=1e-5)


def test_a_soup_of_branches_is_the_same_policy(tmp_path: Path) -> None:
    module = Ends()
    soup = Branching(BestMix(Greedy(), previous=False), EveryNSteps(1), 2, score=lambda m, batch: (m.w.sum(), 1))

    class Same(Ends):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.w * (self.w.detach() - self.end("3"))).sum()

    module = Same()
    trainer(tmp_path, [soup], max_epochs=1, precision="64-true").fit(module, steps(1), steps(1))
    assert soup._policy_state["history"][0]["shares"] == [0.5, 0.5]
    assert module.w.tolist() == [0.0, 1.0, 1.0]


# ---- bad input


def test_a_task_that_the_module_never_returned_is_named(tmp_path: Path) -> None:
    fork = ForkMerge({"a": {"target": 1.0}, "b": {"rotation": 1.0}})
    with pytest.raises(ValueError, match=r"weights the task 'rotation', and .* returned losses of 'target', 'helper'"):
        trainer(tmp_path, [fork], max_epochs=1).fit(Tasks(), batches(2), validation())


def test_a_module_without_losses_by_task_is_told_what_to_return(tmp_path: Path) -> None:
    class Plain(Tasks):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.target(batch)

    with pytest.raises(ValueError, match=r"must return \{'losses': \{task: loss, ...\}\}, got Tensor"):
        trainer(tmp_path, [ForkMerge(BRANCHES)], max_epochs=1).fit(Plain(), batches(2), validation())


def test_what_is_needed_to_measure_is_named_at_the_start(tmp_path: Path) -> None:
    class Unmeasured(Tasks):
        @property
        def score_step(self) -> Any:  # type: ignore[override]
            raise AttributeError

    with pytest.raises(ValueError, match=r"define `score_step\(self, batch\)` on Unmeasured"):
        trainer(tmp_path, [ForkMerge(BRANCHES)], max_epochs=1).fit(Unmeasured(), batches(2), validation())
    with pytest.raises(ValueError, match=r"give the Trainer one and a `validation_step`, or define `merge_dataloader"):
        trainer(tmp_path, [ForkMerge(BRANCHES)], max_epochs=1).fit(Tasks(), batches(2))


def test_a_score_that_is_nan_rejects_the_candidate_and_is_said(tmp_path: Path) -> None:
    def score(module: Any, batch: Any) -> tuple[Any, int]:
        value = 1 - (module.w - torch.tensor(BEST, dtype=torch.float64)).square().sum()
        return (value if module.w[1] > 0.65 else value * float("nan")), 1

    fork = ForkMerge({"3": {"3": 1.0}, "0": {"0": 1.0}}, every_n_steps=1, search=Grid(0.1), score=score)
    module = Ends()
    with pytest.warns(UserWarning, match="8 of 12 mixtures of branches were rejected, since their score was a NaN"):
        trainer(tmp_path, [fork], max_epochs=1, precision="64-true").fit(module, steps(1), steps(1))
    assert fork.history[0]["rejected"] == 8
    assert fork.history[0]["shares"] == {"3": 0.7, "0": 0.3}


class Diverging(Tasks):
    """The losses of some branches are NaN in a batch."""

    def __init__(self, poisoned: tuple[str, ...], at: int) -> None:
        super().__init__(norm=True)
        self.poisoned, self.at = poisoned, at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        def loss(name: str) -> Tensor:
            factor = float("nan") if batch_idx == self.at and name in self.poisoned else 1.0
            return factor * (self.auxiliary(batch) if name == "helper" else self.target(batch))

        return {"losses": {name: lambda name=name: loss(name) for name in ("target", "helper")}}


@pytest.mark.parametrize("heads", [(), ("other.*",)])
def test_a_branch_that_diverged_is_no_part_of_the_merge(heads: Any, tmp_path: Path) -> None:
    healthy = Tasks(norm=True)
    alone = ForkMerge({"alone": {"target": 1.0}}, every_n_steps=4)
    trainer(tmp_path, [alone], max_epochs=1).fit(healthy, repeated(4), validation())
    module, fork = Diverging(("helper",), at=2), ForkMerge(BRANCHES, every_n_steps=4, heads=heads)
    with pytest.warns(UserWarning, match=r"branches \[1\] hold a NaN or an infinity after group 4"):
        trainer(tmp_path, [fork], max_epochs=1).fit(module, repeated(4), validation())
    for name, tensor in healthy.trunk.named_parameters():
        torch.testing.assert_close(dict(module.trunk.named_parameters())[name], tensor)
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


@pytest.mark.parametrize("heads", [(), ("other.*",)])
def test_when_all_diverged_training_ends_with_the_last_good_merge_in_model_and_file(heads: Any, tmp_path: Path) -> None:
    def fit(module: Any, epochs: int, n: int) -> tuple[Any, ForkMerge, Any]:
        fork = ForkMerge(BRANCHES, every_n_steps=4, heads=heads)
        run = trainer(tmp_path, [fork, ModelCheckpoint(tmp_path)], max_epochs=epochs)
        run.fit(module, repeated(n), validation())
        return module, fork, run

    good, _, _ = fit(Tasks(norm=True), 1, 4)
    with pytest.warns(UserWarning, match="all 2 branches hold a NaN.*weights of merge 1, the last good one"):
        module, fork, run = fit(Diverging(("target", "helper"), at=5), 3, 8)
    assert run.current_epoch == 1
    assert not differing(dict(good.named_parameters()), dict(module.named_parameters()))
    saved = read(fork.final_path)["state_dict"]
    assert not differing({name: saved[name] for name, _ in good.named_parameters()}, dict(good.named_parameters()))


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Tasks()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="Use automatic optimization"):
        trainer(tmp_path, [ForkMerge(BRANCHES)], max_epochs=1).fit(module, batches(2), validation())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": {}}, "`branches` must name at least one branch and its tasks"),
        ({"branches": {"a": {"t": -1.0}}}, r"task weights of at least 0, one of them more than 0, got \{'t': -1.0\}"),
        ({"branches": {"a": {"t": float("nan")}}}, "task weights of at least 0"),
        ({"branches": {"a": {"t": 0.0}}}, "one of them more than 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        ({"budget": 0}, "`budget` must be at least 1, got 0"),
        ({"min_gain": -0.1}, "`min_gain` must be at least 0"),
        ({"min_gain": 0.1, "previous": False}, "`min_gain` is a margin over the last merge"),
    ],
)
def test_an_argument_of_forkmerge_out_of_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForkMerge(**{"branches": BRANCHES, **arguments})


def test_a_resumed_run_logs_each_merge_once_and_at_the_step_of_the_merge(tmp_path: Path) -> None:
    def logged(folder: str, **kwargs: Any) -> list[tuple[int, float]]:
        logger = Told()
        fork = ForkMerge({"3": {"3": 1.0}, "0": {"0": 1.0}}, every_n_steps=3)
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        run = trainer(tmp_path / folder, [fork, keep], max_epochs=3, logger=logger, enable_checkpointing=True)
        run.fit(Ends().float(), steps(4), steps(1), **kwargs)
        return logger.merges

    whole = logged("whole")
    assert [step for step, _ in whole] == [3, 6, 9, 12]
    for saved, after in ((4, 3), (8, 6)):
        resumed = logged(f"again{saved}", ckpt_path=tmp_path / "whole" / f"step={saved}.ckpt")
        assert resumed == [each for each in whole if each[0] > after]


class Told(Logger):
    """Keeps the step and the first share of what it is told of merges."""

    name, version = "told", 0

    def __init__(self) -> None:
        super().__init__()
        self.merges: list[tuple[int, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "forkmerge/3" in metrics and step is not None:
            self.merges.append((step, metrics["forkmerge/3"]))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass
