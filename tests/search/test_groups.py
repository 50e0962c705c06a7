"""Coefficients per tensor: every method keeps to the space of each group, and finds what each group needs."""

import pytest

from lightning_merge.search import (
    CMAES,
    MAP,
    Bayesian,
    Evolutionary,
    Free,
    Gradient,
    Greedy,
    Grid,
    Line,
    Simplex,
    by_tensor,
    search,
)

TENSORS = ("a.weight", "a.bias", "b.weight")
WANTED = {"a.weight": 0.2, "a.bias": 0.2, "b.weight": 0.7}


def loss(coefficients, per="group"):
    shares = by_tensor(coefficients, TENSORS, per)
    return sum((shares[name][1] - wanted) ** 2 for name, wanted in WANTED.items())


METHODS = [
    (Evolutionary(), 300, 0.05),
    (Gradient(), 200, 0.02),
    (CMAES(), 300, 0.02),
    (MAP(25, 2), None, 1e-3),
    (Grid(0.1), None, 1e-9),
    (Line(), None, 0.6),
    (Greedy(), None, 0.6),
    (Bayesian(), 12, 0.3),
]


@pytest.mark.parametrize("space", [Simplex(), Free(0.0, 1.0)], ids=repr)
@pytest.mark.parametrize(("method", "budget", "tolerance"), METHODS, ids=lambda value: type(value).__name__)
def test_every_method_searches_each_group(method, budget, tolerance, space):
    if isinstance(method, Grid) and isinstance(space, Free):
        method = Grid(0.5)
        tolerance = 0.3
    found = search(loss, 2, method, space=space, mode="min", budget=budget, per="group", tensors=TENSORS)
    shares = by_tensor(found.coefficients, TENSORS, "group")
    for name, wanted in WANTED.items():
        assert shares[name][1] == pytest.approx(wanted, abs=tolerance)
        assert all(-1e-9 <= each <= 1 + 1e-9 for each in shares[name])
        if isinstance(space, Simplex):
            assert sum(shares[name]) == pytest.approx(1)


def test_per_tensor_has_a_coefficient_for_each_and_per_model_one():
    asked = {}
    for per, count in (("model", 2), ("group", 4), ("tensor", 6)):
        search(lambda a, per=per: asked.setdefault(per, a) and 0.0, 2, Greedy(), per=per, tensors=TENSORS)
        assert len(asked[per]) == count
        assert {each[0] for each in by_tensor(asked[per], TENSORS, per).values()} == {1.0}


def test_what_is_not_mixed_is_whole_in_every_group():
    found = search(lambda a: float(a == (0, 0, 0, 0, 1, 1)), 3, Greedy(), whole=1, per="group", tensors=TENSORS)
    assert found.coefficients == (0, 0, 0, 0, 1, 1)
    assert all(set(each.coefficients[4:]) in ({0.0}, {1.0}) for each in found.history)


def test_the_log_of_another_grouping_is_refused(tmp_path):
    search(loss, 2, Greedy(), per="group", tensors=TENSORS, log=tmp_path / "log", mode="min")
    with pytest.raises(ValueError, match="log of another search"):
        search(lambda a: 0.0, 2, Greedy(), per="tensor", tensors=TENSORS, log=tmp_path / "log", mode="min")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per": "layer"}, "`per` must be 'model', 'tensor' or 'group', got 'layer'"),
        ({"tensors": ()}, "`tensors` must name the tensors where `per` is 'tensor'"),
        ({"tensors": ("a", "a")}, "`tensors` must be at most .* names, each once"),
        ({"candidates": [(0.5, 0.5)]}, "`candidates` must be 6 coefficients each"),
        ({"method": Grid(), "tensors": [str(i) for i in range(9)]}, "at most 8 groups for a grid"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {"score": lambda a: 0.0, "count": 2, "method": Greedy(), "per": "tensor", "tensors": TENSORS} | change
    with pytest.raises(ValueError, match=message):
        search(**given)


def test_coefficients_of_another_search_are_refused():
    with pytest.raises(ValueError, match="`coefficients` must be 2 for each ingredient, got 3"):
        by_tensor((1.0, 2.0, 3.0), TENSORS, "group")
