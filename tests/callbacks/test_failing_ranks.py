"""Several processes of which one goes wrong: no silent difference, no hang, raw weights live, and the run goes on."""

import os
import random
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch, start, wait
from ranks import Sharded, ShardedParts, Wide, ddp, fit, fsdp2, loaders, together, whole
from tiny import differing, of, trainer
from torch import Tensor, nn

from lightning_merge.branches import Average
from lightning_merge.callbacks import (
    EMA,
    LAWA,
    SMA,
    SWAD,
    TWA,
    AcceptIfBetter,
    Branching,
    Doctor,
    Interpolate,
    League,
    PostHocEMA,
    WeightMerging,
)
from lightning_merge.files._sharded import check_parts, is_sharded_checkpoint
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection
from lightning_merge.weights import mean_over_ranks_

pytestmark = pytest.mark.multiprocess

STRATEGIES = {"ddp": (Wide, ddp), "fsdp2": (Sharded, fsdp2)}


def rank() -> int:
    return int(os.environ["RANK"])


def error_of(root: Path, callbacks: list[Any], module: Any, strategy: Any, **settings: Any) -> str:
    try:
        fit(root, callbacks, module, strategy, max_epochs=1, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class NanInOneShard(Callback):
    """Of the last layer the first process has all and the second nothing."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and rank() == 0:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = float("nan")


class PartialParts(ShardedParts):
    """A parameter of which each process holds a summand."""

    def configure_model(self) -> None:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.placement_types import Partial

        super().configure_model()
        mesh = self.device_mesh["data_parallel"]
        self.summand = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]), requires_grad=False)


class UnsyncedParts(ShardedParts):
    """Its validation loss differs between processes, which see different samples."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch) + rank() * (batch_idx + self.global_step) % 3, sync_dist=False)


def mistakes(root: Path) -> dict[str, Any]:
    first = rank() == 0
    disagreements = {
        "rule": [EMA(decay=0.9 if first else 0.99)],
        "schedule": [WeightMerging(Mean(), EveryNSteps(2 if first else 3))],
        "selection": [EMA(selection=Selection(exclude=() if first else ("net.0.*",)))],
        "validate": [EMA(validate="both" if first else "merged")],
        "mode": [SMA("val/loss", mode="min" if first else "max")],
        "shares": [EMA(), AcceptIfBetter("val/loss", shares=(0.5,) if first else (0.0, 0.5))],
        "monitor": [League([EMA()], "val/loss" if first else "val/acc")],
        "its averages": [EMA()] if first else [EMA(), LAWA(k=2)],
    }
    found = {
        f"{strategy} {field}": error_of(root, callbacks, kind(), how())
        for strategy, (kind, how) in STRATEGIES.items()
        for field, callbacks in disagreements.items()
    }
    names = ("a", "b") if first else ("b", "a")
    found["mean"] = {name: torch.full((1,), 10.0 * (name == "a") + rank()) for name in names}
    mean_over_ranks_(found["mean"])
    found["partial"] = error_of(root, [EMA()], of(PartialParts)(), fsdp2())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process warns, which the settings of the tests make an error
        found["nan"] = error_of(root, [EMA(), NanInOneShard()], Sharded(), fsdp2())
    found["twa"] = error_of(root, [TWA()], Sharded(), fsdp2())
    found["doctor"] = error_of(root, [EMA(), Doctor()], Sharded(), fsdp2())
    found["branches"] = error_of(root, [Branching(Average(), branches=2)], Sharded(), fsdp2())
    found["anchor"] = error_of(root, [Interpolate(anchor=str(root / "anchor.pt"))], Sharded(), fsdp2())
    windows = {"LAWA": LAWA(k=2, store="disk", directory=str(root)), "PostHocEMA": PostHocEMA(directory=root)}
    found["disk"] = {name: error_of(root, [window], Wide(), ddp()) for name, window in windows.items()}
    for name, (kind, how) in {"ddp": (UnsyncedParts, ddp), "fsdp2": (UnsyncedParts, fsdp2)}.items():
        swad = SWAD("val/loss", n_converge=1, n_tolerance=2, validate="both")
        run = fit(root, [swad], of(kind)(), how(), max_epochs=6, val_check_interval=0.25)
        metric = float(run.callback_metrics["val/loss"])
        found[f"{name} unsynced"] = (swad.rule.interval(swad._state), run.global_step, metric)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return launch(2, mistakes, tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "field", ["rule", "schedule", "selection", "validate", "mode", "shares", "monitor", "its averages"]
)
def test_processes_that_are_set_up_differently_are_told_the_field(
    strategy: str, field: str, found: list[dict[str, Any]]
) -> None:
    for each in found:
        message = each[f"{strategy} {field}"]
        assert message.startswith("RuntimeError: the processes of this run disagree on ")
        assert field in message.partition(":")[2].partition("rank 0 has")[0]
        assert "rank 1 has" in message


def test_a_mean_over_processes_pairs_tensors_by_name(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert {name: t.item() for name, t in each["mean"].items()} == {"a": 10.5, "b": 0.5}


def test_a_summand_is_refused_by_name(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "`summand` is placed as" in each["partial"]
        assert "Place it as Shard or Replicate" in each["partial"]


def test_a_nan_in_the_shard_of_one_process_is_an_error_in_all(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "disagree on how often EMA 'ema' " in each["nan"]
        assert "Resume from an earlier checkpoint" in each["nan"]


def test_what_needs_whole_parameters_is_refused_on_parts_of_them(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "`net.0.weight` is sharded" in each["doctor"]
        assert "TWA 'twa' needs whole parameters, and `net.0.weight` is sharded" in each["twa"]
        assert "needs whole parameters, and ModelParallelStrategy shards them" in each["branches"]
        assert "Interpolate 'interpolated' needs whole parameters, and `net.0.weight` is sharded" in each["anchor"]


def test_weights_kept_on_disk_are_refused_with_several_processes(found: list[dict[str, Any]]) -> None:
    for each in found:
        for name, cure in (("LAWA", "store='cpu'"), ("PostHocEMA", "no `directory`")):
            assert f"{name} " in each["disk"][name]
            assert cure in each["disk"][name]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_decide_alike_on_a_metric_that_differs_between_them(
    strategy: str, found: list[dict[str, Any]]
) -> None:
    (interval, steps, metric), (other_interval, other_steps, other_metric) = (
        each[f"{strategy} unsynced"] for each in found
    )
    assert metric != other_metric
    assert (interval, steps) == (other_interval, other_steps)
    assert interval is not None


# ---- one process raises in validation


class BreaksParts(ShardedParts):
    """The second process meets a batch that it cannot read, in the second validation, of merged weights."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if rank() == 1 and self.current_epoch == 1 and batch_idx == 1:
            raise OSError("a batch cannot be read")
        super().validation_step(batch, batch_idx)


class LastRaw(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.weights = {name: local(p).clone() for name, p in pl_module.named_parameters()}


def local(tensor: Any) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def breaks(root: Path, strategy: str) -> None:
    module, last = of(BreaksParts)(), LastRaw()
    found: dict[str, Any] = {"error": "none"}
    try:
        fit(root, [EMA(decay=0.8), last], module, STRATEGIES[strategy][1](), max_epochs=3)
    except BaseException as error:
        found = {"error": f"{error}", "notes": getattr(error, "__notes__", [])}
    found["live"] = {name: local(p).clone() for name, p in module.named_parameters()}
    found["raw"] = last.weights
    torch.save(found, root / f"rank{rank()}.pt")
    os._exit(0)  # as after an error: without a word to the others


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_that_raises_in_validation_leaves_raw_weights_in_all_and_none_hangs(
    strategy: str, tmp_path: Path
) -> None:
    wait(start(2, breaks, tmp_path, strategy), seconds=45)
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert found[1]["error"] == "a batch cannot be read"
    assert found[0]["error"] != "none"
    for each in found:
        assert not differing(each["live"], each["raw"])
        assert "raw weights are in place" in each["notes"][-1]
        assert "another process" in each["notes"][-1]


# ---- killed


class Killer(Callback):
    """Kills some processes at a step, in the middle of what the others wait for."""

    def __init__(self, step: int, ranks: tuple[int, ...]) -> None:
        self.step = step
        self.ranks = ranks

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == self.step and rank() in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)


def run(root: Path, strategy: str, killer: Killer | None) -> dict[str, Any]:
    kind, how = STRATEGIES[strategy]
    averages = [EMA(decay=0.8, validate="both"), LAWA(k=2, every_n_steps=2)]
    files = ModelCheckpoint(root, "{epoch}", save_top_k=-1)
    module = kind()
    callbacks = [*averages, files, *([killer] if killer else [])]
    newest = [path for path in sorted(root.glob("epoch=*.ckpt"), reverse=True) if is_complete(path)][:1]
    fit(root, callbacks, module, how(), ckpt_path=newest[0] if newest else None, max_epochs=3)
    return {
        "resumed": bool(newest),
        "module": whole(module),
        "raw": together(averages[0], averages[0].raw_weights()),
        "merged": [together(average, average.merged_weights()) for average in averages],
        "counters": [(a.updates, a.steps, a.evaluations, a.update_window) for a in averages],
    }


def is_complete(path: Path) -> bool:
    try:
        if is_sharded_checkpoint(path):
            check_parts(path)
    except ValueError:
        return False
    return path.is_file() or is_sharded_checkpoint(path)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    return {strategy: tmp_path_factory.mktemp(strategy) for strategy in STRATEGIES}


@pytest.fixture(scope="module")
def uninterrupted(roots: dict[str, Path]) -> dict[str, list[Any]]:
    return {strategy: launch(2, run, roots[strategy], strategy, None) for strategy in STRATEGIES}


@pytest.mark.parametrize("who", ["one", "both"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_whose_processes_are_killed_goes_on_bit_for_bit(
    strategy: str, who: str, uninterrupted: dict[str, list[Any]], tmp_path: Path
) -> None:
    chance = random.Random(f"{strategy}-{who}-{os.environ.get('SEED', 0)}")
    killed = (chance.randrange(2),) if who == "one" else (0, 1)
    processes = start(2, run, tmp_path, strategy, Killer(chance.randrange(4, 12), killed))
    wait(processes, seconds=60)
    assert all(processes[rank].exitcode == -signal.SIGKILL for rank in killed)
    assert all(process.exitcode for process in processes)  # nobody went on alone
    for resumed, expected in zip(launch(2, run, tmp_path, strategy, None), uninterrupted[strategy], strict=True):
        assert resumed["resumed"]
        assert not expected["resumed"]
        assert resumed["counters"] == expected["counters"]
        for left, right in zip(
            [resumed["module"], resumed["raw"], *resumed["merged"]],
            [expected["module"], expected["raw"], *expected["merged"]],
            strict=True,
        ):
            assert not differing(left, right)


# ---- parts of a checkpoint are missing


@pytest.fixture(scope="module")
def sharded_checkpoint(roots: dict[str, Path], uninterrupted: dict[str, list[Any]]) -> Path:
    return roots["fsdp2"] / "epoch=2.ckpt"


@pytest.mark.parametrize("part", [".metadata", "meta.pt", "__1_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_a_sharded_checkpoint_without_a_part_names_it(
    how: str, part: str, sharded_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy.ckpt"
    shutil.copytree(sharded_checkpoint, folder)
    check_parts(folder)
    if how == "missing":
        (folder / part).unlink()
    else:
        (folder / part).write_bytes(b"" if part != "__1_0.distcp" else (folder / part).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"lacks parts, or they were cut short: {re.escape(part)}\.") as error:
        check_parts(folder)
    assert "use an earlier checkpoint" in str(error.value)
    with pytest.raises(ValueError, match=re.escape(part)):
        trainer(tmp_path, [EMA()]).fit(Wide(), *loaders(), ckpt_path=folder)


def test_one_device_is_told_how_to_use_a_sharded_checkpoint(sharded_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a sharded checkpoint.*lightning-merge export .*epoch=2.ckpt merged.pt"):
        trainer(tmp_path, [EMA()]).fit(Wide(), *loaders(), ckpt_path=sharded_checkpoint)
