"""TWA under DDP: each process holds its slice of the snapshots, and together they are one process."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch
from ranks import Wide, ddp, fit
from tiny import differing, read, values

from lightning_merge.callbacks import TWA

pytestmark = pytest.mark.multiprocess

SETTINGS: dict[str, dict[str, Any]] = {
    "centred": {"form": "centred"},
    "iclr": {"form": "iclr", "momentum": 0.5, "weight_decay": 0.01},
    "journal": {"form": "journal", "inner": "adamw"},
}


def one_run(root: Path, settings: dict[str, Any], norm: bool, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Five snapshots in ten steps, then six steps of the second stage; a file after each epoch of four steps."""
    twa = TWA(every=2, stage=6, lr=0.05, **settings)
    files = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
    module = Wide(norm=norm)
    fit(root, [twa, files], module, ddp(), ckpt_path, max_epochs=4)
    assert twa._fit is not None
    return {
        "end": values(module),
        "merged": values(twa.merged_weights()),
        "file": read(str(twa.final_path))["state_dict"],
        "coefficients": twa.coefficients,
        "counts": (twa.steps, twa.updates, twa.snapshots),
        "held": sum(rows.numel() for rows in twa._fit.subspace._rows.values()),
    }


def alone(root: Path) -> dict[str, Any]:
    return {form: one_run(root / form, settings, norm=False) for form, settings in SETTINGS.items()}


def work(root: Path) -> dict[str, Any]:
    found = {}
    for form, settings in SETTINGS.items():
        for norm in (False, True):
            place = root / f"{form}-{norm}"
            found[form, norm] = one_run(place, settings, norm)
            for epoch in (1, 2):  # step 8, in the first stage; step 12, in the second
                file = place / f"epoch={epoch}.ckpt"
                found[form, norm, epoch] = one_run(place / f"from{epoch}", settings, norm, file)
    return found


def test_two_processes_are_one_and_go_on_from_both_stages(tmp_path: Path) -> None:
    (expected,) = launch(1, alone, tmp_path / "one")
    first, second = launch(2, work, tmp_path / "two")
    for form in SETTINGS:
        one, left, right = expected[form], first[form, False], second[form, False]
        assert one["counts"] == left["counts"] == right["counts"] == (16, 6, 5)
        for name, tensor in one["end"].items():
            assert (tensor - left["end"][name]).abs().max() <= 1e-6, f"{form} {name}"
        assert left["held"] + right["held"] == one["held"]
        assert max(left["held"], right["held"]) < one["held"]
        for norm in (False, True):
            left, right = first[form, norm], second[form, norm]
            assert not differing(left["end"], right["end"])
            assert not differing(left["end"], left["file"])
            assert left["coefficients"] == right["coefficients"]
            for epoch in (1, 2):
                for whole, found in ((left, first), (right, second)):
                    resumed = found[form, norm, epoch]
                    # Lightning keeps the BatchNorm statistics and recent batches of the first process only.
                    of_norm = {"net.1.running_mean", "net.1.running_var"} if norm else set()
                    assert set(differing(resumed["file"], whole["file"])) <= of_norm, (form, norm, epoch)
                    assert resumed["coefficients"] == whole["coefficients"]
                    assert resumed["counts"] == whole["counts"]
