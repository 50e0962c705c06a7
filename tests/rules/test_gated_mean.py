"""A mean that takes in only what does not make it worse."""

import math

import pytest
import torch

from lightning_merge.rules import GatedMean


def walk(rule, values, score=lambda weights: -abs(float(weights["w"]) - 3)):
    """The mean and the count after each offer."""
    state = rule.init({"w": torch.tensor(100.0, dtype=torch.float64)})
    path = []
    for value in values:
        rule.offer(state, {"w": torch.tensor(value, dtype=torch.float64)}, score)
        path.append((float(state["mean"]["w"]), state["count"]))
    return path, state


def test_what_is_rejected_leaves_no_trace():
    path, state = walk(GatedMean(), (2.0, 4.0, 10.0, 3.0, 2.5))
    assert path == [(2, 1), (3, 2), (3, 2), (3, 3), (3, 3)]
    assert (state["updates"], state["rejected"], state["score"]) == (3, 2, 0)


def test_rollback_is_bitwise():
    generator = torch.Generator().manual_seed(0)
    rule = GatedMean()
    state = rule.init({"w": torch.zeros(50)})
    rule.offer(state, {"w": torch.randn(50, generator=generator)}, lambda weights: 1.0)
    before = state["mean"]["w"].clone()
    assert not rule.offer(state, {"w": torch.randn(50, generator=generator)}, lambda weights: 0.0)
    assert torch.equal(state["mean"]["w"], before)
    assert torch.equal(rule.result(state)["w"], before)


def test_single_weights_that_are_better_take_the_place_of_the_mean():
    path, _ = walk(GatedMean(hard=True), (0.0, 1.0, 3.5, 2.9, 3.3))
    assert [count for _, count in path] == [1, 1, 1, 1, 2]
    assert [mean for mean, _ in path] == pytest.approx([0, 1, 3.5, 2.9, 3.1])


def test_a_tie_is_accepted_and_a_nan_is_not():
    path, _ = walk(GatedMean(), (1.0, 3.0), score=lambda weights: 7.0)
    assert path[-1] == (2, 2)
    path, state = walk(GatedMean(hard=True), (1.0, 3.0), score=lambda weights: math.nan)
    assert state["rejected"] == 2
    assert GatedMean().result(state) is None


def test_the_candidate_is_scored_once():
    asked = []
    walk(GatedMean(), (2.0, 4.0), score=lambda weights: asked.append(float(weights["w"])) or 0.0)
    assert asked == [2, 3]
