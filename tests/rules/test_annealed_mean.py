"""Means that stand for a decay: their merge weights, in one copy, in few, and in as many as the window has weights."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_merge.rules import AnnealedMean, Rule, SlidingAnnealedMean
from lightning_merge.schedules import RunLength
from lightning_merge.schedules._decay import Decay
from lightning_merge.trajectory import wsm_1_sqrt, wsm_cosine, wsm_exponential, wsm_linear

SHAPES = get_args(Decay)
# From the formulas of the learning rates, not from the code that the rules use.
FACTORS = {
    "linear": lambda s: 1 - s,
    "cosine": lambda s: math.cos(math.pi * s / 2) ** 2,
    "1-sqrt": lambda s: 1 - s**0.5,
    "exponential": lambda s: 2 * math.exp(-s * math.log(2)) - 1,
}
COEFFICIENTS = {"linear": wsm_linear, "cosine": wsm_cosine, "1-sqrt": wsm_1_sqrt, "exponential": wsm_exponential}


def merge_weights(rule: Rule, updates: int, every: int = 1) -> list[Tensor | None]:
    """What each update counts in the result, after each of them: the updates are unit vectors."""
    basis = torch.eye(updates, dtype=torch.float64)
    state = rule.init({"w": basis[0]})
    found = []
    for step in range(updates):
        rule.update(state, {"w": basis[step]})
        result = rule.result(state) if (step + 1) % every == 0 else None
        found.append(None if result is None else result["w"])
    return found


def exact(shape: str, n: int) -> Tensor:
    """The merge weights of a decay whose first step has the full rate and whose next after the last would have none."""
    factors = torch.tensor([FACTORS[shape](i / n) for i in range(n + 1)], dtype=torch.float64)
    return factors[:-1] - factors[1:]


def test_the_table_has_every_shape() -> None:
    assert set(SHAPES) == set(FACTORS) == set(COEFFICIENTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_window_of_200_in_one_copy_is_the_closed_form(shape: Decay) -> None:
    (*_, last) = merge_weights(AnnealedMean(shape, window=200), 200)
    assert last is not None
    torch.testing.assert_close(last, exact(shape, 200), rtol=0, atol=1e-12)
    torch.testing.assert_close(last, torch.tensor(COEFFICIENTS[shape](200), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_sgd_with_a_decaying_rate_gives_where_gradients_do_not_depend_on_weights(shape: Decay) -> None:
    n, gradients = 50, torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constant = torch.cumsum(gradients, 0)
    decayed = sum(FACTORS[shape](step / n) * gradient for step, gradient in enumerate(gradients))
    rule = AnnealedMean(shape, window=n)
    state = rule.init({"w": constant[0]})
    for weight in constant:
        rule.update(state, {"w": weight})
    assert rule.result(state)["w"].item() == pytest.approx(decayed.item(), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_published_on_the_way_is_what_the_docstring_says(shape: Decay) -> None:
    n, m = 40, 13
    found = merge_weights(AnnealedMean(shape, window=n), n)[m - 1]
    assert found is not None
    begun = exact(shape, n)[:m] / exact(shape, n)[:m].sum()
    torch.testing.assert_close(found[:m], begun, rtol=0, atol=1e-12)
    is_a_shorter_decay = torch.allclose(found[:m], exact(shape, m), rtol=0, atol=1e-12)
    assert is_a_shorter_decay == (shape in ("linear", "1-sqrt"))


def test_the_next_window_begins_with_the_next_weights() -> None:
    found = merge_weights(AnnealedMean("cosine", window=4), 8)
    torch.testing.assert_close(found[7], torch.cat([torch.zeros(4, dtype=torch.float64), exact("cosine", 4)]))


@pytest.mark.parametrize("n", [1, 2, 7, 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sliding_window_with_memory_for_all_its_weights_is_exact(shape: Decay, n: int) -> None:
    found = merge_weights(SlidingAnnealedMean(shape, window=n, memory=max(2, n)), 70)
    assert found[: n - 1] == [None] * (n - 1)
    for step, weights in enumerate(found[n - 1 :], n):
        torch.testing.assert_close(weights[step - n : step], exact(shape, n), rtol=0, atol=1e-12)


# The largest difference in the table of the docstring; 5 copies, a window of 500, every one of 2,000 steps.
@pytest.mark.parametrize(
    ("shape", "bound"), [("linear", 0.125), ("exponential", 0.174), ("cosine", 0.201), ("1-sqrt", 0.459)]
)
def test_a_sliding_window_in_five_copies_is_as_near_as_it_says_at_every_step(shape: Decay, bound: float) -> None:
    n, rule = 500, SlidingAnnealedMean(shape, window=500, memory=5)
    expected, worst = exact(shape, n), 0.0
    for step, weights in enumerate(merge_weights(rule, 2000), 1):
        if step < n:
            assert weights is None
            continue
        assert weights is not None
        outside = weights[: step - n].abs().sum() + weights[step:].abs().sum()
        worst = max(worst, float((weights[step - n : step] - expected).abs().sum() + outside))
    assert 0.97 * bound < worst <= bound + 1e-9


@pytest.mark.parametrize("n", [2, 5, 6, 23, 24, 25, 26])
@pytest.mark.parametrize("memory", [2, 3, 5])
def test_it_keeps_no_more_copies_than_it_may(n: int, memory: int) -> None:
    rule = SlidingAnnealedMean(window=n, memory=memory)
    state = rule.init({"w": torch.zeros(())})
    most = 0
    for step in range(4 * n):
        rule.update(state, {"w": torch.tensor(float(step))})
        most = max(most, len(state["blocks"]))
    assert most <= memory
    assert sum(block["count"] for block in state["blocks"]) >= n


def test_a_window_is_as_many_updates_as_are_within_it() -> None:
    run = RunLength(steps=1000, steps_per_epoch=100)
    for window, every, expected in ((35, 10, 3), ("20%", 10, 20), ("2 epochs", 7, 28), ("0.3%", 1, 3)):
        assert AnnealedMean(window=window, steps_per_update=every).resolve(run).snapshots == expected
        assert SlidingAnnealedMean(window=window, steps_per_update=every).resolve(run).snapshots == expected


@pytest.mark.parametrize("kind", [AnnealedMean, SlidingAnnealedMean])
def test_what_it_does_not_take_is_refused_by_name(kind: type) -> None:
    with pytest.raises(ValueError, match="`shape` must be 'linear', 'cosine', '1-sqrt' or 'exponential', got 'sqrt'"):
        kind("sqrt", 10)
    with pytest.raises(ValueError, match="`window` must be at least 10 steps, from one update to the next, got"):
        kind("linear", 9, steps_per_update=10)
    with pytest.raises(ValueError, match="needs a run of known length"):
        kind("linear", "20%").resolve(RunLength())
    with pytest.raises(ValueError, match="`memory` must be at least 2, got 1"):
        SlidingAnnealedMean("linear", 10, memory=1)


def test_copies_that_do_not_fit_are_refused_before_they_are_made() -> None:
    huge = {"w": torch.zeros(1).expand(10**12)}
    with pytest.raises(MemoryError, match="Lower `memory`"):
        SlidingAnnealedMean(window=100, memory=50).init(huge)
