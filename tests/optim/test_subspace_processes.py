"""Two gloo processes, each with its share of the snapshots, take the steps of one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import launch

from lightning_merge.optim import Subspace

pytestmark = pytest.mark.multiprocess

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 2, 2), "d": ()}
FORMS = (("centred", "sgd"), ("iclr", "sgd"), ("journal", "adamw"))


def run(form: str, optimizer: str) -> tuple[list[torch.Tensor], int]:
    """The weights after a few steps, half of them from what was saved; and how many numbers of snapshots are held."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}  # noqa: E731
    points, gradients = [draw() for _ in range(4)], [draw() for _ in range(6)]
    live = {name: tensor.clone() for name, tensor in points[0].items()}
    subspace = Subspace(live, 4, form=form, optimizer=optimizer)
    for point in points:
        subspace.collect(point)
    subspace.begin(live)
    for gradient in gradients[:3]:
        subspace.step(live, gradient, 0.1)
    again = Subspace(live, 4, form=form, optimizer=optimizer)
    again.load(subspace.save())
    for gradient in gradients[3:]:
        again.step(live, gradient, 0.1)
    held = sum(rows.numel() for rows in again._rows.values())
    return [tensor.clone() for tensor in live.values()], held


def work(root: Path) -> list[tuple[list[torch.Tensor], int]]:
    dist.init_process_group("gloo")
    return [run(*form) for form in FORMS]


def test_two_processes_take_the_steps_of_one_and_hold_half_each(tmp_path: Path) -> None:
    ranks = launch(2, work, tmp_path)
    for index, form in enumerate(FORMS):
        expected, everything = run(*form)
        assert ranks[0][index][1] + ranks[1][index][1] == everything
        assert max(ranks[0][index][1], ranks[1][index][1]) < 0.6 * everything
        for first, second, single in zip(ranks[0][index][0], ranks[1][index][0], expected, strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, single, atol=1e-12, rtol=0)
