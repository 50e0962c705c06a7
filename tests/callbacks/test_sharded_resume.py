"""Checkpoints of sharded runs, in parts and whole: what they hold, and that 1, 2 and 4 processes go on from any."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch, returned, start
from ranks import Even, Sharded, Wide, ddp, fit, fsdp2, loaders, together, whole
from tiny import differing, raw_of, read, trainer
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_merge._commands._inspect import describe
from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD, WeightMerging
from lightning_merge.cli import main
from lightning_merge.files._layouts import open_file

pytestmark = pytest.mark.multiprocess

WORLDS = (1, 2, 4)
FORMS = ("parts", "whole", "ddp", "tensor-parts", "tensor-whole")
"""FSDP2, DDP, and tensor parallelism: of two processes pure, of four with FSDP2 on a 2D mesh, of one FSDP2 alone."""

ANOTHER = {1: 2, 2: 4, 4: 1}
RESUMED = [
    (on, by, form)
    for on in WORLDS
    for by in WORLDS
    for form in FORMS
    if on == by or by == ANOTHER[on] or form.endswith("parts")
]
"""Who goes on from whose files. Parts are of a mesh; whole files are the same of any, so one other writer will do."""


class AtStart(Callback):
    """Puts together what the processes hold when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.raw = whole(pl_module)
        averages = (each for each in trainer.callbacks if isinstance(each, WeightMerging))
        self.averages = {each.name: together(each, each.merged_weights()) for each in averages if each.ready}


def averages() -> list[WeightMerging]:
    """Two are validated, since files hold them. What ends a fit would take longest, and is seen elsewhere."""
    quick: dict[str, Any] = {"final_validation": False, "final_checkpoint": False}
    return [
        EMA(decay=0.8, validate="both", **quick),
        EMA(decay=0.9, compensated=True, name="compensated", **quick),
        SWA(start_epoch=0, validate="raw", **quick),
        LAWA(k=2, every_n_steps=1, store="cpu", validate="raw", **quick),
        SWAD("val/loss", n_converge=1, n_tolerance=3, stop=False, validate="raw", **quick),
    ]


def a_run(form: str) -> tuple[Any, Any]:
    """A module and its strategy."""
    if form == "ddp":
        return Wide(), ddp()
    if form.startswith("tensor"):
        return Even(), fsdp2(tensor=min(2, int(os.environ["WORLD_SIZE"])), whole_files=form == "tensor-whole")
    return Sharded(), fsdp2(whole_files=form == "whole")


def a_fit(root: Path, form: str, epochs: int, ckpt_path: Path | None = None, save: bool = False) -> dict[str, Any]:
    callbacks, (module, strategy) = averages(), a_run(form)
    start = AtStart()
    files = [
        # Its metric is of the raw weights, since SWAD decides by it; the others' files hold the EMA.
        ModelCheckpoint(root, f"{form}-raw", monitor="val/loss"),
        ModelCheckpoint(root, form, monitor="ema/val/loss"),
        ModelCheckpoint(root, f"{form}-weights", monitor="compensated/val/loss", save_weights_only=True),
    ]
    settings = {"max_epochs": epochs, "val_check_interval": 0.5}
    run = fit(root, [*callbacks, start, *files[: 3 * save]], module, strategy, ckpt_path=ckpt_path, **settings)
    return {
        "start": start.raw,
        "started": start.averages,
        "end": {average.name: together(average, average.merged_weights()) for average in callbacks if average.ready},
        "raw": together(callbacks[0], callbacks[0].raw_weights()),
        "momentum": [
            t.full_tensor() if hasattr(t, "full_tensor") else t
            for state in run.optimizers[0].state_dict()["state"].values()
            for t in state.values()
        ],
        "counters": [(a.updates, a.steps, a.update_window, a.evaluations) for a in callbacks],
        "steps": run.global_step,
        "part": tuple(callbacks[0].tensors["net.0.weight"].shape),
    }


def write(root: Path) -> dict[str, Any]:
    found = {form: a_fit(root / form, form, epochs=1, save=True) for form in FORMS}
    ends = {f"{form} end": a_fit(root / f"end-{form}", form, epochs=2) for form in ("parts", "ddp", "tensor-parts")}
    return {**found, **ends, "whole end": ends["parts end"], "tensor-whole end": ends["tensor-parts end"]}


def resume(root: Path, paths_of: dict[int, list[Path]]) -> dict[str, Any]:
    paths = paths_of[int(os.environ["WORLD_SIZE"])]
    forms = {"ddp": "ddp", "tensor-parts": "tensor-parts", "tensor-whole": "tensor-parts"}
    return {str(path): a_fit(root, forms.get(path.stem, "parts"), epochs=2, ckpt_path=path) for path in paths}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("resume")


def in_each_world(work: Callable[..., Any], root: Path, folder: str, *arguments: Any) -> dict[int, Any]:
    """What the first process of each world returned. They run at once: processes of one mostly wait for each other."""
    roots = {world: root / f"{folder}{world}" for world in WORLDS}
    started = {world: start(world, work, place, *arguments) for world, place in roots.items()}
    return {world: returned(started[world], place)[0] for world, place in roots.items()}


@pytest.fixture(scope="module")
def written(root: Path) -> dict[int, Any]:
    return in_each_world(write, root, "by")


@pytest.fixture(scope="module")
def resumed(root: Path, written: dict[int, Any]) -> dict[int, Any]:
    paths: dict[int, list[Path]] = {world: [] for world in WORLDS}
    for on, by, form in RESUMED:
        paths[on].append(root / f"by{by}" / form / f"{form}.ckpt")
    paths[2].append(root / "by2" / "parts" / "parts-raw.ckpt")
    return in_each_world(resume, root, "on", paths)


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6)


def identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert not differing(left, right)


@pytest.mark.parametrize(("on", "by", "form"), RESUMED)
def test_processes_go_on_from_each_others_files(
    on: int, by: int, form: str, written: dict[int, Any], resumed: dict[int, Any], root: Path
) -> None:
    saved, went_on = written[by][form], resumed[on][str(root / f"by{by}" / form / f"{form}.ckpt")]
    expected = written[by][f"{form} end"]
    assert not differing(went_on["start"], saved["raw"])
    assert went_on["started"].keys() == saved["end"].keys()
    for name, average in saved["end"].items():
        assert not differing(went_on["started"][name], average), name
    assert went_on["counters"] == expected["counters"]
    # DDP lays its buckets out anew after its first step, also that of a resumed run, and sums of four depend on that.
    compare = close if on != by or (form == "ddp" and on > 2) else identical
    for name, average in expected["end"].items():
        compare(went_on["end"][name], average)
    compare(went_on["raw"], expected["raw"])
    for left, right in zip(went_on["momentum"], expected["momentum"], strict=True):
        compare({"": left}, {"": right})


def test_parts_are_those_of_each_mesh(written: dict[int, Any]) -> None:
    assert {by: written[by]["parts"]["part"] for by in WORLDS} == {1: (7, 4), 2: (4, 4), 4: (2, 4)}
    assert {by: written[by]["tensor-parts"]["part"] for by in WORLDS} == {1: (8, 4), 2: (4, 4), 4: (2, 4)}


def test_a_checkpoint_that_holds_the_raw_weights_goes_on_as_well(
    written: dict[int, Any], resumed: dict[int, Any], root: Path
) -> None:
    went_on = resumed[2][str(root / "by2" / "parts" / "parts-raw.ckpt")]
    assert went_on["steps"] == written[2]["parts end"]["steps"]


@pytest.mark.parametrize("suffix", ["", "-weights"])
@pytest.mark.parametrize("by", WORLDS)
@pytest.mark.parametrize("mesh", ["", "tensor-"], ids=["fsdp", "tensor"])
def test_whole_files_and_parts_hold_what_was_measured(
    mesh: str, by: int, suffix: str, written: dict[int, Any], root: Path, tmp_path: Path
) -> None:
    file = read(root / f"by{by}" / f"{mesh}whole" / f"{mesh}whole{suffix}.ckpt")
    assert file["lightning_merge"]["holds"] == ("compensated" if suffix else "ema")
    plain = Even() if mesh else Wide()
    plain.load_state_dict(file["state_dict"])
    with torch.no_grad():
        loss = torch.stack([plain.loss(batch) for batch in loaders()[1]]).mean().item()
    assert file["lightning_merge"]["score"] == pytest.approx(loss, rel=1e-5)

    folder = root / f"by{by}" / f"{mesh}parts" / f"{mesh}parts{suffix}.ckpt"
    dcp_to_torch_save(folder, tmp_path / "together.pt")
    together = torch.load(tmp_path / "together.pt")
    ours = {name for each in together.values() for name in each if name.startswith("lightning_merge/")}
    assert bool(ours) is (suffix == "")  # and not among those that a plain module loads
    assert not differing(together["state_dict"], file["state_dict"])
    if not suffix:
        assert not differing(raw_of(file), written[by][f"{mesh}whole"]["raw"])


def test_one_device_goes_on_from_a_whole_file_and_the_other_way_round(
    written: dict[int, Any], root: Path, tmp_path: Path
) -> None:
    def on_one_device(mesh: str, epochs: int, ckpt_path: Path | None = None) -> list[WeightMerging]:
        callbacks = averages()
        files = [] if ckpt_path else [ModelCheckpoint(tmp_path, f"{mesh}parts", monitor="ema/val/loss")]
        run = trainer(tmp_path, [*callbacks, *files], max_epochs=epochs, val_check_interval=0.5)
        run.fit(Even() if mesh else Wide(), *loaders(), ckpt_path=ckpt_path)
        return callbacks

    by = {"": 2, "tensor-": 4}
    paths = {mesh: tmp_path / f"{mesh}parts.ckpt" for mesh in by}
    for mesh, world in by.items():
        for average in on_one_device(mesh, 2, root / f"by{world}" / f"{mesh}whole" / f"{mesh}whole.ckpt"):
            close(average.merged_weights(), written[1][f"{mesh}parts end"]["end"][average.name])
        on_one_device(mesh, 1)
    went_on = launch(2, resume, tmp_path / "on2", {2: list(paths.values())})[0]
    for mesh, path in paths.items():
        for name, average in went_on[str(path)]["end"].items():
            close(average, written[1][f"{mesh}parts end"]["end"][name])


@pytest.mark.parametrize("mesh", ["", "tensor-"], ids=["fsdp", "both"])
def test_the_commands_read_a_folder_as_they_read_a_file(
    mesh: str, root: Path, written: dict[int, Any], tmp_path: Path
) -> None:
    folder, file = (root / "by4" / f"{mesh}{form}" / f"{mesh}{form}.ckpt" for form in ("parts", "whole"))
    text, of_file = describe(folder), describe(file)
    assert "lightning-merge export" in text
    for line in of_file.splitlines():
        if "`state_dict` holds" in line or "score:" in line:
            assert line in text
    for name, stored in open_file(file).sets.items():
        assert not differing(open_file(folder).sets[name].weights, stored.weights), name
    for name in ("ema", "raw"):
        assert main(["export", str(folder), str(tmp_path / f"{name}.pt"), "--set", name]) == 0
        (Even() if mesh else Wide()).load_state_dict(torch.load(tmp_path / f"{name}.pt", weights_only=True))
        of_run = written[4][f"{mesh}parts"]
        expected = of_run["end"]["ema"] if name == "ema" else of_run["raw"]
        assert not differing(torch.load(tmp_path / f"{name}.pt"), expected)
