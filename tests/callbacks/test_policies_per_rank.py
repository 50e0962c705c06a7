"""Every policy with a branch in each of two processes: what the same branches do in turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from processes import launch
from tiny import NetParts, batches, differing, of, trainer, validation, values
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.branches import Combine, FedAtt, FedFisher, Nova, Pairs, SoftmaxOfScores, WeightedAverage
from lightning_merge.callbacks import DART, PAPA, WARP, WASH, Branching, BranchStrategy, DiLoCo, ForkMerge, LocalSGD
from lightning_merge.combiners import SLERP, ModelStock
from lightning_merge.schedules import EveryNSteps
from lightning_merge.search import Greedy
from lightning_merge.selections import Selection

pytestmark = pytest.mark.multiprocess

BENDS = [lambda batch: batch, lambda batch: [batch[0] + 0.3 * batch[0].square(), batch[1]]]
OWN: dict[str, Any] = {"augmentations": BENDS, "batches": "same"}


def mixed(policy: Any) -> Branching:
    return Branching(policy, EveryNSteps(3), 2, **OWN)


CALLBACKS: dict[str, Callable[[], Branching]] = {
    "papa": lambda: PAPA(2, 2, pull=0.2, **OWN),
    "wash": lambda: WASH(2, share=0.5, **OWN),
    "dart": lambda: DART(2, 3, start=2, **OWN),
    "local sgd": lambda: LocalSGD(2, 3, start=2, **OWN),
    "diloco": lambda: DiLoCo(2, 3, **OWN),
    "streaming diloco": lambda: DiLoCo(2, 4, fragments=2, delay=3, mix=0.5, bits=8, **OWN),
    "forkmerge": lambda: ForkMerge({"alone": {"fit": 1.0}, "joint": {"fit": 1.0, "shrink": 0.1}}, 3),
    "pairs": lambda: mixed(Pairs()),
    "warp": lambda: mixed(Combine(SLERP(scale=0.3))),
    "model stock": lambda: mixed(Combine(ModelStock(), base="start")),
    "lm-cocktail": lambda: mixed(SoftmaxOfScores(temperature=0.1)),
    "fedavg": lambda: mixed(WeightedAverage((1, 3))),
    "fednova": lambda: mixed(Nova((1, 3))),
    "fedatt": lambda: mixed(FedAtt(step=0.9)),
    "fedfisher": lambda: mixed(FedFisher((1, 3), iterations=50)),
    "own batches": lambda: Branching(Nova((1, 3)), EveryNSteps(3), 2, batches="own"),
    "greedy": lambda: ForkMerge({"alone": {"fit": 1.0}, "joint": {"fit": 1.0, "shrink": 0.1}}, 3, Greedy()),
}


class TasksParts(NetParts):
    """A task, another one that shrinks the outputs, and a score."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"loss": loss, "losses": {"fit": loss, "shrink": lambda: self(batch[0]).square().mean()}}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def score_step(self, batch: list[Tensor]) -> tuple[Tensor, int]:
        return -nn.functional.mse_loss(self(batch[0]), batch[1], reduction="sum"), len(batch[0])


class AdamParts(TasksParts):
    """The same with second moments."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A gradient that is 0 up to rounding, as of a bias before BatchNorm, is no step.
        return torch.optim.Adam(self.parameters(), lr=self.lr, eps=0.1)


def fit(root: Path, name: str, **settings: Any) -> dict[str, Any]:
    """A run; what it published, the branches that are here, and what was measured."""
    parts = AdamParts if name == "fedfisher" else TasksParts
    module, branching = of(parts)(norm=True, lr=0.05), CALLBACKS[name]()
    own = branching.batches == "own"
    data = CombinedLoader([batches(8), batches(5, size=3, seed=4)], "max_size_cycle") if own else batches(8)
    run = trainer(root / name, [branching], max_epochs=1, use_distributed_sampler=False, **settings)
    run.fit(module, data, validation())
    assert branching.merges >= 2
    raw, own = branching.raw_weights(), branching._running.branches
    here = {j: {name: raw[name] for name in own.live} if j == own.active else values(own.weights(j)) for j in own.own}
    return {"end": values(module), "branches": here, "loss": run.callback_metrics["val/loss"].item()}


def every_policy(root: Path) -> dict[str, Any]:
    """In each of two processes."""
    return {
        name: fit(root, name, strategy=BranchStrategy(process_group_backend="gloo"), devices=2) for name in CALLBACKS
    } | {
        "own steps": own_steps(root),
        "heads": heads_in_processes(root / "heads"),
        "refused": [
            refusal(root, callback) for callback in (UNSELECTED, WARP(every_n_steps=2), CALLBACKS["own batches"]())
        ],
    }


def own_steps(root: Path) -> int:
    """Steps of an epoch where Lightning divides data among processes, as it does unless told not to."""
    strategy = BranchStrategy(process_group_backend="gloo")
    run = trainer(root, [CALLBACKS["own batches"]()], strategy=strategy, devices=2, max_epochs=1)
    run.fit(of(TasksParts)(), [batches(4), batches(4)])
    return int(run.global_step)


UNSELECTED = LocalSGD(2, selection=Selection(exclude=("net.2.*",)))


def refusal(root: Path, callback: Branching) -> str:
    strategy = BranchStrategy(process_group_backend="gloo")
    run = trainer(root, [callback], strategy=strategy, devices=2, max_epochs=1)
    data = CombinedLoader([batches(2), batches(3)], "max_size") if callback.batches == "own" else batches(2)
    with pytest.raises(ValueError, match=r"is not selected|in one process|would wait") as caught:
        run.fit(of(TasksParts)(), data, validation())
    return str(caught.value)


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(2, every_policy, tmp_path_factory.mktemp("ranks"))


def test_no_other_process_takes_a_share_of_a_branchs_own_data(in_processes: list[dict[str, Any]]) -> None:
    assert [each["own steps"] for each in in_processes] == [4, 4]


@pytest.mark.parametrize("name", CALLBACKS)
def test_processes_do_what_branches_in_turn_do(name: str, in_processes: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = fit(tmp_path, name)
    for branch, each in enumerate(in_processes):
        found = each[name]
        assert found["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        for expected, tensors in ((alone["end"], found["end"]), (alone["branches"][branch], found["branches"][branch])):
            assert expected
            assert expected.keys() == tensors.keys()
            for key, tensor in expected.items():
                if tensor.is_floating_point():  # branches in turn that share buffers count all batches
                    torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-6)


def test_what_processes_cannot_share_is_refused_with_what_to_do(in_processes: list[dict[str, Any]]) -> None:
    for each in in_processes:
        unselected, anchors, waiting = each["refused"]
        assert "`net.2.weight` trains and is not selected" in unselected
        assert "Select or freeze it, or train the branches in turn" in unselected
        assert "WARP 'warp' keeps the anchors of all branches in one process. Use a single device" in anchors
        assert "a process whose loader is through would wait without a step under mode 'max_size'" in waiting


# ---- heads of auxiliary tasks


class HeadParts(TasksParts):
    """The other task has a head of its own."""

    def __init__(self) -> None:
        super().__init__(lr=0.05)
        self.head = nn.Linear(8, 1)
        nn.init.constant_(self.head.weight, 0.1)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        def square() -> Tensor:
            return nn.functional.mse_loss(self.head(self.net[:2](batch[0])), batch[1].square())

        return {"losses": {"fit": self.loss(batch), "square": square}}


def fit_with_head(root: Path, ckpt_path: Path | None = None, **settings: Any) -> dict[str, Tensor]:
    """Merges after 3, 6 and 9 steps; files after 4 and after the second merge."""
    fork = ForkMerge({"alone": {"fit": 1.0}, "joint": {"fit": 1.0, "square": 1.0}}, 3, heads=["head.*"])
    files = [ModelCheckpoint(root, f"at{n}", every_n_train_steps=n, save_top_k=-1) for n in (4, 6)]
    run = trainer(root, [fork, *files], max_epochs=1, use_distributed_sampler=False, **settings)
    module = of(HeadParts)()
    # The same batch over and over: Lightning starts a plain loader again.
    data = DataLoader([next(iter(batches(1)))] * 9, batch_size=None)
    run.fit(module, data, validation(), ckpt_path=ckpt_path)
    assert len(fork.history) == 3
    return values(module)


def heads_in_processes(root: Path) -> dict[str, Any]:
    def fit(folder: str, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        strategy = BranchStrategy(process_group_backend="gloo")
        return fit_with_head(root / folder, ckpt_path, strategy=strategy, devices=2)

    file = {n: root / "whole" / f"at{n}.ckpt" for n in (4, 6)}
    return {"file": file[4], "whole": fit("whole"), "again": {n: fit(f"again{n}", file[n]) for n in (4, 6)}}


def test_each_process_trains_the_heads_of_its_tasks_and_goes_on_with_them(
    in_processes: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, second = (each["heads"] for each in in_processes)
    alone = fit_with_head(tmp_path / "in turn")
    for name, tensor in alone.items():
        if not name.startswith("head"):
            torch.testing.assert_close(first["whole"][name], tensor, rtol=0, atol=1e-6)
        torch.testing.assert_close(second["whole"][name], tensor, rtol=0, atol=1e-6)
    assert first["whole"]["head.bias"].item() == 0.0  # no task of the first branch has it
    for each in (first, second):
        for again in each["again"].values():
            assert not differing(each["whole"], again)
    with pytest.raises(ValueError, match=r"branches in turn share `head.weight`.*strategy=BranchStrategy\(\)"):
        fit_with_head(tmp_path, first["file"])
