"""Combiners of masks and norms, against values of the official functions (EMR, TALL masks) and by hand (MetaGPT)."""

import pytest
import torch

from lightning_merge.combiners import EMR, Consensus, MetaGPT, add_vector
from lightning_merge.weights import Weights

FORMS = pytest.mark.parametrize("form", [list, iter], ids=["list", "stream"])


def weights(a: object, b: object) -> Weights:
    return {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}


def flat(tensors: Weights) -> Weights:
    return {"all": torch.cat([tensors[name].reshape(-1) for name in ("a", "b")]).double()}


BASE = weights([[0.3, -0.1, 0.2], [0.5, -0.4, 0.1]], [0.05, -0.05])
VECTORS = [
    weights([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], [0.2, -0.4]),
    weights([[-0.5, -1.0, 2.0], [1.5, 1.0, -2.0]], [0.1, 0.6]),
    weights([[2.0, 1.0, -0.5], [-0.5, -1.0, 0.5]], [-0.9, 0.3]),
]
SUM = [2.5, -2.0, 2.0, 1.0, 3.0, -2.5, -0.6, 0.5]


def assert_equal(found: Weights, expected: Weights) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


@FORMS
def test_metagpt_weighs_by_squared_norms(form):
    merged = add_vector(BASE, MetaGPT().combine(form(VECTORS)))
    a = [
        [0.9759799833194329, -1.1041701417848209, 1.024020016680567],
        [0.9303586321934946, 1.033694745621351, -0.9387823185988325],
    ]
    assert_equal(merged, weights(a, [-0.019724770642201836, 0.05667222685571305]))


def test_metagpt_of_equal_norms_is_the_mean_and_does_not_depend_on_the_size():
    first, second = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 3.0, -4.0])
    for size in (1e-30, 1.0, 1e30):
        found = MetaGPT().combine([{"w": first * size}, {"w": torch.zeros(3)}, {"w": second * size}])["w"]
        torch.testing.assert_close(found / size, (first + second) / 2)


@FORMS
@pytest.mark.parametrize("min_tasks", [1, 2])
@pytest.mark.parametrize(
    ("threshold", "masks", "dropped"),
    [
        (0.2, [[1, 1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0, 1, 1]], []),
        (0.4, [[1, 1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 1, 1]], [2, 3, 6]),
        (0.6, [[1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0, 1, 1]], [2, 3, 4, 6]),
        (1.0, [[0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0, 1, 1]], [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_consensus_keeps_what_enough_masks_have(threshold, masks, dropped, min_tasks, form):
    combiner = Consensus(threshold, min_tasks, scale=1.0)
    kept = [0.0 if min_tasks == 2 and at in dropped else value for at, value in enumerate(SUM)]
    assert_equal(flat(combiner.combine(form(VECTORS))), {"all": torch.tensor(kept, dtype=torch.float64)})
    state = combiner.init(VECTORS[0])
    for task, vector in enumerate(VECTORS):
        combiner.update(state, vector, task=task)
    assert [flat(mask)["all"].int().tolist() for mask in combiner.masks(state)] == masks


def test_untouched_parameters_are_in_no_mask():
    combiner = Consensus(threshold=0.0)
    state = combiner.init({"w": torch.zeros(2)})
    combiner.update(state, {"w": torch.tensor([0.0, 1.0])})
    assert combiner.masks(state)[0]["w"].tolist() == [False, True]


MASKS = [
    ([[1, 1, 1], [0, 1, 1]], [0, 0]),
    ([[0, 1, 1], [1, 1, 1]], [0, 1]),
    ([[1, 0, 0], [0, 0, 0]], [1, 1]),
]


@FORMS
@pytest.mark.parametrize(
    ("rescaler", "factors"),
    [
        ("vector", [0.7363636363636363, 0.7837837837837838, 1.9142857142857144]),
        ("tensor", [0.8454545454545455, 0.8211382113821137, 1.4000000000000001]),
    ],
)
def test_emr_serves_each_task_by_a_mask_and_a_factor(rescaler, factors, form):
    combiner = EMR(rescaler)
    unified = combiner.combine(form(VECTORS))
    assert_equal(unified, weights([[2.0, -2.0, 2.0], [1.5, 3.0, -2.0]], [-0.9, 0.6]))
    for vector, (a, b), factor in zip(VECTORS, MASKS, factors, strict=True):
        masks, found = combiner.mask_of(vector, unified)
        assert found == pytest.approx(factor, abs=1e-9)
        assert {tensor.dtype for tensor in masks.values()} == {torch.bool}
        mask = weights(a, b)
        assert_equal({name: tensor.double() for name, tensor in masks.items()}, mask)
        served = {name: factor * mask[name] * unified[name] for name in unified}
        assert_equal(combiner.for_task(vector, unified), served)


def test_emr_values_of_the_official_functions_where_signs_cancel():
    rows = [
        [0.5, -0.25, 0, 0.125, -1, 0.75, 0.25, -0.5, 0.0625, 0],
        [-0.5, -0.75, 0.25, 0.125, 0.5, -0.25, 0.25, 0.5, -0.0625, 0],
        [0.25, 0.5, -0.25, -0.125, 0.5, 0, -0.5, 0, 1, 0],
    ]
    vectors = [{"w": torch.tensor(row)} for row in rows]
    unified = EMR().combine(vectors)
    assert unified["w"].tolist() == [0.5, -0.75, -0.25, 0.125, -1, 0.75, -0.5, -0.5, 1, 0]
    found = [EMR().mask_of(vector, unified)[1] for vector in vectors]
    assert found == pytest.approx([0.743243, 3.642857, 1.388889], abs=1e-6)


@pytest.mark.parametrize("combiner", [MetaGPT(), Consensus(scale=1.0), Consensus(threshold=9.0, scale=1.0), EMR()])
def test_one_task_is_that_task(combiner):
    assert_equal(combiner.combine(VECTORS[:1]), VECTORS[0])
    assert_equal(EMR().for_task(VECTORS[0], VECTORS[0]), VECTORS[0])


def test_a_task_that_agrees_nowhere_gets_no_vector():
    assert EMR().for_task({"w": torch.tensor([1.0])}, {"w": torch.tensor([-2.0])})["w"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consensus(threshold=-0.1), r"`threshold` must be at least 0, got -0.1"),
        (lambda: Consensus(min_tasks=0), "`min_tasks` must be .*1.*got 0"),
        (lambda: EMR("flat"), '`rescaler` must be "vector" or "tensor", got'),
        (lambda: EMR().for_task({"w": torch.ones(2)}, {"w": torch.ones(3)}), r"`w` has shape \(2,\) instead of"),
        (lambda: EMR().mask_of({"w": torch.tensor([float("nan")])}, {"w": torch.ones(1)}), "`w` .*holds a NaN"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()
