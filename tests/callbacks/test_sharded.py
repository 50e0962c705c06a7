"""FSDP2, tensor parallelism and both: averages of parts equal averages of the whole, and files go on anywhere."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch
from ranks import Even, Sharded, Wide, ddp, fit, fsdp2, loaders, together, whole
from test_health import Rows
from tiny import differing, trainer
from torch import Tensor

from lightning_merge.callbacks import (
    ASWA,
    BEMA,
    EMA,
    LAWA,
    SMA,
    SWA,
    SWAD,
    Anneal,
    BestK,
    Interpolate,
    PostHocEMA,
    WeightMerging,
    teacher,
)
from lightning_merge.diagnostics import distance
from lightning_merge.rules import ExponentialMean, Mean, WindowMean

pytestmark = pytest.mark.multiprocess


class Witness(Callback):
    """Puts together, at every step and validation, what the processes hold."""

    def __init__(self, average: WeightMerging) -> None:
        self.average = average
        self.path: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.started: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.append(whole(pl_module))
        for average in trainer.callbacks:
            if isinstance(average, WeightMerging) and average.ready:
                self.started[average.name] = together(average, average.merged_weights())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.path.append(whole(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(whole(pl_module))


class Collectives(Callback):
    """Counts the collectives while weights are taken in, and while merged ones are put in place and taken out."""

    def __init__(self) -> None:
        self.counts = {"exchange": 0, "whole": 0}
        self.updates: dict[str, list[int]] = {}  # of each average, how many in each

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from torch.distributed.tensor.debug import CommDebugMode

        def counted(average: WeightMerging) -> Any:
            take_in = average.take_in

            def take_in_and_count(*args: Any) -> None:
                with CommDebugMode() as mode:
                    take_in(*args)
                self.updates.setdefault(average.name, []).append(mode.get_total_counts())

            return take_in_and_count

        for average in trainer.callbacks:
            if isinstance(average, WeightMerging):
                average.take_in = counted(average)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from torch.distributed.tensor.debug import CommDebugMode

        average = next(callback for callback in trainer.callbacks if isinstance(callback, WeightMerging))
        with CommDebugMode() as mode, average._publisher.swapped(average):
            pass
        self.counts["exchange"] = mode.get_total_counts()
        with CommDebugMode() as mode:
            together(average, average.merged_weights())
        self.counts["whole"] = mode.get_total_counts()


def plain(mesh: str) -> type:
    """The module that one process trains to compare with."""
    return Wide if mesh in ("ddp", "fsdp") else Even


def four_averages() -> list[WeightMerging]:
    return [
        EMA(decay=0.8, validate="both"),
        EMA(decay=0.9, compensated=True, name="compensated"),
        SWA(start_epoch=0),
        LAWA(k=2, every_n_steps=1, store="cpu"),
    ]


def other_averages() -> list[WeightMerging]:
    """Those that are measured while they decide, and those that keep more than one set."""
    return [
        SMA("val/loss", start_step=0),
        ASWA("val/loss", start_epoch=0, hard=True),
        PostHocEMA(every=3, validate="raw"),
        Interpolate(alpha=0.3, validate="raw"),
        BestK("val/loss", k=2, validate="both"),
        BEMA(validate="both"),
        Anneal("1-sqrt", 4, validate="both"),
        Anneal("cosine", 4, memory=3, name="sliding", validate="raw"),
    ]


def sets_of(averages: list[WeightMerging]) -> dict[str, dict[str, Tensor]]:
    """What they merged, and a width that nobody tracked."""
    sets = {average.name: average.merged_weights() for average in averages}
    post_hoc = next(average for average in averages if isinstance(average, PostHocEMA))
    return {**sets, "another width": post_hoc.synthesise(0.07)}


class Taught:
    """Distils from its average, which takes its place while a graph of the student waits for its backward pass."""

    def training_step(self: Any, batch: list[Tensor], batch_idx: int) -> Tensor:
        before = self(batch[0])
        with teacher(self, "ema"):
            target = self(batch[0])
        assert not target.requires_grad
        return (before - target).square().mean() + self.loss(batch)


def taught(kind: type) -> Any:
    return type("Taught", (Taught, kind), {})()


def swad() -> SWAD:
    return SWAD("val/loss", n_converge=1, n_tolerance=3, stop=False, validate="both")


def many_fits(root: Path, mesh: str) -> dict[str, Any]:
    """Everything that two processes do, in one start of them."""
    tensor = 1 if mesh in ("ddp", "fsdp") else 2
    kind = {"ddp": Wide, "fsdp": Sharded}.get(mesh, Even)

    def strategy() -> Any:
        return ddp() if mesh == "ddp" else fsdp2(tensor=tensor)

    averages = four_averages()
    witness, collectives, rows = Witness(averages[0]), Collectives(), Rows()
    files = ModelCheckpoint(root / "parts", "{epoch}", monitor="val/loss", save_top_k=-1)
    module = kind()
    callbacks = [collectives, *averages, witness, files]
    # Here only one process has a logger, as where a script makes it so.
    logging = {"logger": rows if os.environ["RANK"] == "0" else False, "log_every_n_steps": 4}
    run = fit(root, callbacks, module, strategy(), max_epochs=2, **logging)
    found: dict[str, Any] = {
        "path": witness.path,
        "validated": witness.validated,
        "merged": {average.name: together(average, average.merged_weights()) for average in averages},
        "module": whole(module),
        "raw": together(averages[0], averages[0].raw_weights()),
        "metrics": {key: float(value) for key, value in run.callback_metrics.items()},
        "collectives": collectives.counts,
        "updates": collectives.updates,
        "health": rows.of("ema", "compensated", "swa", "lawa"),
        "local": {name: tuple(t.shape) for name, t in averages[0].tensors.items()},
    }
    average = swad()
    witness = Witness(average)
    fit(root, [average, witness], kind(), strategy(), max_epochs=5, val_check_interval=0.5)
    found["swad"] = together(average, average.merged_weights())
    found["swad path"] = witness.path
    found["interval"] = average.rule.interval(average._state)

    for key, epochs, ckpt_path in (("first", 1, None), ("resumed", 2, root / "others.ckpt"), ("others", 2, None)):
        averages = other_averages()
        files = [ModelCheckpoint(root, "others")] if epochs == 1 else []
        counter = Collectives()
        fit(root, [counter, *averages, *files], kind(), strategy(), ckpt_path, max_epochs=epochs)
        found["updates of others"] = counter.updates
        found[key] = {name: together(averages[0], tensors) for name, tensors in sets_of(averages).items()}

    ema = EMA(decay=0.5)
    fit(root, [ema], taught(kind), strategy(), max_epochs=2)
    found["student"], found["teacher"] = together(ema, ema.raw_weights()), together(ema, ema.merged_weights())

    ema = EMA(decay=0.9, validate="both")
    witness = Witness(ema)
    fit(root, [ema, witness], kind(), strategy(), max_epochs=1, precision="bf16-true", val_check_interval=1)
    found["half"] = together(ema, ema.merged_weights())
    found["half path"] = witness.path
    if mesh in ("ddp", "fsdp"):
        module = kind(norm=True)
        run = fit(root, [SWA(start_epoch=0, validate="both")], module, strategy(), max_epochs=2)
        found["statistics"] = {name: t for name, t in whole(module).items() if "running" in name}
        found["statistics metric"] = float(run.callback_metrics["val/loss"])
    return found


@pytest.fixture(scope="module", params=["ddp", "fsdp", "tensor", "both"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    world = 4 if request.param == "both" else 2
    root = tmp_path_factory.mktemp(request.param)
    results = launch(world, many_fits, root, request.param)
    return {"mesh": request.param, "root": root, "ranks": results, **results[0]}


def test_averages_of_parts_are_the_averages_of_the_whole(found: dict[str, Any]) -> None:
    rules = {
        "ema": ExponentialMean(0.8),
        "compensated": ExponentialMean(0.9, compensated=True),
        "lawa": WindowMean(2),
    }
    start, *path = found["path"]
    for name, rule in rules.items():
        state = rule.init(start)
        for weights in path:
            rule.update(state, weights)
        assert not differing(rule.result(state), found["merged"][name]), name
    state = Mean().init(start)
    for epoch_end in (path[3], path[7]):
        Mean().update(state, epoch_end)
    assert not differing(Mean().result(state), found["merged"]["swa"])


def test_the_whole_run_is_that_of_one_process(found: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    averages = four_averages()
    run = trainer(tmp_path, averages, max_epochs=2)
    run.fit(plain(found["mesh"])(), *loaders())
    for average in averages:
        for name, tensor in average.merged_weights().items():
            torch.testing.assert_close(found["merged"][average.name][name], tensor, rtol=1e-6, atol=1e-6)
    for key, value in run.callback_metrics.items():
        if "val/" in key:
            assert found["metrics"][key] == pytest.approx(value.item(), rel=1e-5), key


def test_other_averages_are_those_of_one_process(found: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    averages = other_averages()
    trainer(tmp_path, averages, max_epochs=2).fit(plain(found["mesh"])(), *loaders())
    expected = sets_of(averages)
    assert expected.keys() == found["others"].keys()
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(found["others"][name][key], tensor, rtol=1e-6, atol=1e-6)


def test_other_averages_go_on_bit_for_bit(found: dict[str, Any]) -> None:
    for name, tensors in found["others"].items():
        assert not differing(found["resumed"][name], tensors), name
    assert differing(found["first"]["posthoc-ema"], found["others"]["posthoc-ema"])


def test_a_student_and_its_teacher_are_those_of_one_process(found: dict[str, Any], tmp_path: Path) -> None:
    ema = EMA(decay=0.5)
    trainer(tmp_path, [ema], max_epochs=2).fit(taught(plain(found["mesh"])), *loaders())
    for expected, seen in ((ema.raw_weights(), found["student"]), (ema.merged_weights(), found["teacher"])):
        for name, tensor in expected.items():
            torch.testing.assert_close(seen[name], tensor, rtol=1e-6, atol=1e-6)


def test_parts_are_uneven_and_the_root_owns_some(found: dict[str, Any]) -> None:
    shapes = [result["local"] for result in found["ranks"]]
    if found["mesh"] == "fsdp":
        assert [shape["net.0.weight"] for shape in shapes] == [(4, 4), (3, 4)]
        assert [shape["net.2.bias"] for shape in shapes] == [(1,), (0,)]  # net.2 is the root's
    elif found["mesh"] == "ddp":
        assert shapes[0] == shapes[1]
    elif found["mesh"] == "tensor":
        assert [shape["net.2.weight"] for shape in shapes] == [(1, 4), (1, 4)]
    else:
        assert [shape["net.0.weight"] for shape in shapes] == [(2, 4)] * 4


def test_merged_weights_are_validated_and_published_and_raw_ones_come_back(found: dict[str, Any]) -> None:
    # Validation measured SWA, LAWA, the compensated EMA, raw and EMA last.
    start, *path = found["path"]
    state = ExponentialMean(0.8).init(start)
    at_validation = []
    for step, weights in enumerate(path, 1):
        ExponentialMean(0.8).update(state, weights)
        if step in (4, 8):
            at_validation.append({name: t.clone() for name, t in state["average"].items()})
    primary = found["validated"][len(found["validated"]) // 2 - 1 :: len(found["validated"]) // 2]
    for expected, seen in zip(at_validation, primary, strict=False):
        assert not differing(expected, seen)
    assert not differing(found["module"], found["merged"]["ema"])
    assert not differing(found["raw"], path[-1])
    module = plain(found["mesh"])()
    module.load_state_dict(found["merged"]["ema"])
    with torch.no_grad():
        expected = torch.stack([module.loss(batch) for batch in loaders()[1]]).mean().item()
    assert found["metrics"]["val/loss"] == pytest.approx(expected, rel=1e-5)


def test_updates_and_exchanges_communicate_nothing(found: dict[str, Any]) -> None:
    for result in found["ranks"]:
        counts = result["collectives"]
        assert result["updates"] == {"ema": [0] * 8, "compensated": [0] * 8, "swa": [0] * 2, "lawa": [0] * 8}
        for name, least in (("anneal", 4), ("sliding", 8), ("bema", 8)):
            counted = result["updates of others"][name]
            assert (sum(counted), len(counted) >= least) == (0, True)
        assert counts["exchange"] == 0
        assert counts["whole"] > 0 or found["mesh"] == "ddp"  # the counter counts


def test_the_distance_of_parts_is_that_of_the_whole(found: dict[str, Any]) -> None:
    start, *path = found["path"]
    state = ExponentialMean(0.8).init(start)
    for step, weights in enumerate(path):
        ExponentialMean(0.8).update(state, weights)
        if step in (3, 7):
            assert found["health"][step] == {
                **found["health"][step],
                "ema/updates": step + 1,
                "ema/start_share": pytest.approx(0.8 ** (step + 1)),
                "ema/distance": pytest.approx(distance(state["average"], weights), rel=1e-5),
            }
    assert list(found["health"]) == [3, 7]
    # A window in host memory is compared nowhere.
    expected = {f"{n}/distance" for n in ("ema", "compensated", "swa")}
    assert {key for key in found["health"][7] if key.endswith("/distance")} == expected
    assert all(not result["health"] for result in found["ranks"][1:])


def test_swad_decides_alike_and_averages_its_interval(found: dict[str, Any]) -> None:
    intervals = {result["interval"] for result in found["ranks"]}
    (first, last), *others = intervals
    assert not others
    state = Mean().init(found["swad path"][0])
    for weights in found["swad path"][first : last + 1]:
        Mean().update(state, weights)
    for name, tensor in Mean().result(state).items():
        torch.testing.assert_close(found["swad"][name], tensor, rtol=1e-6, atol=1e-6)


def test_the_average_of_a_bfloat16_run_is_the_float32_average_of_its_weights(found: dict[str, Any]) -> None:
    start, *path = found["half path"]
    assert start["net.0.weight"].dtype is torch.bfloat16
    state = ExponentialMean(0.9).init(start)
    for weights in path:  # a validation after each
        ExponentialMean(0.9).update(state, weights)
    assert not differing(state["average"], found["half"])
    assert found["half"]["net.0.weight"].dtype is torch.float32


def test_statistics_that_are_measured_again_are_those_of_all_processes(found: dict[str, Any]) -> None:
    if found["mesh"] not in ("ddp", "fsdp"):
        return  # their module has no BatchNorm
    first, second = found["ranks"]
    assert first["statistics"].keys() == {"net.1.running_mean", "net.1.running_var"}
    assert not differing(first["statistics"], second["statistics"])
    assert first["statistics metric"] == second["statistics metric"]
