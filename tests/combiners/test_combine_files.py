"""Merging checkpoint files gives what merging in memory gives, and says which file does not fit."""

import pytest
import torch

import lightning_merge.combiners._combine_files as module
from lightning_merge.combiners import (
    DARE,
    EMR,
    OPCM,
    TIES,
    TSVM,
    Consensus,
    IsoC,
    MagMax,
    MetaGPT,
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


@pytest.mark.parametrize(
    "combiner", [Sum(), TIES(0.5, scope="global"), OPCM(), IsoC(), TSVM(), MetaGPT(), Consensus(), EMR()], ids=repr
)
def test_tied_tensors_count_once_and_stay_tied(tmp_path, combiner):
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(4, 4, generator=generator), "v": torch.randn(3, generator=generator)} for _ in range(3)]
    for number, model in enumerate(models):
        # Tied in all files; the same numbers the other way round; tied in some files only.
        other = model["v"] if number else model["v"].clone()
        torch.save({**model, "again": model["w"], "turned": model["w"].T, "some": other}, tmp_path / f"{number}.pt")
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    merged = combine_files(combiner, paths[0], paths[1:])
    assert list(merged) == ["w", "v", "again", "turned", "some"]
    assert merged["again"] is merged["w"]
    assert merged["turned"] is not merged["w"]
    assert merged["some"] is not merged["v"]
    counted = [{**model, "turned": model["w"].T.contiguous(), "some": model["v"].clone()} for model in models]
    expected = add_vector(counted[0], combiner.combine([task_vector(model, counted[0]) for model in counted[1:]]))
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, msg=name)
