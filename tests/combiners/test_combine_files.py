"""Merging checkpoint files gives what merging in memory gives, and says which file does not fit."""

import pytest
import torch

import lightning_merge.combiners._combine_files as module
from lightning_merge.combiners import (
    DARE,
    OPCM,
    TIES,
    MagMax,
    ModelStock,
    Sum,
    add_vector,
    combine_files,
    task_vector,
)


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    models = [
        {
            "net.weight": torch.randn(5, 4, generator=generator),
            "net.bias": torch.randn(5, generator=generator),
            "half": torch.randn(3, generator=generator).bfloat16(),
            "steps": torch.tensor(number),
        }
        for number in range(4)
    ]
    for name, model in zip(("base", "a", "b", "c"), models, strict=True):
        torch.save({"state_dict": model}, tmp_path / f"{name}.ckpt")
    return tmp_path, models


@pytest.mark.parametrize(
    "combiner", [Sum(), MagMax(), TIES(0.5), TIES(0.5, scope="global"), DARE(), ModelStock(), OPCM()], ids=repr
)
@pytest.mark.parametrize("group", [1, 21, 10**6])
def test_files_merge_to_what_models_in_memory_do(files, combiner, group, monkeypatch):
    monkeypatch.setattr(module, "_GROUP", group)
    folder, (base, *models) = files
    merged = combine_files(combiner, folder / "base.ckpt", [folder / f"{name}.ckpt" for name in "abc"], ["x", "y", "z"])
    vectors = [task_vector(model, base) for model in models]
    expected = add_vector(base, combiner.combine(vectors, ["x", "y", "z"]))
    assert list(merged) == list(base)
    for name, tensor in expected.items():
        assert merged[name].dtype == base[name].dtype
        assert torch.equal(merged[name], tensor), name


def test_one_file_at_a_time_is_open_and_one_group_is_read(files, monkeypatch):
    folder, _ = files
    monkeypatch.setattr(module, "_GROUP", 1)
    read = []
    original = module._read
    monkeypatch.setattr(module, "_read", lambda file, names: read.append(names) or original(file, names))
    combine_files(TIES(), folder / "base.ckpt", [folder / "a.ckpt", folder / "b.ckpt"])
    assert read
    assert all(len(names) == 1 for names in read)


def test_files_that_do_not_fit_are_named(files):
    folder, (base, *_) = files
    torch.save({**base, "head": torch.ones(2)}, folder / "grown.pt")
    torch.save({**base, "net.bias": torch.full((5,), float("nan"))}, folder / "nan.pt")
    for bad, message in (
        ("grown.pt", "grown.pt is of another model than .*base.ckpt: `head`"),
        ("nan.pt", "nan.pt: `net.bias` holds a NaN"),
        ("none.pt", "there is no file .*none.pt"),
    ):
        with pytest.raises(ValueError, match=message):
            combine_files(Sum(), folder / "base.ckpt", [folder / "a.ckpt", folder / bad])
    with pytest.raises(ValueError, match="`files` must be at least one, and `tasks` as many, got 0 and 0"):
        combine_files(Sum(), folder / "base.ckpt", [])
