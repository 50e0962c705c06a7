"""MAP and CMA-ES agree with their codes, and find trade-offs and valleys.

MAP: ``quadratic_model`` and ``fit_quadratic_from_json`` of its repository at 7d871dc, without an activation. CMA-ES:
the package ``cmaes`` 0.13.1, which was told the same populations.
"""

import math

import numpy as np
import pytest

from lightning_merge.search import CMAES, MAP, Free, Measured, pareto_set, search
from lightning_merge.search._cma import Normal
from lightning_merge.search._map import fitted, terms

PLACES = np.array([[0.1 * ((3 * i + 1) % 11), 0.1 * ((7 * i + 2) % 13)] for i in range(10)])
SCORES = np.array(
    [
        [0.5 + 0.3 * math.sin(2 * a) - 0.2 * b * b + 0.1 * a * b, 0.4 - 0.1 * a + 0.25 * math.cos(b)]
        for a, b in PLACES.tolist()
    ]
)
OFFICIAL = [
    [
        *(-0.4575773192088597, -0.18926396232123155, 0.06560597129655033),
        *(0.7714253578861793, 0.0005381896955047871, 0.4839275081158344),
    ],
    [
        *(0.005683101335405113, -0.10402520494850172, -0.004068740548405194),
        *(-0.10434888649676738, -0.009027232535229435, 0.6511976760546897),
    ],
]
UNIT = Free(0.0, 1.0)


def test_terms_of_a_quadratic_are_those_of_the_official_model():
    model = np.array([0.5, -0.2, 0.3, 0.7, -0.6, 0.1, 0.05, 0.4, -0.9, 0.25])
    predicted = terms(np.array([[0.2, 0.5, -0.3], [1.0, -0.4, 0.7]])) @ model
    assert predicted.tolist() == pytest.approx([0.818, -0.603], abs=1e-12)


def test_the_fit_is_the_official_one_up_to_where_its_iteration_stops():
    found = fitted(PLACES, SCORES).T
    for own, official, scores in zip(found, np.array(OFFICIAL), SCORES.T, strict=True):
        np.testing.assert_allclose(own, official, atol=1e-6)
        off = [terms(PLACES) @ model - scores for model in (own, official)]
        assert np.sum(off[0] ** 2) <= np.sum(off[1] ** 2)
        np.testing.assert_allclose(terms(PLACES).T @ off[0], 0, atol=1e-12)


def trade(a):
    """Two tasks that want different corners: what no other beats is the line between them."""
    parts = (-((a[0] - 1) ** 2) - 2 * a[1] ** 2, -(a[0] ** 2) - 2 * (a[1] - 1) ** 2)
    return Measured(sum(parts) / 2, parts=parts)


def loss(a):
    return Measured(-trade(a).value, parts=tuple(-part for part in trade(a).parts))


def test_map_finds_the_trade_offs_of_quadratic_tasks():
    found = search(trade, 2, MAP(samples=8, points=6), space=UNIT)
    assert len(found.history) == 8 + 6 - 3  # the corners and the middle are among the samples
    assert found.coefficients == pytest.approx((0.5, 0.5), abs=1e-6)
    proposed = [each.coefficients for each in found.history[8:]]
    for a in proposed:
        assert a[0] + a[1] == pytest.approx(1, abs=1e-6)
    assert {each.coefficients for each in pareto_set(found)} >= set(proposed)
    low = search(loss, 2, MAP(8, 6), space=UNIT, mode="min")
    assert low.coefficients == pytest.approx(found.coefficients, abs=1e-6)
    assert len(pareto_set(low, "min")) == len(pareto_set(found))


def test_parts_are_kept_in_the_log(tmp_path):
    whole = search(trade, 2, MAP(8, 6), space="free")
    search(trade, 2, MAP(8, 6), space="free", budget=9, log=tmp_path / "log")
    again = search(trade, 2, MAP(8, 6), space="free", log=tmp_path / "log")
    history = [[(each.coefficients, each.parts) for each in found.history] for found in (whole, again)]
    assert history[0] == history[1]
    assert sum(each.from_log for each in again.history) == 9


def test_map_takes_what_is_rejected_and_refuses_parts_that_change():
    found = search(lambda a: math.nan if a[0] > 0.9 else trade(a), 2, MAP(12, 3), space=UNIT)
    assert found.coefficients == pytest.approx((0.5, 0.5), abs=1e-6)
    lost = Measured(math.nan, parts=(0.5, math.nan))
    again = search(lambda a: lost if a[0] > 0.9 else trade(a), 2, MAP(12, 3), space=UNIT)
    assert again.coefficients == found.coefficients
    with pytest.raises(ValueError, match="`parts` of a score must be equally many"):
        search(lambda a: trade(a) if a[0] else 1.0, 2, MAP())
    with pytest.raises(ValueError, match="at most 100 coefficients for MAP, got 102"):
        search(lambda a: 0.0, 2, MAP(), per="tensor", tensors=[str(i) for i in range(51)])


@pytest.mark.parametrize(
    ("mean", "population", "expected"),
    [
        (
            [0.1, 0.2, 0.3],
            7,
            (
                [0.17816400453623027, -0.04172041474378829, -0.2419830710703405],
                0.32543062099246123,
                [
                    [1.3266301643406941, 0.2260157215488601, -0.024419818331641058],
                    [0.22601572154886004, 1.243254167774278, 0.23977690506539467],
                    [-0.024419818331641016, 0.23977690506539467, 1.3555672333528592],
                ],
            ),
        ),
        (
            [0.1, 0.2],
            6,
            (
                [0.22354210776986616, -0.0102113675314639],
                0.30640829418951493,
                [[1.3180148271153818, 0.4287368869799645], [0.4287368869799646, 1.5213479955587828]],
            ),
        ),
    ],
)
def test_the_distribution_is_that_of_another_code_after_four_populations(mean, population, expected):
    normal = Normal(mean, 0.25, population)
    for number in range(4):
        places = [[1.3 * (i + 1) + 0.7 * (j + 1) + 2.1 * number for j in range(len(mean))] for i in range(population)]
        normal.follow(np.sin(places) / 2)
    np.testing.assert_allclose(normal.mean, expected[0], atol=1e-9)
    assert normal.size == pytest.approx(expected[1], abs=1e-9)
    np.testing.assert_allclose(normal.covariance, expected[2], atol=1e-9)


def test_cma_es_follows_a_bent_valley():
    def valley(a):
        return (1 - a[0]) ** 2 + 100 * (a[1] - a[0] ** 2) ** 2

    found = search(valley, 2, CMAES(start=0.0), space="free", mode="min", budget=900)
    assert found.coefficients == pytest.approx((1, 1), abs=1e-3)


def test_too_many_dimensions_are_named():
    with pytest.raises(ValueError, match="at most 1000 coefficients for CMAES, got 1200"):
        search(lambda a: 0.0, 2, CMAES(), budget=9, per="tensor", tensors=[str(i) for i in range(600)])
