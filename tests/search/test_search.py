"""Searches find known optima, keep to space and budget, repeat themselves exactly, and continue from their log."""

import json
import math
import random
from pathlib import Path

import pytest
import scripts
import torch

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
    Negative,
    Simplex,
    search,
)

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "search_resume.py"

# Three checkpoints and a quadratic loss whose best affine combination is known in closed form.
POINTS = ((2.0, 0.0, 0.0, 1.0), (0.0, 2.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0))
CURVATURE = (1.0, 2.0, 3.0, 4.0)
OPTIMUM = (1.2, 0.8, 0.3, 1.4)


def combination(coefficients):
    return [sum(a * point[i] for a, point in zip(coefficients, POINTS, strict=True)) for i in range(4)]


def loss(coefficients):
    weights = combination(coefficients)
    return sum(h * (w - o) ** 2 for h, w, o in zip(CURVATURE, weights, OPTIMUM, strict=True)) / 2


def loss_and_gradient(coefficients):
    slopes = [h * (w - o) for h, w, o in zip(CURVATURE, combination(coefficients), OPTIMUM, strict=True)]
    return loss(coefficients), [sum(s * p for s, p in zip(slopes, point, strict=True)) for point in POINTS]


METHODS = [
    (Evolutionary(), 400, 0.02),
    (CMAES(), 300, 0.01),
    (MAP(12, 2), None, 1e-4),
    (Bayesian(), 25, 0.05),
    (Gradient(), 300, 0.01),
    (Grid(step=0.05), None, 1e-12),
]
every_method = pytest.mark.parametrize(
    ("method", "budget"),
    [
        (Grid(0.25), None),
        (Greedy((0.5, 1.0)), None),
        (Line(), None),
        (Evolutionary(), 30),
        (CMAES(size=0.4), 30),
        (MAP(8, 3), None),
        (Gradient(), 30),
        (Bayesian(1), 8),
    ],
    ids=lambda value: type(value).__name__,
)


@pytest.mark.parametrize("space", ["simplex", "negative"])
@pytest.mark.parametrize(("method", "budget", "tolerance"), METHODS, ids=lambda value: type(value).__name__)
def test_best_affine_combination_of_three_checkpoints_is_found(method, budget, tolerance, space):
    found = search(loss, 3, method, mode="min", budget=budget, space=space)
    assert found.coefficients == pytest.approx((0.45, 0.25, 0.30), abs=tolerance)
    assert found.score == pytest.approx(0.32, abs=tolerance**2 * 10 + 1e-9)


def test_gradient_that_the_score_gives_leads_to_the_optimum():
    found = search(loss_and_gradient, 3, Gradient(), mode="min", budget=200)
    assert found.coefficients == pytest.approx((0.45, 0.25, 0.30), abs=1e-5)


def test_free_coefficients_need_not_sum_to_one():
    found = search(loss_and_gradient, 3, Gradient(), mode="min", budget=400, space="free")
    assert found.coefficients == pytest.approx((0.61, 0.33, 0.30), abs=1e-4)
    measured = search(loss, 3, Gradient(), mode="min", budget=800, space="free")
    assert measured.coefficients == pytest.approx((0.61, 0.33, 0.30), abs=1e-2)


@pytest.mark.parametrize("method", [Line(low=0.5, high=1.0, evaluations=15), Bayesian()], ids=repr)
def test_one_dimensional_optimum_is_found_within_fifteen_evaluations(method):
    asked = []

    def score(coefficients):
        asked.append(coefficients[1])
        return -((coefficients[1] - 0.83) ** 2)

    found = search(score, 2, method, budget=15)
    assert found.coefficients[1] == pytest.approx(0.83, abs=0.01)
    assert len(asked) <= 15
    if isinstance(method, Line):
        assert min(asked) == 0.5
        assert max(asked) == 1.0


def test_line_takes_one_ingredient_after_the_other():
    found = search(lambda a: -abs(a[0] - 0.4) - abs(a[1] - 0.4), 3, Line(evaluations=30))
    assert found.coefficients == pytest.approx((0.4, 0.4, 0.2), abs=0.02)


def test_greedy_soup_is_the_uniform_mean_of_those_that_help():
    values = (0.0, 4.0, 3.0, 9.0)
    found = search(lambda a: -abs(sum(x * v for x, v in zip(a, values, strict=True)) - 3.6), 4, Greedy())
    assert found.coefficients == (0.0, 0.5, 0.5, 0.0)  # 4 alone is off by 0.4; with 3 by 0.1; 0 and 9 would hurt
    assert len(found.history) == 4 + 3


def test_greedy_search_with_shares_is_forkmerges():
    branches = ((1.0, 0.0, 2.0), (0.0, 1.0, 1.0), (2.0, 2.0, -1.0))

    def criterion(a):
        merged = [sum(x * b[i] for x, b in zip(a, branches, strict=True)) for i in range(3)]
        return 1 - sum((m - t) ** 2 for m, t in zip(merged, (0.55, 0.70, 1.15), strict=True))

    # The branches' own scores, by which they are ordered, are those of their training.
    own = {(1.0, 0.0, 0.0): 0.60, (0.0, 1.0, 0.0): 0.70, (0.0, 0.0, 1.0): 0.50}
    found = search(lambda a: own[a] if a in own else criterion(a), 3, Greedy((0.2, 0.4, 0.6, 0.8, 1.0)))
    assert found.coefficients == pytest.approx((0.3409090909, 0.5681818182, 0.0909090909), abs=1e-10)
    scores = [each.score for each in found.history[3:]]
    assert scores[:5] == pytest.approx([0.835, 0.9115306122, 0.913125, 0.8812962963, 0.835], abs=1e-9)
    assert scores[5:] == pytest.approx([0.9966735537, 0.9378645833, 0.7969082840, 0.6095535714, 0.3975], abs=1e-9)


def test_a_tie_adds_the_ingredient():
    assert search(lambda a: 1.0, 3, Greedy()).coefficients == pytest.approx((1 / 3,) * 3)


@pytest.mark.parametrize("space", [Simplex(), Negative(-0.5, 1.5), Free(-0.5, 1.5)], ids=repr)
@every_method
def test_every_candidate_belongs_to_the_space(method, budget, space):
    found = search(loss, 3, method, mode="min", budget=budget, space=space)
    assert len(found.history) > 5
    assert all(space.contains(each.coefficients) for each in found.history)


@pytest.mark.parametrize("space", [Simplex(), Negative(-0.5, 1.5), Free(-0.5, 1.5)], ids=repr)
def test_unit_numbers_stand_for_coefficients_and_back(space):
    rng = random.Random(0)
    for _ in range(50):
        unit = [rng.random() for _ in range(space.dimensions(4))]
        point = space.from_unit(unit)
        assert space.contains(point)
        assert space.from_unit(space.to_unit(point)) == pytest.approx(point, abs=1e-9)
    assert space.from_unit(space.to_unit((0.0, 1.0, 0.0, 0.0))) == pytest.approx((0, 1, 0, 0))


@every_method
def test_the_same_search_asks_the_same_and_no_candidate_twice(method, budget):
    asked: list[list] = [[], []]
    for each in asked:
        search(lambda a, each=each: each.append(a) or loss(a), 3, method, mode="min", budget=budget, seed=3)
    assert asked[0] == asked[1]
    assert len(set(asked[0])) == len(asked[0])


@every_method
def test_a_search_draws_from_no_generator_but_its_own(method, budget):
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    search(loss, 3, method, mode="min", budget=budget)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


class Stop(Exception):
    """The process ends here."""


@every_method
@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_a_stopped_search_continues_from_its_log_without_scoring_anything_again(method, budget, stop_at, tmp_path):
    uninterrupted = search(loss, 3, method, mode="min", budget=budget)
    log = tmp_path / "log" / "search.jsonl"
    asked = []

    def stopping(a):
        if len(asked) == stop_at:
            raise Stop
        asked.append(a)
        return loss(a)

    with pytest.raises(Stop):
        search(stopping, 3, method, mode="min", budget=budget, log=log)
    with log.open("a") as file:
        file.write('{"coefficients": [0.1, 0.')  # killed while it wrote
    again = []
    continued = search(lambda a: again.append(a) or loss(a), 3, method, mode="min", budget=budget, log=log)
    assert not set(again) & set(asked)
    assert [each.coefficients for each in continued.history] == [each.coefficients for each in uninterrupted.history]
    assert (continued.coefficients, continued.score) == (uninterrupted.coefficients, uninterrupted.score)
    assert sum(each.from_log for each in continued.history) == stop_at
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [tuple(row["coefficients"]) for row in rows[1:]] == [each.coefficients for each in continued.history]
    assert search(lambda a: pytest.fail("scored again"), 3, method, mode="min", budget=budget, log=log) is not None


def test_gradients_are_logged_too(tmp_path):
    log = tmp_path / "search.jsonl"
    expected = search(loss_and_gradient, 3, Gradient(), mode="min", budget=12)
    search(loss_and_gradient, 3, Gradient(), mode="min", budget=5, log=log)
    found = search(loss_and_gradient, 3, Gradient(), mode="min", budget=12, log=log)
    assert [each.coefficients for each in found.history] == [each.coefficients for each in expected.history]


@every_method
def test_a_nan_rejects_the_candidate_and_is_logged(method, budget, tmp_path):
    def score(a):
        return math.nan if a[2] > 0.5 else loss(a)

    found = search(score, 3, method, mode="min", budget=budget, log=tmp_path / "log")
    rejected = [each for each in found.history if each.score is None]
    assert all(each.coefficients[2] > 0.5 for each in rejected)
    assert found.coefficients[2] <= 0.5
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert [row["score"] is None for row in logged] == [each.score is None for each in found.history]
    assert rejected or isinstance(method, Line | Gradient)


def test_nothing_but_nans_is_an_error():
    with pytest.raises(ValueError, match=r"NaN or an infinity for all 3 candidates"):
        search(lambda a: math.nan, 2, Grid(0.5))


def test_the_previous_merge_is_a_candidate_that_is_not_mixed():
    found = search(lambda a: 1.0 if a == (0, 0, 1) else -abs(a[0] - 0.3), 3, Grid(0.1), whole=1)
    assert found.coefficients == (0, 0, 1)
    assert found.history[0].coefficients == (0, 0, 1)
    assert all(each.coefficients[2] in (0, 1) for each in found.history)
    better = search(lambda a: -1.0 if a == (0, 0, 1) else -abs(a[0] - 0.3), 3, Grid(0.1), whole=1)
    assert better.coefficients == (0.3, 0.7, 0)
    slope = search(loss_and_gradient, 3, Gradient(), mode="min", budget=20, whole=1)
    assert slope.coefficients[2] == 0


def test_given_candidates_come_first_and_count():
    found = search(loss, 3, Greedy(), mode="min", candidates=[(0.45, 0.25, 0.30)])
    assert found.history[0].coefficients == found.coefficients == (0.45, 0.25, 0.30)


def test_budget_is_the_number_of_scores_also_over_a_log(tmp_path):
    asked = []
    found = search(lambda a: asked.append(a) or loss(a), 3, Line(), budget=7, log=tmp_path / "log")
    assert (len(asked), len(found.history), found.complete) == (7, 7, False)
    again = search(lambda a: asked.append(a) or loss(a), 3, Line(), budget=9, log=tmp_path / "log")
    assert (len(asked), len(again.history), again.complete) == (9, 9, False)
    assert search(loss, 3, Line(), log=tmp_path / "log").complete


def test_one_ingredient_is_found_by_every_method():
    for method in (Grid(), Greedy(), Line(), Evolutionary(), Gradient()):
        found = search(lambda a: 1.0, 1, method, candidates=[(1.0,)], budget=20)
        assert found.coefficients == (1.0,)


def test_progress_is_told():
    told = []
    found = search(loss, 3, Greedy(), on_evaluation=told.append)
    assert told == found.history


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": "sphere"}, "`space` must be one of 'simplex', 'negative', 'free', got 'sphere'"),
        ({"mode": "best"}, "`mode` must be 'max' or 'min', got 'best'"),
        ({"count": 0}, "`count` must be at least 1, got 0"),
        ({"budget": 0}, "`budget` must be at least 1, got 0"),
        ({"whole": 3}, "`whole` must be at least 0 and less than `count`, got 3 of 3"),
        ({"method": Evolutionary()}, "`budget` must be given for Evolutionary"),
        ({"method": Grid(0.01), "budget": 100}, "`budget` must cover every candidate of Grid"),
        ({"method": Grid(0.3)}, "`step` must divide 1 into whole steps, got 0.3"),
        ({"method": Line(high=1.5)}, "must lead to coefficients of Simplex"),
        ({"candidates": [(0.5, 0.5)]}, "`candidates` must be 3 coefficients each"),
        ({"candidates": [(0.5, 0.6, 0.0)]}, r"`candidates` must be 3 coefficients each, of Simplex\(\)"),
        ({"score": lambda a: (1.0, [1.0])}, "the gradient of `score` must be 3 finite numbers"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    given = {"score": loss, "count": 3, "method": Greedy()} | arguments
    with pytest.raises(ValueError, match=message):
        search(**given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(0.0), "`step` must be in"),
        (lambda: Greedy(()), "`shares` must be numbers in"),
        (lambda: Greedy((1.5,)), "`shares` must be numbers in"),
        (lambda: Line(1.0, 0.5), "`low` must be less than `high`"),
        (lambda: Line(evaluations=2), "`evaluations` must be at least 3"),
        (lambda: Evolutionary(population=1), "`population` must be at least 2"),
        (lambda: Evolutionary(noise=0.0), "`noise` must be more than 0"),
        (lambda: CMAES(size=0.0), "`size` must be more than 0"),
        (lambda: CMAES(population=3), "`population` must be at least 4"),
        (lambda: MAP(samples=2), "`samples` must be at least 3"),
        (lambda: MAP(points=0), "`points` must be at least 1"),
        (lambda: Bayesian(random_starts=0), "`random_starts` must be at least 1"),
        (lambda: Gradient(rate=0.0), "`rate` must be more than 0"),
        (lambda: Gradient(difference=1.0), "`difference` must be in"),
        (lambda: Negative(low=0.5), "`low` must be at most 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"subject": "other"}, "subject"),
        ({"method": Line()}, "method"),
        ({"mode": "max"}, "mode"),
    ],
)
def test_the_log_of_another_search_is_refused(change, named, tmp_path):
    arguments = {"score": loss, "count": 3, "method": Greedy(), "mode": "min", "log": tmp_path / "log", "subject": "a"}
    search(**arguments)
    with pytest.raises(ValueError, match=f"log of another search: `{named}`"):
        search(**(arguments | change))


def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\nworld\n")
    with pytest.raises(ValueError, match="is not the log of a search"):
        search(loss, 3, Greedy(), log=path)
    assert path.read_text() == "hello\nworld\n"


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lightning_merge.search._bayesian.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lightning-merge\[search\]"'):
        search(loss, 3, Bayesian(), budget=5)


def test_killed_searches_go_on_to_the_same_end_and_score_nothing_again(tmp_path) -> None:
    """One point of each kind; the whole sweep is the benchmark's own command."""
    options = ["--methods", "evolutionary", "--points", 3, "--seed", 1]
    code, printed = scripts.start(BENCHMARK, *options, folder=tmp_path).finish()
    assert code == 0, printed
    assert "3 of 3 resumed searches equal the uninterrupted one bit for bit" in printed
