"""Diagnostics: the figures by hand, and the verdicts on twenty-one cases of trouble and twenty healthy runs."""

import math
from typing import Any

import doctor_cases
import pytest
import torch
from torch import Tensor, nn

from lightning_merge import diagnostics
from lightning_merge.diagnostics import examine, sign_conflicts
from lightning_merge.diagnostics._examination import ORDER
from lightning_merge.weights import Weights

A = {"w": torch.tensor([[1.0, 2.0], [2.0, 4.0]]), "bn.running_mean": torch.tensor([9.0]), "n": torch.tensor(3)}
B = {"w": torch.tensor([[1.0, -2.0], [2.0, 0.0]]), "bn.running_mean": torch.tensor([1.0]), "n": torch.tensor(5)}


def test_figures_are_those_of_a_calculation_by_hand() -> None:
    assert diagnostics.norm(A) == 5
    assert diagnostics.distance(A, B) == math.sqrt(32)
    assert diagnostics.cosine(A, B) == pytest.approx((1 - 4 + 4) / (5 * 3))
    assert diagnostics.sign_conflicts([A, B]) == 1 / 3  # of four entries one is not moved by both
    assert diagnostics.cosine(A, {"w": torch.zeros(2, 2)}) == 0
    assert diagnostics.sign_conflicts([{"w": torch.zeros(2)}] * 2) == 0


def test_lengths_are_summed_in_float64() -> None:
    weights = {"w": torch.full((2**20,), 1e-3, dtype=torch.bfloat16)}
    value = float(weights["w"][0])
    assert diagnostics.norm(weights) == pytest.approx(value * 1024, rel=1e-12)
    assert diagnostics.norm({"w": torch.tensor([3 + 4j])}) == 5


def test_a_point_between_is_in_the_precision_of_the_first_and_integers_are_of_the_nearer_end() -> None:
    point = diagnostics.between(A, B, 0.25)
    assert point["w"].tolist() == [[1.0, 1.0], [2.0, 3.0]]
    assert point["bn.running_mean"].item() == 7.0
    assert (point["n"].item(), diagnostics.between(A, B, 0.75)["n"].item()) == (3, 5)
    half = diagnostics.between({"w": torch.ones(1, dtype=torch.bfloat16)}, {"w": torch.zeros(1)}, 0.5)
    assert half["w"].dtype == torch.bfloat16


def test_the_mean_of_three_is_uniform() -> None:
    merged = diagnostics.mean([{"w": torch.tensor([x])} for x in (1.0, 4.0, 10.0)])
    assert merged["w"].item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("losses", "expected"), [({0.0: 1.0, 0.5: 1.5, 1.0: 2.0}, 0.0), ({0.0: 4.0, 0.25: 4.0, 0.5: 1.0, 1.0: 0.0}, 1.0)]
)
def test_barrier_is_the_most_above_the_straight_line(losses: dict[float, float], expected: float) -> None:
    assert diagnostics.barrier(losses) == expected


@pytest.mark.parametrize("losses", [{0.0: 1.0, 1.0: 2.0}, {0.0: 1.0, 0.5: 1.0}, {}])
def test_barrier_needs_both_ends_and_a_point_between(losses: dict[float, float]) -> None:
    with pytest.raises(ValueError, match="must hold the shares 0, 1 and one between"):
        diagnostics.barrier(losses)


def test_steps_of_a_walk_agree_and_those_of_noise_oppose_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [{"w": torch.randn(4000, generator=generator)} for _ in range(6)]
    turns = diagnostics.successive_cosines(noise)
    assert all(turn == pytest.approx(-0.5, abs=0.05) for turn in turns)
    walk = [{"w": torch.arange(3.0) * step} for step in range(4)]
    assert diagnostics.successive_cosines(walk) == pytest.approx([1.0, 1.0])


def test_layers_with_initial_statistics_are_named() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    net[1].train()(torch.randn(8, 2))
    assert diagnostics.never_measured(net.state_dict()) == ["2"]


def test_shift_counts_means_and_the_logarithm_of_deviations() -> None:
    measured = {"b.running_mean": torch.zeros(2), "b.running_var": torch.ones(2)}
    twice = {"b.running_mean": torch.zeros(2), "b.running_var": torch.full((2,), 4.0)}
    moved = {"b.running_mean": torch.tensor([2.0, 0.0]), "b.running_var": torch.ones(2)}
    assert diagnostics.statistics_shift(twice, measured) == pytest.approx(math.log(2), rel=1e-4)
    assert diagnostics.statistics_shift(moved, measured) == pytest.approx(math.sqrt(2), rel=1e-4)


def test_an_examination_writes_to_nothing_it_is_shown() -> None:
    sets = {"a": {"w": torch.randn(3, 3)}, "b": {"w": torch.randn(3, 3)}}
    before = {name: weights["w"].clone() for name, weights in sets.items()}
    examine(sets, base={"w": torch.randn(3, 3)}, loss=lambda weights: float(weights["w"].sum()))
    assert all(torch.equal(sets[name]["w"], tensor) for name, tensor in before.items())


def test_a_loss_that_is_nan_between_two_sets_is_a_barrier() -> None:
    def loss(weights: dict[str, Tensor]) -> float:
        return float("nan") if 0.6 < weights["w"][0, 0] < 0.7 else 1.0  # the second of two points

    near = {"a": {"w": torch.tensor([[0.0, 9.0]])}, "b": {"w": torch.tensor([[1.0, 9.0]])}}
    assert examine(near, loss=loss, points=2).verdict == "barrier"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"candidates": {}}, "at least one set of weights"),
        ({"candidates": {"a": A}, "points": 0}, "`points` must be at least 1, got 0"),
        ({"candidates": {"a": A, "b": {"w": torch.zeros(3)}}}, "`a` and `b` are of different models"),
        ({"candidates": {"a": A}, "base": {"x": torch.zeros(3)}}, "`a` and `the base` are of different models"),
    ],
)
def test_what_cannot_be_examined_is_refused(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        examine(**arguments)


@pytest.mark.slow
def test_cases_of_trouble_get_the_right_verdict() -> None:
    cases = doctor_cases.constructed()
    assert len(cases) == 21
    assert {case.expected for case in cases} == set(ORDER)
    wrong = {case.name: found.verdict for case in cases if (found := case.examine()).verdict != case.expected}
    assert not wrong


@pytest.mark.slow
def test_twenty_healthy_runs_raise_no_alarm() -> None:
    cases = doctor_cases.healthy()
    assert len(cases) == 20
    assert not {case.name: found.report() for case in cases if (found := case.examine()).verdict != "merge"}


@pytest.mark.parametrize(
    "one",
    [
        {"w": torch.ones(4), "e": torch.empty(0, 3)},
        {"w": torch.ones(4)},
        {"w": torch.ones(4), "zeros": torch.zeros(2, 2)},
    ],
    ids=["no entries", "no matrices", "zeros"],
)
def test_what_has_no_entries_or_no_matrices_is_no_reason(one: Weights) -> None:
    two = {name: 2 * tensor for name, tensor in one.items()}
    assert examine({"a": one, "b": two}, one).verdict == "merge"


def test_complex_vectors_are_in_conflict_where_a_part_of_theirs_is() -> None:
    one, other = {"w": torch.tensor([1 + 1j, 1 + 0j])}, {"w": torch.tensor([1 - 1j, 1 + 0j])}
    assert sign_conflicts([one, other]) == pytest.approx(1 / 3)


def test_every_finding_says_its_number_and_what_to_do() -> None:
    noise = {str(seed): {"w": torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)}
    (finding,) = examine(noise).findings
    assert finding.problem == "unrelated"
    assert f"{finding.number:.2f}" in finding.text
    assert "Merge models that share a start" in finding.text
    assert examine(noise).report().startswith("verdict: do not merge as they are (unrelated)\n  - ")
