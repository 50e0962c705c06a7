"""Averages by a power of time against closed forms and dense averages."""

import math

import pytest
import torch

from lightning_merge.rules import PowerMeans
from lightning_merge.rules._power_means import gamma_of, synthesis_coefficients


def test_width_and_power_belong_together():
    for sigma in (0.05, 0.10, 0.15, 0.28):
        gamma = gamma_of(sigma)
        assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma, rel=1e-9)


def test_decay_is_that_of_the_paper():
    gamma = gamma_of(0.10)
    decays = [(1 - 1 / t) ** (gamma + 1) for t in range(1, 6)]
    assert decays == pytest.approx([0, 0.00408003, 0.04002467, 0.10193792, 0.17013962], abs=1e-8)
    rule = PowerMeans((0.05, 0.10), every=100)
    state = rule.init({"w": torch.zeros((), dtype=torch.float64)})
    expected = 0.0
    for t, decay in enumerate(decays, start=1):
        rule.update(state, {"w": torch.tensor(float(t), dtype=torch.float64)})
        expected = decay * expected + (1 - decay) * t
    assert float(rule.result(state)["w"]) == pytest.approx(expected, rel=1e-12)


def test_coefficients_are_those_of_the_reference():
    times = [t for t in (250, 500, 750, 1000) for _ in range(2)]
    gammas = [gamma_of(0.05), gamma_of(0.10)] * 4
    found = synthesis_coefficients(times, gammas, 1000, gamma_of(0.07))
    assert found == pytest.approx([0, 0, 0.000084, -0.000568, 0.010686, -0.043921, 0.434567, 0.599153], abs=1e-6)


def dense(path, sigma):
    """The average of this width in one go, by the recursion in float64."""
    gamma, average = gamma_of(sigma), torch.zeros(path.shape[1], dtype=torch.float64)
    for t, weights in enumerate(path, start=1):
        decay = (1 - 1 / t) ** (gamma + 1)
        average = decay * average + (1 - decay) * weights
    return average


@pytest.mark.parametrize(
    ("sigma", "every", "bound"),
    [(0.07, 250, 1e-2), (0.07, 125, 2e-3), (0.07, 50, 2e-4), (0.05, 250, 1e-12), (0.10, 250, 1e-12)],
)
def test_synthesis_is_the_dense_average_within_the_known_bound(sigma, every, bound):
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(1000, 200, dtype=torch.float64, generator=generator).cumsum(0)
    rule = PowerMeans(every=every)
    state = rule.init({"w": path[0]})
    for weights in path:
        rule.update(state, {"w": weights})
    expected = dense(path, sigma)
    error = (rule.synthesise(state, sigma)["w"] - expected).norm() / expected.norm()
    assert error < bound


def test_synthesis_at_an_earlier_time_and_between_kept_ones():
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(430, 50, dtype=torch.float64, generator=generator).cumsum(0)
    rule = PowerMeans(every=20)
    state = rule.init({"w": path[0]})
    for weights in path:
        rule.update(state, {"w": weights})
    for time in (200, 430):  # a kept one; now, which was not kept
        expected = dense(path[:time], 0.08)
        assert (rule.synthesise(state, 0.08, time)["w"] - expected).norm() / expected.norm() < 1e-2


def test_kept_averages_on_disk_give_the_same(tmp_path):
    results = []
    for directory in (None, tmp_path / "kept"):
        rule = PowerMeans(every=5, directory=directory)
        state = rule.init({"w": torch.zeros(3)})
        for t in range(23):
            rule.update(state, {"w": torch.full((3,), float(t))})
        results.append(rule.synthesise(state, 0.07)["w"])
    assert torch.equal(*results)
    assert len(list((tmp_path / "kept").iterdir())) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigmas": (0.1,)}, "two or more growing widths"),
        ({"sigmas": (0.1, 0.05)}, "two or more growing widths"),
        ({"sigmas": (0.1, 0.3)}, r"`sigma` must be in \(0, 0.2887\), got 0.3"),
        ({"every": 0}, "`every` must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PowerMeans(**settings)


def test_bad_requests_are_named():
    rule = PowerMeans(every=5)
    state = rule.init({"w": torch.zeros(1)})
    for _ in range(10):
        rule.update(state, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"`time` must be in \[1, 10\], the updates so far, got 11"):
        rule.synthesise(state, 0.07, time=11)
    with pytest.warns(UserWarning, match="outside the widths that were tracked"):
        rule.synthesise(state, 0.2)
