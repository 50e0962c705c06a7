"""Infinities that all models have in the same places, as in masks of attention, stay what they are in a merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_merge.combiners import TIES, Sum, add_vector, combine_files, task_vector
from lightning_merge.soups import soup
from lightning_merge.trajectory import Trajectory

MASK = torch.full((3, 3), float("-inf")).triu(1)
Weights = dict[str, Tensor]


def model(w: float, mask: Tensor = MASK) -> Weights:
    return {"w": torch.tensor([w, 2 * w, 0.0]), "mask": mask.clone()}


def by_files(merge: Callable[..., Any]) -> Callable[[Path, Weights, list[Weights]], Weights]:
    def merged(folder: Path, base: Weights, models: list[Weights]) -> Weights:
        for name, weights in (("base", base), *((str(i), each) for i, each in enumerate(models))):
            torch.save({"state_dict": weights}, folder / f"{name}.ckpt")
        return merge(folder / "base.ckpt", [folder / f"{i}.ckpt" for i in range(len(models))])

    return merged


MERGES: dict[str, Callable[[Path, Weights, list[Weights]], Weights]] = {
    "soup": lambda folder, base, models: soup(models),
    "trajectory": by_files(lambda base, files: Trajectory.of_files(files).combine([0.5, 0.5])),
    "files": by_files(lambda base, files: combine_files(Sum(scale=0.5), base, files)),
    "vectors": lambda folder, base, models: add_vector(
        base, TIES(density=1.0, scale=1.0).combine([task_vector(each, base) for each in models])
    ),
}


@pytest.mark.parametrize("name", MERGES)
def test_a_mask_stays_and_the_rest_is_merged(name: str, tmp_path: Path) -> None:
    found = MERGES[name](tmp_path, model(0.0), [model(1.0), model(3.0)])
    assert torch.equal(found["mask"], MASK)
    torch.testing.assert_close(found["w"], torch.tensor([2.0, 4.0, 0.0]))


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("other", [MASK.T, -MASK, torch.full((3, 3), float("nan")), torch.zeros(3, 3)])
def test_one_that_differs_is_refused_by_name(name: str, other: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`mask`.*holds a NaN or an infinity"):
        MERGES[name](tmp_path, model(0.0), [model(1.0), model(3.0, other)])
