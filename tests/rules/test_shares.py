"""How much each update counts in a result: what the rules say of it is what they do."""

import pytest
import torch
from test_conformance import RULES, RUN

from lightning_merge.rules import (
    BestMean,
    BiasCorrectedMean,
    ExponentialMean,
    GatedMean,
    Interpolation,
    Mean,
    PowerMeans,
    Rule,
    ValleyMean,
)
from lightning_merge.weights import State

UNKNOWN = (BestMean, GatedMean)
"""Rules that choose by a score, and do not remember when what they chose was taken in."""


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def traced(rule: Rule, updates: int) -> tuple[Rule, State, list[float]]:
    """A rule with a state, and how much the start and each update count: each has a dimension of its own."""
    rule = rule.resolve(RUN)
    axes = torch.eye(updates + 1, dtype=torch.float64)
    state = rule.init({"w": axes[0]})
    for number in range(1, updates + 1):
        rule.update(state, {"w": axes[number]})
        if number % 2 == 0:
            rule.evaluate(state, 1.0, {"w": axes[number]})
    result = rule.result(state)
    return rule, state, [] if result is None else result["w"].tolist()


@pytest.mark.parametrize("updates", [1, 2, 7, 19])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_shares_are_how_much_each_update_counts_in_the_result(rule: Rule, updates: int) -> None:
    rule, state, coefficients = traced(rule, updates)
    shares = rule.shares(state)
    if isinstance(rule, UNKNOWN) or not coefficients or getattr(rule, "preset", None) == "official":
        assert shares is None
        return
    assert shares is not None
    assert shares.dtype == torch.float64
    assert shares.shape == (updates,)
    assert [rule.initial_share(state), *shares.tolist()] == pytest.approx(coefficients, abs=1e-9)


def test_what_is_chosen_at_the_end_says_what_it_holds() -> None:
    rules = {rule for rule in RULES if type(rule).__name__ in ("SelectedMean", "ValleyMean", "AnnealedMean")}
    assert len(rules) > 5
    for rule in rules:
        rule, state, _ = traced(rule, 9)
        rule.conclude(state)
        if (shares := rule.shares(state)) is not None:
            found = rule.result(state)
            assert found is not None
            assert [rule.initial_share(state), *shares.tolist()] == pytest.approx(found["w"].tolist(), abs=1e-9)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not isinstance(rule, ValleyMean)], ids=repr)
def test_before_the_first_update_no_update_counts(rule: Rule) -> None:
    rule = rule.resolve(RUN)
    shares = rule.shares(rule.init({"w": torch.zeros(2)}))
    assert shares is None or shares.tolist() == []


DECAYS = {
    ExponentialMean(decay=0.9): 0.9,
    ExponentialMean(decay=0.9, steps_per_update=2): 0.81,
    ExponentialMean(decay=0.9, warmup="diffusers"): 4 / 13,
    BiasCorrectedMean(0.5, lag=5.0): 1 - 9**-0.5,
    PowerMeans((0.05, 0.1)): (3 / 4) ** 7.937204,
    Mean(): None,
    Interpolation(): None,
}


@pytest.mark.parametrize("rule", DECAYS, ids=repr)
def test_the_last_decay_is_what_the_last_update_kept(rule: Rule) -> None:
    rule, state, _ = traced(rule, 4)
    assert rule.last_decay(state) == (DECAYS[rule] if DECAYS[rule] is None else pytest.approx(DECAYS[rule], abs=1e-6))
