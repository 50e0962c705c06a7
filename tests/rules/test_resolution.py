"""An average that its precision is too coarse for says so; one that follows says nothing."""

import warnings

import pytest
import torch

from lightning_merge.rules import ExponentialMean, Mean, PowerMeans, SelectedMean
from lightning_merge.rules._resolution import watch_resolution

SLOW = {
    "a usual decay": (ExponentialMean(0.9999), "`compensated=True` does"),
    "a higher one": (ExponentialMean(0.99999), "`compensated=True` does"),
    "the default": (ExponentialMean(), "`compensated=True` does"),
    "a half-life": (ExponentialMean(half_life=20_000), "`compensated=True` does"),
    "a stretch of several steps": (ExponentialMean(0.99999, steps_per_update=10), "`compensated=True` does"),
    "a mean": (Mean(), "Take weights in less often"),
    "a mean that is chosen": (SelectedMean(), "Take weights in less often"),
    "means by a power of time": (PowerMeans(), "Take weights in less often"),
}


def said(rule, ahead, dtype=torch.float32, update=65536, start=1.0):
    """What is said when weights are so far ahead of an average that begins at ``start``."""
    weights = {"w": torch.full((4,), start, dtype=dtype)}
    state = rule.init(weights)
    state["updates"] = update - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rule.update(state, {"w": weights["w"].to(torch.promote_types(dtype, torch.float32)) + ahead})
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SLOW)
def test_an_average_that_does_not_follow_says_so_and_what_does(name, dtype):
    rule, cure = SLOW[name]
    ahead = 2e-5
    assert said(rule, ahead, dtype)
    for message in said(rule, ahead, dtype):  # of power means each has its own
        assert message.startswith(f"{rule!r}: updates are below the resolution of float32 in `w`: rounding takes")
        assert message.endswith(".")
        assert cure in message


@pytest.mark.parametrize("name", SLOW)
def test_an_average_that_follows_or_has_nothing_to_follow_says_nothing(name):
    rule, _ = SLOW[name]
    assert said(rule, 0.5) == []
    assert said(rule, 0.0) == []
    assert said(rule, 2e-5, start=0.0) == []
    assert said(rule, 2e-5, torch.float64) == []


def test_compensation_and_short_averages_follow():
    assert said(ExponentialMean(0.9999, compensated=True), 2e-5) == []
    assert said(ExponentialMean(0.99), 1e-9) == []


def test_it_looks_at_doublings_only():
    near = [power + off for power in (64, 2048, 4096, 6144, 8192, 32768) for off in (-1, 0, 1)]
    assert [n for n in near if said(ExponentialMean(0.9999), 2e-5, update=n)] == [4096, 8192, 32768]


def test_tensors_of_every_kind_are_looked_at_and_the_first_is_named():
    average = {
        "none": torch.empty(0),
        "moves": torch.zeros(3),
        "stands": torch.ones(3),
        "complex": torch.ones(3, dtype=torch.complex64),
    }
    ahead = {name: tensor + 1e-5 for name, tensor in average.items()}
    with pytest.warns(
        UserWarning, match=r"float32 in `stands` and 1 more tensors: rounding .* follow. Cure."
    ) as caught:
        watch_resolution("it", 4096, average, ahead, 1e-4, "Cure.")
    assert len(caught) == 1
    assert torch.equal(average["stands"], torch.ones(3))


@pytest.mark.parametrize(("decay", "compensated"), [(0.9999, False), (0.9999, True)])
def test_what_is_said_is_true(decay, compensated):
    """Weights near 1 that move by 1e-7 a step."""
    rule = ExponentialMean(decay, compensated=compensated)
    at = truth = torch.ones(4, dtype=torch.float64)
    state = rule.init({"w": at.float()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4096):
            at = at + torch.tensor([1e-7, 2e-7, -1e-7, 0.5e-7], dtype=torch.float64)
            rule.update(state, {"w": at.float()})
            truth = truth + (1 - decay) * (at.float() - truth)
    off = ((rule.result(state)["w"] - truth).abs() / (at - truth).abs()).max()
    assert (off < 0.01) == compensated
    assert bool(caught) == (not compensated)
