"""Files of other libraries, and ours: every set in them is found, under the names of a plain module."""

from pathlib import Path

import foreign_files
import pytest
import torch
from foreign_files import Line, data, trainer, values
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD
from lightning_merge.files._layouts import open_file, open_set


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("library", ["timm", "ema_pytorch", "averaged_model", "nemo", "mmengine"])
def test_file_of_another_library_gives_the_sets_it_was_made_of(library: str, tmp_path: Path) -> None:
    path, expected = getattr(foreign_files, library)(tmp_path)
    file = open_file(path)
    assert file.sets.keys() == expected.keys()
    for name, weights in expected.items():
        assert same(file.sets[name].weights, weights), name
    model = Line() if library == "nemo" else Line().net
    for stored in file.sets.values():
        model.load_state_dict(stored.weights)


def test_the_average_is_what_a_score_of_timm_and_mmengine_belongs_to(tmp_path: Path) -> None:
    assert open_file(foreign_files.timm(tmp_path)[0]).default == "average"
    assert open_file(foreign_files.mmengine(tmp_path)[0]).default == "average"


def test_either_file_of_a_pair_of_nemo_gives_both_sets(tmp_path: Path) -> None:
    path, expected = foreign_files.nemo(tmp_path)
    file = open_file(path.with_name("nemo-EMA.ckpt"))
    assert file.default == "average"
    assert all(same(file.sets[name].weights, weights) for name, weights in expected.items())


def test_lightnings_weight_averaging_gives_both_sets_and_the_count(tmp_path: Path) -> None:
    class Kept(WeightAveraging):
        def on_save_checkpoint(self, *arguments: object) -> None:
            super().on_save_checkpoint(*arguments)  # type: ignore[arg-type]
            self.seen = (values(arguments[1]), values(self._average_model.module))  # type: ignore[union-attr]

    callback = Kept()
    path = foreign_files.lightning(tmp_path, callback, "wa")
    file = open_file(path)
    raw, average = callback.seen
    assert same(file.sets["raw"].weights, raw)
    assert same(file.sets["average"].weights, average)
    assert (file.default, file.sets["average"].updates) == ("average", 12)


def test_lightnings_stochastic_averaging_gives_both_sets_once_it_has_averaged(tmp_path: Path) -> None:
    path = foreign_files.lightning(tmp_path, StochasticWeightAveraging(0.05, swa_epoch_start=1), "lswa", epochs=3)
    file = open_file(path)
    assert file.sets.keys() == {"raw", "average"}
    assert not same(file.sets["raw"].weights, file.sets["average"].weights)
    Line().load_state_dict(file.sets["average"].weights)
    late = foreign_files.lightning(tmp_path, StochasticWeightAveraging(0.05, swa_epoch_start=3), "late", epochs=2)
    assert open_file(late).sets.keys() == {"raw"}


@pytest.mark.parametrize(
    "second",
    [
        EMA(decay=0.5, name="second"),
        EMA(half_life="50%", name="second", warmup="timm"),
        SWA(start_epoch=0.5, name="second"),
        LAWA(every_n_steps=3, k=2, name="second"),
        SWAD(monitor="x", n_converge=1, n_tolerance=1, name="second"),
    ],
    ids=lambda callback: repr(callback.rule),
)
def test_every_average_of_our_full_files_is_found_beside_the_one_in_front(second: object, tmp_path: Path) -> None:
    first = EMA(decay=0.9, name="first")
    trainer(first, second, ModelCheckpoint(tmp_path), epochs=4).fit(Line(), data(), data())  # type: ignore[arg-type]
    file = open_file(tmp_path / "first-final.ckpt")
    assert file.default == "first"
    merged = second.merged_weights()  # type: ignore[attr-defined]
    for name, tensor in merged.items():
        assert torch.equal(file.sets["second"].weights[name], tensor), name
    for name, tensor in first.raw_weights().items():
        assert torch.equal(file.sets["raw"].weights[name], tensor), name
    assert file.sets["first"].initial_share == pytest.approx(0.9**24)
    assert open_file(tmp_path / "second-final.ckpt").default == "second"


def test_tied_weights_appear_under_every_name(tmp_path: Path) -> None:
    class Tied(Line):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
            self.net[1].weight = self.net[0].weight

    trainer(EMA(decay=0.9), EMA(decay=0.5, name="b"), ModelCheckpoint(tmp_path)).fit(Tied(), data(), data())
    for stored in open_file(tmp_path / "ema-final.ckpt").sets.values():
        assert torch.equal(stored.weights["net.0.weight"], stored.weights["net.1.weight"])
        assert len(stored.weights) == 6


def test_set_is_named_after_a_colon(tmp_path: Path) -> None:
    path, expected = foreign_files.timm(tmp_path)
    file, name = open_set(f"{path}:raw")
    assert (name, same(file.choose(name).weights, expected["raw"])) == ("raw", True)
    assert open_set(str(path))[1] == "average"
    with pytest.raises(ValueError, match=r"no set called 'merged'.*average, raw"):
        open_set(f"{path}:merged")


def test_label_runs_no_code(tmp_path: Path) -> None:
    trainer(EMA(decay=0.9), EMA(decay=0.5, name="b"), ModelCheckpoint(tmp_path)).fit(Line(), data())
    path = tmp_path / "ema-final.ckpt"
    content = torch.load(path, weights_only=True)
    content["lightning_merge"]["averages"]["b"]["rule"] = "__import__('os').system('touch here')"
    torch.save(content, path)
    assert open_file(path).sets.keys() == {"ema", "raw"}
    assert not Path("here").exists()
