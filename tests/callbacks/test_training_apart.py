"""Two processes whose weights are not the same: one set is measured, saved and published, or it is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from processes import launch
from ranks import Wide, WideParts, ddp, fit, loaders
from tiny import of
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lightning_merge.callbacks import (
    EMA,
    LAWA,
    SWAD,
    TWA,
    AcceptIfBetter,
    BranchStrategy,
    Doctor,
    LocalSGD,
    OnlineMerging,
)
from lightning_merge.selections import Selection

pytestmark = pytest.mark.multiprocess


class Unsent(DDPStrategy):
    """Its hook hands every process its own gradients back."""

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(None, noop_hook)


class LeftOutParts(WideParts):
    """DDP is told to leave its last layer alone."""

    def __init__(self) -> None:
        super().__init__()
        names = [name for name, _ in self.named_parameters() if name.startswith("net.2")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)


class StepsOfItsOwn(Callback):
    """Moves the weights of a process by what no other one does."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        with torch.no_grad():
            pl_module.net[0].bias.add_(0.01 * (1 + int(os.environ["RANK"])))


def branches() -> BranchStrategy:
    return BranchStrategy(process_group_backend="gloo")


HOW: dict[str, tuple[Any, Any, list[Any]]] = {
    "a hook that sends nothing": (Wide, lambda: Unsent(process_group_backend="gloo"), []),
    "a layer that DDP leaves out": (of(LeftOutParts), ddp, []),
    "a callback that writes": (Wide, ddp, [StepsOfItsOwn()]),
    "a branch per process": (Wide, branches, [LocalSGD(branches=2, every_n_steps=3, validate="both")]),
}
"""Ways to train apart: module, strategy and callbacks."""

WHAT: dict[str, tuple[Any, str]] = {
    "ema": (lambda: [EMA(0.5)], "ema/val/loss"),
    "ema of a part": (lambda: [EMA(0.5, selection=Selection(exclude=("net.2.*",)))], "ema/val/loss"),
    "window": (lambda: [LAWA(k=2, every_n_steps=1)], "lawa/val/loss"),
    "raw": (lambda: [EMA(0.5, validate="both")], "raw/val/loss"),
    "swad": (lambda: [SWAD("val/loss", n_converge=1, n_tolerance=3)], "val/loss"),
    "judged": (lambda: [EMA(0.5), AcceptIfBetter("val/loss", mode="max", shares=(0.0, 0.5))], "val/loss"),
    "examined": (lambda: [EMA(0.5), Doctor(points=1)], "ema/val/loss"),
}
"""Callbacks, and the metric that chooses files."""


def score(path: str) -> float:
    module = Wide()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        return torch.stack([module.loss(batch) for batch in loaders()[1]]).mean().item()


def one_fit(root: Path, how: str, what: str) -> dict[str, Any]:
    kind, strategy, others = HOW[how]
    make, monitor = WHAT[what]
    ours, module = make(), kind()
    average = ours[0]
    if how != "a branch per process":
        monitor = monitor.removeprefix("ema/").removeprefix("lawa/")
    best = ModelCheckpoint(root / how / what, monitor=monitor)
    fit(root, [*others, *ours, best], module, strategy(), max_epochs=2)
    found = {
        "recorded": (float(best.best_model_score), score(best.best_model_path)),
        "model": {name: t.tolist() for name, t in module.state_dict().items()},
        "average": {name: t.tolist() for name, t in (average.merged_weights() or {}).items()},
    }
    if average.final_path is not None and "val/loss" in average.final_metrics:
        found["final"] = average.final_metrics["val/loss"], score(average.final_path)
    return found


def work(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {f"{what}, {how}": one_fit(root, how, what) for how in HOW for what in WHAT}
    for key, epochs, path in (("one", 1, None), ("again", 2, root / "one.ckpt"), ("whole", 2, None)):
        ema, files = EMA(0.9), [ModelCheckpoint(root, "one")] if key == "one" else [ModelCheckpoint(root / "other")]
        fit(root, [LocalSGD(branches=2, every_n_steps=3), ema, *files], Wide(), branches(), path, max_epochs=epochs)
        found[key] = [t.tolist() for t in (*(ema.merged_weights() or {}).values(), *ema.raw_weights().values())]
    twa = TWA(every=2, stage=6, lr=0.05)
    fit(root, [twa], Wide(), Unsent(process_group_backend="gloo"), max_epochs=4)
    found["twa"] = {name: t.tolist() for name, t in (twa.merged_weights() or {}).items()}
    try:
        fit(root, [LocalSGD(branches=2)], Wide(), Unsent(process_group_backend="gloo"), max_epochs=1)
    except ValueError as error:
        found["in turn"] = str(error)
    start = {name: torch.zeros_like(p) for name, p in Wide().named_parameters()}
    for callback in (OnlineMerging(pretrained=start, alpha=0.1), LocalSGD(branches=2)):
        module = Wide()
        module.configure_optimizers = lambda net=module: ZeroRedundancyOptimizer(
            net.parameters(), torch.optim.SGD, lr=0.1
        )
        try:
            fit(root, [callback], module, ddp(), max_epochs=1)
        except ValueError as error:
            found[type(callback).__name__] = str(error), module.trainer.global_step
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return launch(2, work, tmp_path_factory.mktemp("apart"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", WHAT)
def test_one_set_is_measured_saved_and_published(what: str, how: str, found: list[dict[str, Any]]) -> None:
    first, second = (each[f"{what}, {how}"] for each in found)
    recorded, scored = first["recorded"]
    assert recorded == pytest.approx(scored, rel=1e-5)
    assert first["average"] == second["average"]
    assert first["model"] == second["model"]
    if "final" in first:
        assert first["final"][0] == pytest.approx(first["final"][1], rel=1e-5)


def test_an_average_of_branches_goes_on_in_every_process(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["again"] == each["whole"] != each["one"]


def test_processes_that_share_a_subspace_train_one_model_in_it(found: list[dict[str, Any]]) -> None:
    assert found[0]["twa"] == found[1]["twa"]


def test_branches_in_turn_are_refused_by_name(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "LocalSGD 'localsgd' merges weights that are the same in all processes, and `net." in each["in turn"]
        assert "take an average" in each["in turn"]


@pytest.mark.parametrize("owner", ["OnlineMerging", "LocalSGD"])
def test_an_optimizer_whose_state_is_divided_is_refused_before_training(
    owner: str, found: list[dict[str, Any]]
) -> None:
    for each in found:
        message, steps = each[owner]
        assert "ZeroRedundancyOptimizer divides them and its state among processes. Use the optimizer" in message
        assert steps == 0
