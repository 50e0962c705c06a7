"""One branch per process: the branches that take turns in one, with one flat model communicated per merge."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny import NetParts, batches, differing, of, trainer, validation, values
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_merge.branches import Average, Branches, Policy
from lightning_merge.callbacks import Branching, BranchStrategy, Lookaround
from lightning_merge.schedules import EveryNSteps
from lightning_merge.weights import State

pytestmark = pytest.mark.multiprocess


def bent(by: float) -> Any:
    return lambda batch: [batch[0] + by * batch[0].square(), batch[1]]


BENDS = [bent(0.3 * branch) for branch in range(4)]


class AdamParts(NetParts):
    """Adaptive moments, so that optimizer states differ; the metric is reduced over processes."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A bias before BatchNorm has no gradient but rounding, which a small epsilon makes into steps.
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)


class Pull(Policy):
    """Part of the way to the mean, the last branch not at all: rows that have no common part."""

    def merge(self, state: State, branches: Branches) -> None:
        k = branches.count
        rows = [[0.9 * (i == j) + 0.1 / k for i in range(k)] for j in range(k - 1)]
        branches.mix([*rows, [float(i == k - 1) for i in range(k)]])


class Witness(Callback):
    """Writes down, in each process, its weights after every batch and what was communicated for merging."""

    def __init__(self, root: Path, branching: Branching) -> None:
        self.root = root
        self.branching = branching
        self.found: dict[str, Any] = {"path": [], "sent": []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.merge = self.branching._running.merge
        self.branching._running.merge = self.counted  # type: ignore[method-assign]

    def counted(self, *args: Any) -> None:
        sent: list[int] = []
        whole = dist.all_reduce

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.append(tensor.numel() * tensor.element_size())
            return whole(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        try:
            self.merge(*args)
        finally:
            dist.all_reduce = whole
        self.found["sent"] += sent

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.found["path"].append(values(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["end"] = values(pl_module)
        self.found["state"] = trainer.optimizers[0].state_dict()["state"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.found["metrics"] = dict(trainer.callback_metrics)
        self.found["raw"] = values(self.branching.raw_weights())
        torch.save(self.found, self.root / f"rank{trainer.global_rank}.pt")


def ranks(
    root: Path, processes: int, branching: Branching, ckpt_path: Path | None = None, data: Any = None, **settings: Any
) -> Any:
    """Forked processes; what each saw."""
    root.mkdir(exist_ok=True)
    strategy = BranchStrategy(start_method="fork", process_group_backend="gloo")
    files = ModelCheckpoint(root, "{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [branching, files, Witness(root, branching)]
    fit = trainer(root, callbacks, strategy=strategy, devices=processes, **{"max_epochs": 1, **settings})
    fit.fit(of(AdamParts)(norm=True), data or batches(8), validation(), ckpt_path=ckpt_path)
    return [torch.load(root / f"rank{rank}.pt") for rank in range(processes)]


WHOLE = {"use_distributed_sampler": False}  # Lightning's sampler shuffles


def in_turn(root: Path, branching: Branching) -> tuple[Any, Any]:
    module = of(AdamParts)(norm=True)
    run = trainer(root, [branching], max_epochs=1)
    run.fit(module, batches(8), validation())
    return module, run


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert left
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_train_what_branches_in_turn_train(count: int, tmp_path: Path) -> None:
    def lookaround() -> Lookaround:
        return Lookaround(count, 3, BENDS[:count], buffers="average", optimizer_state="average")

    alone = lookaround()
    module, run = in_turn(tmp_path, alone)
    found = ranks(tmp_path / "ranks", count, lookaround(), **WHOLE)
    raw, own = alone.raw_weights(), alone._running.branches
    for branch, each in enumerate(found):
        mine = {name: raw[name] for name in own.live} if branch == own.active else own.weights(branch)
        close({name: t for name, t in mine.items() if t.is_floating_point()}, each["raw"])
        close({name: t for name, t in module.state_dict().items() if t.is_floating_point()}, each["end"])
        assert each["metrics"]["val/loss"].item() == pytest.approx(run.callback_metrics["val/loss"].item(), abs=1e-6)
    first, second = found[:2]
    merged_at = [not differing(a, b) for a, b in zip(first["path"], second["path"], strict=True)]
    assert merged_at == [False, False, True, False, False, True, False, False]


def test_a_merge_communicates_one_flat_model(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, 2, Lookaround(2, 3, BENDS[:2]))
    numbers = sum(parameter.numel() for parameter in of(AdamParts)(norm=True).parameters())
    assert first["sent"] == second["sent"] == [4 * numbers] * 2


def test_a_matrix_without_a_common_row_mixes_as_in_turn(tmp_path: Path) -> None:
    def branching() -> Branching:
        return Branching(Pull(), EveryNSteps(2), 3, augmentations=BENDS[:3], buffers="recompute")

    alone = branching()
    in_turn(tmp_path, alone)
    found = ranks(tmp_path / "ranks", 3, branching(), **WHOLE)
    for branch in range(2):
        close(alone._running.branches.weights(branch), found[branch]["raw"])


def test_a_resumed_run_equals_the_uninterrupted_one_in_every_process(tmp_path: Path) -> None:
    # The same batch over and over: Lightning starts a plain loader again.
    data = DataLoader([next(iter(batches(1)))] * 8, batch_size=None)

    def fit(folder: str, ckpt_path: Path | None = None) -> Any:
        lookaround = Lookaround(2, 4, BENDS[:2], buffers="average")
        return ranks(tmp_path / folder, 2, lookaround, ckpt_path, data, **WHOLE)

    whole = fit("whole")
    for step in (3, 6):
        for once, twice in zip(whole, fit(f"again{step}", tmp_path / "whole" / f"step={step}.ckpt"), strict=True):
            assert len(twice["path"]) == 8 - step
            assert not differing(once["end"], twice["end"])
            for number, state in once["state"].items():
                assert not differing(state, twice["state"][number])


def test_a_group_of_processes_trains_each_branch(tmp_path: Path) -> None:
    found = ranks(tmp_path, 4, Branching(Average(), EveryNSteps(2), 2, batches="turns"), max_epochs=2)
    # Two batches per process and epoch; gradients are synchronised within a branch, weights across at the merge.
    assert len(found[0]["path"]) == 4
    parameters = [name for name in found[0]["raw"] if "running" not in name and "num_batches" not in name]
    for step in range(4):
        own = [{name: each["path"][step][name] for name in parameters} for each in found]
        assert not differing(own[0], own[1])
        assert not differing(own[2], own[3])
        assert bool(differing(own[0], own[2])) == (step % 2 == 0)


def test_branches_in_turn_under_ddp_stay_equal_in_all_processes(tmp_path: Path) -> None:
    lookaround = Lookaround(2, 2, BENDS[:2])
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    run = trainer(tmp_path, [lookaround, Witness(tmp_path, lookaround)], strategy=strategy, devices=2, max_epochs=2)
    run.fit(of(AdamParts)(norm=True), batches(10), validation())
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    parameters = [name for name in first["raw"] if "running" not in name]
    for one, other in zip(first["path"], second["path"], strict=True):
        assert not differing({name: one[name] for name in parameters}, {name: other[name] for name in parameters})
    assert not differing(first["end"], second["end"])
    assert first["metrics"]["val/loss"] == second["metrics"]["val/loss"]


def test_processes_that_branches_do_not_divide_are_refused(tmp_path: Path) -> None:
    strategy = BranchStrategy(start_method="fork", process_group_backend="gloo")
    run = trainer(tmp_path, [Lookaround(3, 2)], strategy=strategy, devices=2, max_epochs=1)
    with pytest.raises(Exception, match="must be a multiple of the 3 branches, got 2"):
        run.fit(of(AdamParts)(), batches(2))
