"""What combiners compute, against values of the official functions and of closed forms (float64, to 1e-6)."""

from itertools import permutations

import pytest
import torch

import lightning_merge.combiners._dare as dare_module
from lightning_merge.combiners import (
    DARE,
    EMR,
    OPCM,
    SLERP,
    TIES,
    TSVM,
    Average,
    Breadcrumbs,
    Combiner,
    Consensus,
    ExponentialAverage,
    IsoC,
    MagMax,
    MetaGPT,
    ModelStock,
    Sum,
    add_vector,
    analogy,
    negate,
    slerp,
    task_vector,
)
from lightning_merge.weights import Weights

BASE = [1, -1, 0.5, 2, -2, 0.25, 0, 1.5, -0.5, 3]
# With zeros, equal magnitudes of opposite sign, and columns that sum to zero.
TV = [
    [0.5, -0.25, 0, 0.125, -1, 0.75, 0.25, -0.5, 0.0625, 0],
    [-0.5, -0.75, 0.25, 0.125, 0.5, -0.25, 0.25, 0.5, -0.0625, 0],
    [0.25, 0.5, -0.25, -0.125, 0.5, 0, -0.5, 0, 1, 0],
]
# With distinct magnitudes in each row.
U = [
    [0.10, -0.20, 0.30, -0.40, 0.50, -0.60, 0.70, -0.80, 0.90, -1.0],
    [-0.15, 0.25, 0.35, -0.45, -0.55, 0.65, -0.75, 0.85, -0.95, 0.05],
    [0.12, -0.22, -0.32, 0.42, 0.52, -0.62, -0.72, 0.82, -0.02, 0.08],
]
HALVES = [U[0][:5], U[0][5:]]
OFFICIAL = {"scope": "global", "topk_rule": "official_plus_one", "zero_sign": "official"}
D3 = [[[1, 0], [1, 1]], [[1, 1], [0, 1]], [[0, 1], [1, 0]]]
GROWING = [
    [[4, 0, 0], [0, 2, 0], [0, 0, 1]],
    [[0.25, 0.5, 0.75], [1, 1.25, 1.5], [1.75, 2, 2.25]],
    [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
]

# (combiner, vectors, expected)
VALUES = [
    (Sum(1.0), TV, [0.25, -0.5, 0, 0.125, 0, 0.5, 0, 0, 1, 0]),
    (Sum(0.3), TV, [0.075, -0.15, 0, 0.0375, 0, 0.15, 0, 0, 0.3, 0]),
    (Sum("1/t"), TV, [1 / 12, -1 / 6, 0, 1 / 24, 0, 1 / 6, 0, 0, 1 / 3, 0]),
    (Average(), TV[:2], [0, -0.5, 0.125, 0.125, -0.25, 0.25, 0.25, 0, 0, 0]),
    (Average(), TV, [1 / 12, -1 / 6, 0, 1 / 24, 0, 1 / 6, 0, 0, 1 / 3, 0]),
    (ExponentialAverage(0.4), TV[:2], [0.1, -0.45, 0.1, 0.125, -0.4, 0.35, 0.25, -0.1, 0.0125, 0]),
    (ExponentialAverage(0.4), TV, [0.16, -0.07, -0.04, 0.025, -0.04, 0.21, -0.05, -0.06, 0.4075, 0]),
    (MagMax(1.0), TV[:1], TV[0]),
    (MagMax(1.0), TV[:2], [-0.5, -0.75, 0.25, 0.125, -1, 0.75, 0.25, 0.5, -0.0625, 0]),
    (MagMax(1.0), TV, [-0.5, -0.75, -0.25, -0.125, -1, 0.75, -0.5, 0.5, 1, 0]),
    (MagMax(1.0), TV[::-1], [0.5, -0.75, 0.25, 0.125, -1, 0.75, -0.5, -0.5, 1, 0]),
    (MagMax(1.0, "first"), TV, [0.5, -0.75, 0.25, 0.125, -1, 0.75, -0.5, -0.5, 1, 0]),
    (MagMax(0.5), U, [-0.075, 0.125, 0.175, -0.225, -0.275, 0.325, -0.375, 0.425, -0.475, -0.5]),
    # TIES as the official code has it: one more than k, all ties, zero signs from the majority.
    (TIES(0.2, **OFFICIAL), TV, [-0.5, -0.75, 0, 0, -1, 0.75, -0.5, -0.5, 1, 0]),
    (TIES(0.2, divisor=None, **OFFICIAL), TV, [-0.5, -0.75, 0, 0, -1, 0.75, -0.5, -0.5, 1, 0]),
    (TIES(0.5, **OFFICIAL), TV, [0.375, -0.5, 0.25, 0, 0.5, 0.75, 0.25, 0.5, 1, 0]),
    (TIES(0.5, divisor=None, **OFFICIAL), TV, [0.75, -1, 0.25, 0, 1, 0.75, 0.5, 0.5, 1, 0]),
    (TIES(0.99, **OFFICIAL), TV, [0.375, -0.5, 0.25, 0.125, 0.5, 0.75, 0.25, 0.5, 0.53125, 0]),
    (TIES(0.99, divisor=None, **OFFICIAL), TV, [0.75, -1, 0.25, 0.25, 1, 0.75, 0.5, 0.5, 1.0625, 0]),
    (TIES(0.01, **OFFICIAL), TV, [0, -0.75, 0, 0, -1, 0, 0, 0, 1, 0]),  # its K=0: one entry of each
    (TIES(0.2, **OFFICIAL), U, [0, 0, 0, 0, 0, -0.62, -0.735, 0.835, -0.95, -1]),
    (TIES(0.2, divisor=None, **OFFICIAL), U, [0, 0, 0, 0, 0, -0.62, -1.47, 1.67, -0.95, -1]),
    (TIES(0.4, **OFFICIAL), U, [0, 0, 0, 0.42, -0.55, -0.61, -0.735, 0.835, -0.95, -1]),
    (TIES(0.4, divisor=None, **OFFICIAL), U, [0, 0, 0, 0.42, -0.55, -1.22, -1.47, 1.67, -0.95, -1]),
    (TIES(0.5, **OFFICIAL), U, [0, 0, -0.32, -0.45, 0.51, -0.61, -0.735, 0.835, -0.95, -1]),
    # MergeLM keeps zero signs at zero.
    (TIES(0.2, **{**OFFICIAL, "zero_sign": "zero"}), TV, [0, -0.75, 0, 0, 0, 0.75, -0.5, 0, 1, 0]),
    # mergekit and PEFT: exactly k, zero counts as positive; then their weights.
    (TIES(0.2, zero_sign="positive"), U, [0, 0, 0, 0, 0, 0, -0.72, 0.835, -0.95, -1]),
    (TIES(0.4, zero_sign="positive"), U, [0, 0, 0, 0, 0.52, 0.65, -0.735, 0.835, -0.95, -1]),
    (TIES(0.5, zero_sign="positive"), U, [0, 0, 0, 0.42, -0.55, -0.61, -0.735, 0.835, -0.95, -1]),
    (TIES(1.0, zero_sign="positive"), TV, [0.375, -0.5, 0.25, 0.125, 0.5, 0.75, 0.25, 0.5, 0.53125, 0]),
    (TIES(1.0, zero_sign="positive", divisor=None), TV, [0.75, -1, 0.25, 0.25, 1, 0.75, 0.5, 0.5, 1.0625, 0]),
    (
        TIES(0.4, zero_sign="positive", divisor="weight_sum", weights={0: 1.0, 1: 2.0, 2: 0.5}),
        U,
        [0, 0, 0, 0, 0.52, 0.65, -0.744, 0.844, -0.95, -1],
    ),
    (
        TIES(0.4, zero_sign="positive", weighted_sign=False, weights={0: 1.0, 1: 2.0, 2: 0.5}),
        U,
        [0, 0, 0, 0, 0.26, 1.3, -0.93, 1.055, -1.9, -1],
    ),
    # The policies for columns that cancel.
    (TIES(1.0, **OFFICIAL), [[1, -1, 2, -2, 0, 3], [-1, 1, -2, 2, 0, 1]], [1, 1, 2, 2, 0, 2]),
    (TIES(1.0, zero_sign="positive"), [[1, -1, 2, -2, 0, 3], [-1, 1, -2, 2, 0, 1]], [1, 1, 2, 2, 0, 2]),
    (TIES(1.0, zero_sign="zero"), [[1, -1, 2, -2, 0, 3], [-1, 1, -2, 2, 0, 1]], [0, 0, 0, 0, 0, 2]),
    (TIES(1.0, **OFFICIAL), [[1, -1, 2, -2, 0, -3], [-1, 1, -2, 2, 0, -1]], [-1, -1, -2, -2, 0, -2]),
    (TIES(1.0, zero_sign="positive"), [[1, -1, 2, -2, 0, -3], [-1, 1, -2, 2, 0, -1]], [1, 1, 2, 2, 0, -2]),
    (TIES(1.0, **OFFICIAL), [[1, -2], [-1, 2]], [-1, -2]),
    (TIES(1.0, zero_sign="positive"), [[1, -2], [-1, 2]], [1, 2]),
    (TIES(1.0, zero_sign="zero"), [[1, -2], [-1, 2]], [0, 0]),
    # Of equal magnitudes at the border the first are kept.
    (TIES(0.2), TV[:1], [0, 0, 0, 0, -1, 0.75, 0, 0, 0, 0]),
    (TIES(0.3), TV[:1], [0.5, 0, 0, 0, -1, 0.75, 0, 0, 0, 0]),
    # The furthest of those that agree; a sign of zero elects nobody.
    (TIES(0.2, disjoint="max", **OFFICIAL), TV, [0, -0.75, 0, 0, 0, 0.75, -0.5, 0, 1, 0]),
    (TIES(0.5, disjoint="max", **OFFICIAL), TV, [0.5, -0.75, 0.25, 0, 0.5, 0.75, 0.25, 0.5, 1, 0]),
    (TIES(0.99, disjoint="max", **OFFICIAL), TV, [0.5, -0.75, 0.25, 0.125, 0.5, 0.75, 0.25, 0.5, 1, 0]),
    (TIES(0.01, disjoint="max", **OFFICIAL), TV, [0, -0.75, 0, 0, -1, 0, 0, 0, 1, 0]),
    (TIES(1.0, disjoint="max", **OFFICIAL), [[1, -2], [-1, 2]], [0, 0]),
    (TIES(1.0, disjoint="max", weights={0: 3.0}), [[1, -2], [2, -1]], [3, -6]),
    (Breadcrumbs(0.6, 0.2, 1.0, "row"), [HALVES], [[0, -0.2, 0.3, -0.4, 0], [0, 0.7, -0.8, 0.9, 0]]),
    (Breadcrumbs(0.4, 0.2, 1.0, "row"), [HALVES], [[0, 0, 0.3, -0.4, 0], [0, 0, -0.8, 0.9, 0]]),
    (Breadcrumbs(0.2, 0.1, 1.0, "row"), [HALVES], [[0, 0, 0, 0, 0.5], [0, 0, 0, 0, -1]]),
    (Breadcrumbs(0.4, 0.4, 1.0, "row"), [HALVES], [[0, -0.2, 0.3, 0, 0], [0, 0.7, -0.8, 0, 0]]),
    (Breadcrumbs(0.4, 0.1, 1.0, "row"), U[:1], [0, 0, 0, 0, 0, -0.6, 0.7, -0.8, 0.9, 0]),
    (Breadcrumbs(0.2, 0.1, 1.0, "row"), [[[[3, 2, 1]], [[0, -1, 0]]]], [[[3, 0, 0]], [[0, -1, 0]]]),  # zeros there
    (Breadcrumbs(0.4, 0.1, 1.0), U[:1], [0, 0, 0, 0, 0, -0.6, 0.7, -0.8, 0.9, 0]),
    (Breadcrumbs(0.5, 0.2, 1.0), U[:1], [0, 0, 0, -0.4, 0.5, -0.6, 0.7, -0.8, 0, 0]),
    (Breadcrumbs(0.5, 0.1, 1.0), U[:1], [0, 0, 0, 0, 0.5, -0.6, 0.7, -0.8, 0.9, 0]),
    (Breadcrumbs(0.5, 0.1, 1.0), U, [0, 0, -0.32, -0.03, 0.47, -0.57, -0.77, 0.05, 0.9, 0]),
    (Breadcrumbs(0.4, 0.2, 1.0), TV[:1], [0.5, -0.25, 0, 0, 0, 0, 0.25, -0.5, 0, 0]),
    (Breadcrumbs(0.4, 0.05, 1.0), TV[:1], [0.5, 0, 0, 0, -1, 0.75, 0, -0.5, 0, 0]),  # mergekit: all zeros
    # Deltas from the identity; merged is base plus this.
    (ModelStock(), D3[:2], [[0.8, 0.4], [0.4, 0.8]]),
    (ModelStock("mean_deg"), D3[:2], [[0.8, 0.4], [0.4, 0.8]]),
    (ModelStock(), D3, [[0.497178, 0.497178], [0.497178, 0.497178]]),
    (ModelStock("mean_deg"), D3, [[0.5, 0.5], [0.5, 0.5]]),
    (ModelStock(scope="row"), D3[:2], [[0.828427, 0.414214], [0.414214, 0.828427]]),
    (ModelStock("mean_deg", "row"), D3[:2], [[0.828427, 0.414214], [0.414214, 0.828427]]),
    (ModelStock(scope="row"), D3, [[0.485281, 0.485281], [0.485281, 0.485281]]),
    (ModelStock(scope="row"), [[[[1], [2]]], [[[1], [2]]]], [[[1], [2]]]),
    (ModelStock(), [[1, 2], [1, 2]], [1, 2]),
    (ModelStock(), [[1, 2], [-1, -2]], [0, 0]),  # mergekit: NaN
    (ModelStock(), [[1, 0], [-0.6, 0.8]], [0, 0]),  # mergekit goes to the other side of the base
    (SLERP(), [[1, 0, 0], [0, 2, 0]], [0.7071067812, 1.4142135624, 0]),
    (SLERP(0.25), [[1, 0, 0], [0, 2, 0]], [0.9238795325, 0.7653668647, 0]),
    (SLERP(), [[1, 2], [2, 4]], [1.5, 3]),
    (SLERP(), [[1, 2], [-1, -2]], [0, 0]),
    (SLERP(), [[0, 0], [0, 2]], [0, 1]),  # on deltas nuslerp gives sin(45 degrees) of it
    (SLERP(), TV[:2], [0, -1.005579, 0.251395, 0.251395, -0.50279, 0.50279, 0.50279, 0, 0, 0]),
    (SLERP(scale=0.3), TV[:2], [0, -0.301674, 0.075419, 0.075419, -0.150837, 0.150837, 0.150837, 0, 0, 0]),
    (
        OPCM(),
        GROWING[:2],
        [[3.106291, 0.388286, 0.58243], [0.776573, 1.553146, 1.164859], [1.359002, 1.553146, 0.776573]],
    ),
    (
        OPCM(),
        GROWING,
        [[2.184092, 0.618456, 0.204646], [0.327327, 1.338892, 1.325897], [1.344648, 1.046258, 0.759559]],
    ),
]


def vector(values: object, dtype: torch.dtype = torch.float64) -> Weights:
    return {"w": torch.tensor(values, dtype=dtype)}


def assert_close(found: Weights, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found["w"].double(), vector(expected)["w"], rtol=0, atol=atol)


@pytest.mark.parametrize(("combiner", "rows", "expected"), VALUES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values(combiner: Combiner, rows, expected, dtype):
    assert_close(combiner.combine([vector(row, dtype) for row in rows]), expected)


@pytest.mark.parametrize(
    ("alpha", "rule", "expected"),
    [
        (0.0, "compat", [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.5, "compat", [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.6, "compat", [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.9, "compat", [[0, 0, 3], [0, 0, 6], [7, 8, 0]]),
        (1.0, "compat", [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.0, "fixed", [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.5, "fixed", [[0, 2, 3], [4, 0, 6], [7, 8, 0]]),
        (0.6, "fixed", [[0, 0, 3], [0, 0, 6], [7, 8, 0]]),
        (0.9, "fixed", [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        (1.0, "fixed", [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_opcm_projects_against_the_directions_that_hold_a_share_of_the_singular_values(alpha, rule, expected):
    merged = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    new = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    assert_close({"w": OPCM(alpha, rule)._project(new, merged)}, expected, atol=1e-12)


def test_opcm_keeps_the_norm_of_a_task_and_what_it_was_scaled_by():
    opcm = OPCM()
    state = opcm.init(vector(GROWING[0]))
    for row, factor, norm in zip(GROWING, (1.0, 1.287709, 1.656078), (4.582576, 4.401531, 3.511704), strict=True):
        opcm.update(state, vector(row))
        assert state["factor"] == pytest.approx(factor, abs=1e-6)
        assert state["norms"] / state["updates"] == pytest.approx(norm, abs=1e-6)
        assert opcm.result(state)["w"].norm().item() == pytest.approx(norm, abs=1e-6)


def test_opcm_of_a_wide_matrix_equals_the_projection_with_all_singular_vectors():
    torch.manual_seed(0)
    merged, new = torch.randn(2, 3, 7, dtype=torch.float64)
    for a, b in ((merged, new), (merged.T.contiguous(), new.T.contiguous())):
        u, _, vt = torch.linalg.svd(a, full_matrices=True)
        rotated = u.T @ b @ vt.T
        rotated[:2, :2] = 0
        rotated.fill_diagonal_(0)
        torch.testing.assert_close(OPCM(0.9)._project(b, a), u @ rotated @ vt)


MASKS = [[1, 0, 1, 1, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("combiner", "rows", "masks", "expected"),
    [
        (DARE(Sum(1.0)), 1, MASKS, [1, 0, 0, 0.25, -2, 0, 0.5, 0, 0.125, 0]),
        (DARE(Sum(1.0)), 1, [[1 - m for m in MASKS[0]]], [0, -0.5, 0, 0, 0, 1.5, 0, -1, 0, 0]),  # MergeLM, FusionBench
        (
            DARE(Sum(1.0), dare_rescale="l1"),
            1,
            MASKS,
            [0.887097, 0, 0, 0.221774, -1.774194, 0, 0.443548, 0, 0.110887, 0],
        ),
        (DARE(Sum(1.0), dare_rescale=None), 1, MASKS, [0.5, 0, 0, 0.125, -1, 0, 0.25, 0, 0.0625, 0]),
        (DARE(Sum(1.0)), 3, MASKS, [0, -1.5, 0, 0.5, 0, 0, 0.5, 0, 2, 0]),
        (DARE(Average()), 3, MASKS, [0, -0.5, 0, 1 / 6, 0, 0, 1 / 6, 0, 2 / 3, 0]),
        (DARE(TIES(1.0, zero_sign="positive")), 3, MASKS, [1, -1.5, 0.5, 0.25, 1, 0, 0.5, 0, 1.0625, 0]),
        (
            DARE(Sum(1.0), dare_rescale="l1"),
            3,
            MASKS,
            [0.158525, -1.092857, -0.082143, 0.403917, -0.152765, 0, 0.443548, 0, 1.80553, 0],
        ),
        (
            DARE(TIES(1.0, zero_sign="positive", divisor=None), dare_rescale="l1"),
            3,
            MASKS,
            [0.887097, -1.092857, -0.446429, 0.403917, -1.774194, 0, 0.443548, 0, 1.896601, 0],
        ),
    ],
)
def test_dare_values_for_given_masks(combiner, rows, masks, expected, monkeypatch):
    monkeypatch.setattr(dare_module, "_kept", lambda tensor, dare, task, name: torch.tensor(masks[task]).bool())
    assert_close(combiner.combine([vector(row) for row in TV[:rows]]), expected)


def test_dare_draws_from_seed_task_and_name_alone_and_keeps_the_mean():
    many = {"w": torch.ones(100_000), "v": torch.ones(100_000)}
    dare = DARE(Sum(1.0), density=0.3, seed=1)
    merged = dare.combine([many], ["cars"])
    assert merged["w"].mean().item() == pytest.approx(1.0, abs=0.02)
    assert merged["w"].unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert not torch.equal(merged["w"], merged["v"])
    assert not torch.equal(merged["w"], dare.combine([many], ["pets"])["w"])
    assert not torch.equal(merged["w"], DARE(Sum(1.0), density=0.3, seed=2).combine([many], ["cars"])["w"])
    torch.rand(3)  # the global state has no part in it
    assert torch.equal(merged["w"], dare.combine([{"w": many["w"]}], ["cars"])["w"])
    # On every platform the same.
    assert merged["w"][:12].bool().int().tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_vectors_models_negation_and_analogy():
    base = {"w": torch.tensor(BASE, dtype=torch.float64), "steps": torch.tensor(3)}
    trained = {"w": base["w"] + torch.tensor(TV[0], dtype=torch.float64), "steps": torch.tensor(9)}
    found = task_vector(trained, base)
    assert list(found) == ["w"]
    assert_close(found, TV[0])
    merged = add_vector(base, Sum(0.3).combine([vector(row) for row in TV]))
    assert_close(merged, [1.075, -1.15, 0.5, 2.0375, -2, 0.4, 0, 1.5, -0.2, 3])
    assert merged["steps"].item() == 3
    assert_close(negate(found, 0.5), [-x / 2 for x in TV[0]])
    assert_close(analogy(*(vector(row) for row in TV)), [c + b - a for a, b, c in zip(*TV, strict=True)])


def test_vectors_of_bfloat16_models_are_taken_and_added_in_float32():
    base = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    assert task_vector({"w": torch.tensor([1.0078125], dtype=torch.bfloat16)}, base)["w"].dtype == torch.float32
    merged = add_vector(base, {"w": torch.tensor([0.0039])})
    assert merged["w"].dtype == torch.bfloat16
    assert add_vector({"w": base["w"].float()}, {"w": torch.tensor([0.0039])})["w"].item() == pytest.approx(1.0039)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: task_vector({"w": torch.ones(2)}, {"w": torch.ones(3)}), r"`w` has shape \(2,\) instead of \(3,\)"),
        (lambda: task_vector({"w": torch.tensor([float("nan")])}, {"w": torch.ones(1)}), "`w` holds a NaN"),
        (lambda: add_vector({"w": torch.ones(2)}, {"v": torch.ones(2)}), r"`v` of shape \(2,\) .* not in the base"),
        (lambda: negate({}, scale=0.0), "`scale` must be a positive number, got 0.0"),
        (lambda: analogy({"w": torch.ones(2)}, {"w": torch.ones(2)}, {}), "`w` of shape .* is missing"),
    ],
)
def test_vectors_that_do_not_belong_together_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()


@pytest.mark.parametrize(
    "combiner",
    [
        *(Sum(), Average(), TIES(0.5), TIES(0.5, scope="global"), Breadcrumbs(), ModelStock(), MagMax()),
        *(TIES(0.5, disjoint="max"), Breadcrumbs(scope="row"), ModelStock(scope="row")),
        *(IsoC(), TSVM(), MetaGPT(), Consensus(), EMR()),
    ],
    ids=repr,
)
def test_order_of_the_tasks_does_not_matter(combiner):
    generator = torch.Generator().manual_seed(0)
    rows = [{"w": torch.randn(5, 10, generator=generator, dtype=torch.float64)} for _ in range(4)]
    first = combiner.combine(rows)
    for order in permutations(rows):
        torch.testing.assert_close(combiner.combine(list(order)), first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("combiner", [ExponentialAverage(), SLERP(), OPCM()], ids=repr)
def test_order_of_the_tasks_matters_where_the_docstring_says_so(combiner):
    assert "order of the tasks matters" in type(combiner).__doc__
    rows = [{"w": torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    assert not torch.allclose(combiner.combine(rows)["w"], combiner.combine(rows[::-1])["w"])


def test_magmax_of_the_same_vector_again_is_that_vector():
    row = vector(U[0])
    assert torch.equal(MagMax(1.0).combine([row, row, row])["w"], row["w"])


def test_ties_stream_equals_a_plain_batch_implementation():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.randn(5, 400, generator=generator, dtype=torch.float64)
        rows[torch.rand(rows.shape, generator=generator) < 0.3] = 0
        kept = torch.zeros_like(rows)
        for row, target in zip(rows, kept, strict=True):
            index = row.abs().sort(descending=True, stable=True).indices[:80]
            target[index] = row[index]
        agree = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        expected = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(TIES(0.2).combine([{"w": row} for row in rows])["w"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("combiner", [TIES(1.0), DARE(TIES(1.0), density=1.0)], ids=["TIES", "DARE"])
def test_ties_counts_beyond_what_fits_a_byte(combiner):
    state = combiner.init({"w": torch.zeros(2)})
    for _ in range(300):
        combiner.update(state, {"w": torch.tensor([1.0, -2.0])})
    assert combiner.result(state)["w"].tolist() == [1.0, -2.0]


def test_global_ranking_is_over_all_tensors_and_frozen_ones_do_not_count():
    rows = {"big": torch.tensor([10.0, -9.0, 8.0, 1.0]), "small": torch.tensor([0.1, 0.2, -0.3, 0.4])}
    whole = TIES(0.5, scope="global")
    assert whole.combine([rows])["big"].all()
    assert not whole.combine([rows])["small"].any()
    with_frozen = whole.combine([{**rows, "frozen": torch.zeros(1000)}])
    assert torch.equal(with_frozen["big"], whole.combine([rows])["big"])
    assert torch.equal(with_frozen["small"], whole.combine([rows])["small"])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_tensors_keep_at_least_one_entry(size):
    values = {"w": torch.arange(1.0, size + 1)}
    for combiner in (TIES(0.05), Breadcrumbs(0.05, 0.05, 1.0)):
        assert combiner.combine([values])["w"].tolist() == [0.0] * (size - 1) + [float(size)]


@pytest.mark.parametrize("combiner", [ExponentialAverage(alpha=1.0), SLERP(t=1.0)], ids=repr)
@pytest.mark.parametrize("form", [list, iter], ids=["list", "stream"])
def test_a_share_of_one_is_the_last_vector_whatever_came_before(combiner, form):
    first, last = {"w": torch.tensor([1e8, -3.0, 0.1])}, {"w": torch.tensor([1.0, 1e-9, 0.7])}
    assert torch.equal(combiner.combine(form([first, last]))["w"], last["w"])


def test_slerp_reaches_both_ends():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([-2.0, 3.0])
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TIES(density=0.0), r"`density` must be in \(0, 1\], got 0.0"),
        (lambda: TIES(scope="layer"), "`scope` must be one of .*'tensor', 'global'.*got 'layer'"),
        (lambda: TIES(topk_rule="all"), "`topk_rule` must be one of"),
        (lambda: TIES(zero_sign="minus"), "`zero_sign` must be one of"),
        (lambda: TIES(divisor="tasks"), "`divisor` must be one of"),
        (lambda: TIES(weights={"a": -1.0}), "`weights` must be positive numbers, got -1.0 for task a"),
        (lambda: DARE(density=1.5), r"`density` must be in \(0, 1\], got 1.5"),
        (lambda: DARE(DARE()), "`combiner` must be a combiner other than DARE"),
        (lambda: DARE(dare_rescale="l2"), "`dare_rescale` must be"),
        (lambda: Breadcrumbs(density=0.0), "`density` must be"),
        (lambda: Breadcrumbs(density=0.6, outliers=0.5), r"`outliers` must be in \[0, 1\) and at most 1 - density"),
        (lambda: ExponentialAverage(alpha=0.0), r"`alpha` must be in \(0, 1\], got 0.0"),
        (lambda: MagMax(magmax_tie="newest"), '`magmax_tie` must be "last" or "first"'),
        (lambda: OPCM(alpha=1.1), r"`alpha` must be in \[0, 1\], got 1.1"),
        (lambda: OPCM(opcm_rank="full"), '`opcm_rank` must be "compat" or "fixed"'),
        (lambda: TIES(disjoint="sum"), "`disjoint` must be one of .*'mean', 'max'.*got 'sum'"),
        (lambda: Breadcrumbs(scope="global"), "`scope` must be 'tensor' or 'row', got 'global'"),
        (lambda: ModelStock(scope="layer"), "`scope` must be 'tensor' or 'row', got 'layer'"),
        (lambda: ModelStock("mean"), '`stock_angle` must be "mean_cos" or "mean_deg"'),
        (lambda: SLERP(t=-0.1), r"`t` must be in \[0, 1\], got -0.1"),
    ],
)
def test_values_out_of_range_are_errors_that_name_the_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
