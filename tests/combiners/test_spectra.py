"""Combiners of singular values: printed values of the official functions, and their formulas in NumPy to 1e-9."""

import numpy as np
import pytest
import torch

from lightning_merge.combiners import TSVM, IsoC
from lightning_merge.weights import Weights

A = [[3, 0, 0], [0, 1, 0]]
B = [[0, 0, 2], [1, 0, 0]]
C = [[0, 0, 0.5], [1.2, 1.6, 0]]


def vector(values: object) -> Weights:
    return {"w": torch.tensor(values, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("combiner", "rows", "expected"),
    [
        (IsoC(), [A, B], [[1.863803, -0.363803, 1.485071], [0.985071, 2.076482, -0.727607]]),
        (IsoC("1/t"), [A, B], [[0.9319015, -0.1819015, 0.7425355], [0.4925355, 1.038241, -0.3638035]]),  # mammoth
        (IsoC(), [A, C], [[2.778637, -0.59014, 0.508501], [0.618915, 2.816332, -0.113488]]),
        (TSVM(), [A, C], [[2.84605, -0.948683, 0], [0.632456, 1.897367, 0]]),
    ],
)
@pytest.mark.parametrize("form", [list, iter], ids=["list", "stream"])
def test_printed_values_of_the_official_functions(combiner, rows, expected, form):
    found = combiner.combine(form([vector(row) for row in rows]))
    torch.testing.assert_close(found["w"], vector(expected)["w"], rtol=0, atol=1e-6)


def matrices(count: int, shape: tuple[int, int] = (7, 5)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((count, *shape)))


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix, full_matrices=False)


def plain_tsv_m(rows: list[np.ndarray]) -> np.ndarray:
    k = min(rows[0].shape) // len(rows)
    u, s, vt = zip(*(svd(row) for row in rows), strict=True)
    p, _, q = svd(np.hstack([each[:, :k] for each in u]))
    r, _, t = svd(np.vstack([each[:k] for each in vt]))
    return p @ q @ np.diag(np.concatenate([each[:k] for each in s])) @ r @ t


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("form", [list, iter], ids=["list", "stream"])
def test_results_are_those_of_the_formulas(tasks, shape, form):
    rows = matrices(tasks, shape)
    u, s, vt = svd(sum(rows))
    for combiner, expected in ((IsoC(1.3), 1.3 * s.mean() * u @ vt), (TSVM(1.3), 1.3 * plain_tsv_m(rows))):
        found = combiner.combine(form([vector(row) for row in rows]))["w"].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_all_singular_values_of_isotropic_merging_are_the_mean_of_those_of_the_sum():
    rows = matrices(3)
    found = np.linalg.svd(IsoC().combine([vector(row) for row in rows])["w"].numpy(), compute_uv=False)
    np.testing.assert_allclose(found, np.full(5, np.linalg.svd(sum(rows), compute_uv=False).mean()), atol=1e-9)


def test_one_task_is_that_task_and_other_tensors_are_the_mean():
    first, second = ({"w": torch.randn(4, 3), "b": torch.randn(4), "conv": torch.randn(2, 3, 1, 1)} for _ in range(2))
    for name, tensor in TSVM().combine([first]).items():
        torch.testing.assert_close(tensor, first[name])
    for combiner in (IsoC(), TSVM()):
        found = combiner.combine([first, second])
        for name in ("b", "conv"):
            torch.testing.assert_close(found[name], (first[name] + second[name]) / 2)


@pytest.mark.parametrize("combiner", [IsoC(), TSVM()], ids=repr)
def test_nothing_is_added_in_directions_in_which_no_task_has_a_part(combiner):
    # Vectors of low rank, as of adapters; both have the left vector e1.
    generator = torch.Generator().manual_seed(0)
    shared = torch.eye(8)[:, :1]
    rows = [{"w": (shared @ torch.randn(1, 8, generator=generator)).double()} for _ in range(2)]
    found = combiner.combine(rows)["w"]
    assert not found[1:].abs().max() > 1e-12
    assert found[0].norm() > 0.1
    if combiner == IsoC():  # the mean of its only singular value
        torch.testing.assert_close(found, rows[0]["w"] + rows[1]["w"], rtol=0, atol=1e-12)


def test_state_of_task_singular_vectors_does_not_grow_with_the_tasks():
    combiner, rows = TSVM(), matrices(12, (24, 24))
    state, sizes = combiner.init(vector(rows[0])), []
    for row in rows:
        combiner.update(state, vector(row))
        sizes.append(sum(state[key]["w"].numel() for key in ("sum", "left", "values", "right")))
    assert max(sizes) <= 3 * 24 * 24 + 24
    more = TSVM().combine([vector(row[:2]) for row in rows])["w"]  # more tasks than singular values: one of each
    assert torch.isfinite(more).all()
    assert more.norm() > 1
