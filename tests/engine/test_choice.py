"""A NaN never wins, an infinity only where it is good, a tie is decided and said: for whatever chooses by a score."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lightning_merge._choice import best, mode_by_name, mode_of, refuse_higher_is_better, shares_by_score, standing
from lightning_merge.branches import BestMix, InTurn, SoftmaxOfScores
from lightning_merge.diagnostics import barrier
from lightning_merge.rules import GatedMean, SelectedMean, ValleyMean
from lightning_merge.search import Bayesian, Evolutionary, Gradient, Greedy, Grid, Line, search
from lightning_merge.soups import pareto_front

NAN, INF = math.nan, math.inf

# What is offered, first to last, where higher is better. Candidate i is weights of value i.
SCORES = {
    "a NaN first": [NAN, 1.0, 2.0],
    "a NaN in the middle": [1.0, NAN, 2.0],
    "a NaN last": [1.0, 2.0, NAN],
    "a NaN after the best": [2.0, NAN, 1.0],
    "NaNs around one number": [NAN, 1.0, NAN],
    "a bad infinity first": [-INF, 1.0, 2.0],
    "a bad infinity last": [2.0, 1.0, -INF],
    "a NaN and a bad infinity": [NAN, -INF, 1.0],
    "a good infinity": [1.0, INF, 2.0],
    "a good infinity beside a NaN": [NAN, INF, 1.0],
    "below zero": [-3.0, NAN, -2.0],
    "a tie": [1.0, 2.0, 2.0],
    "a tie across a NaN": [2.0, NAN, 2.0],
    "all NaN": [NAN, NAN, NAN],
    "nothing that can be chosen": [NAN, -INF, NAN],
}


def of_gated_mean(scores: Sequence[float], hard: bool) -> int | None:
    """The last candidate that was accepted; a rejection leaves what is there."""
    rule = GatedMean(hard)
    state = rule.init({"w": torch.tensor(0.0)})
    accepted = [rule.offer(state, {"w": torch.tensor(float(i))}, lambda _, s=s: s) for i, s in enumerate(scores)]
    return max((i for i, taken in enumerate(accepted) if taken), default=None)


def of_selected_mean(scores: Sequence[float]) -> int | None:
    rule = SelectedMean()
    state = rule.init({"w": torch.tensor(0.0)})
    for score in scores:
        rule.update(state, {"w": torch.tensor(0.0)})
        rule.select(state, score)
    rule.conclude(state)
    return state["best_updates"] - 1 if state["best_updates"] else None


def of_search(scores: Sequence[float], mode: Any) -> int | None:
    """A search over ingredients as they are."""
    points = [tuple(float(i == j) for j in range(len(scores))) for i in range(len(scores))]
    turned = {point: score if mode == "max" else -score for point, score in zip(points, scores, strict=True)}
    try:
        return points.index(search(lambda a: turned.get(a, NAN), len(scores), Grid(1.0), mode=mode).coefficients)
    except ValueError:
        return None


def branches(scores: Sequence[float]) -> InTurn:
    """One per score; mixtures of several score a NaN."""
    made = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=len(scores))
    for branch in range(len(scores)):
        made.weights(branch)["weight"].fill_(float(branch))
    made.scorer = lambda w: dict(enumerate(scores)).get(w["weight"].item(), NAN)
    return made


def of_best_mix(scores: Sequence[float]) -> int | None:
    policy, made = BestMix(Greedy(), previous=False), branches(scores)
    state = policy.init(made)
    try:
        policy.merge(state, made)
    except ValueError:
        return None
    return round(made.weights(0)["weight"].item())


def of_softmax(scores: Sequence[float]) -> int | None:
    policy, made = SoftmaxOfScores(temperature=1e-3), branches(scores)
    state = policy.init(made)
    try:
        policy.merge(state, made)
    except ValueError:
        return None
    shares = state["history"][0]["shares"]
    assert math.fsum(shares) == pytest.approx(1)
    return max(range(len(shares)), key=lambda i: (shares[i], i))


def of_pareto_front(scores: Sequence[float]) -> int | None:
    return max((i for i in pareto_front([(score,) for score in scores]) if scores[i] > -INF), default=None)


CHOOSERS: dict[str, Callable[[Sequence[float]], int | None]] = {
    "best, last of equals": lambda scores: max(best(dict(enumerate(scores))), default=None),
    "best of the lowest": lambda scores: max(best({i: -s for i, s in enumerate(scores)}, "min"), default=None),
    "a gate": lambda scores: of_gated_mean(scores, hard=False),
    "a gate for single weights too": lambda scores: of_gated_mean(scores, hard=True),
    "the best mean": of_selected_mean,
    "a search for the highest": lambda scores: of_search(scores, "max"),
    "a search for the lowest": lambda scores: of_search(scores, "min"),
    "the best mixture of branches": of_best_mix,
    "shares by score": of_softmax,
    "a Pareto front": of_pareto_front,
}


@pytest.mark.filterwarnings("ignore:.*a NaN or an infinity:UserWarning")
@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("scores", SCORES)
def test_what_can_be_chosen_and_is_best_is_chosen_and_of_equals_the_last(chooser: str, scores: str) -> None:
    offered = SCORES[scores]
    numbers = [score for score in offered if score > -INF]  # false for a NaN
    expected = max(i for i, score in enumerate(offered) if score == max(numbers)) if numbers else None
    assert CHOOSERS[chooser](offered) == expected


@pytest.mark.parametrize(("place", "mode"), [*itertools.product(range(3), ("min", "max"))])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(
    ("method", "budget"),
    [
        (Grid(0.25), None),
        (Greedy(), None),
        (Line(), None),
        (Evolutionary(4), 30),
        (Bayesian(), 10),
        (Gradient(), 40),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_search_ends_at_a_bad_score_wherever_it_is(
    method: Any, budget: int | None, bad: float, place: int, mode: Any
) -> None:
    if isinstance(method, Bayesian):
        pytest.importorskip("optuna")

    def loss(a: Sequence[float]) -> float:
        return bad if a[place] > 0.3 else sum(abs(x - y) for x, y in zip(a, (0.2, 0.2, 0.2), strict=True))

    sign = 1 if mode == "min" else -1
    found = search(lambda a: sign * loss(a), 3, method, mode=mode, budget=budget)
    assert math.isfinite(found.score)
    assert found.coefficients[place] <= 0.3


def test_a_gradient_search_goes_on_from_an_ingredient_if_the_mean_is_rejected() -> None:
    def loss(a: Sequence[float]) -> float:
        return NAN if max(a) < 0.6 else (a[1] - 0.8) ** 2

    found = search(loss, 2, Gradient(), mode="min", budget=60)
    assert found.coefficients[1] == pytest.approx(0.8, abs=0.01)


def test_a_gradient_search_ends_at_the_best_infinity() -> None:
    found = search(lambda a: (INF, [NAN, NAN]), 2, Gradient(), budget=5)
    assert (found.score, len(found.history)) == (INF, 1)


def test_ties_are_counted_and_said() -> None:
    assert search(lambda a: 1.0, 2, Grid(0.5)).ties == 2
    assert search(lambda a: a[0], 2, Grid(0.5)).ties == 0
    gate = GatedMean()
    state = gate.init({"w": torch.tensor(0.0)})
    for score in (1.0, 1.0, 0.0):
        gate.offer(state, {"w": torch.tensor(1.0)}, lambda _, score=score: score)
    assert gate.conclude(state) == "2 weights were accepted, 1 of them at a tie and 1 rejected."
    chosen = SelectedMean()
    state = chosen.init({"w": torch.tensor(0.0)})
    for score in (1.0, 1.0, 0.0):
        chosen.update(state, {"w": torch.tensor(1.0)})
        chosen.select(state, score)
    assert chosen.conclude(state) == "The mean after 2 updates scored best, the last of 2 at a tie."


def test_a_mean_with_nothing_but_nans_says_so() -> None:
    rule = SelectedMean()
    state = rule.init({"w": torch.tensor(0.0)})
    rule.update(state, {"w": torch.tensor(1.0)})
    rule.select(state, NAN)
    assert rule.conclude(state) == "Every score of the mean was a NaN or infinitely bad, so the last is published."


@pytest.mark.parametrize("preset", ["intended", "paper", "official"])
@pytest.mark.parametrize("place", range(4))
def test_a_valley_neither_begins_nor_ends_with_a_nan(preset: Any, place: int) -> None:
    rule = ValleyMean(2, 2, preset=preset)
    state = rule.init({"w": torch.tensor(0.0)})
    scores = [1.0, 1.0, 1.0, 1.0]
    scores[place] = NAN
    for step, score in enumerate(scores):
        rule.update(state, {"w": torch.tensor(float(step))})
        rule.evaluate(state, score)
    assert math.isfinite(state["threshold"])
    if place == 3:
        assert rule.interval(state)[1] == 3  # type: ignore[index]  # steps count from 1


def test_a_barrier_is_a_nan_wherever_on_the_line_that_is() -> None:
    for place in (0.25, 0.5, 0.75):
        assert math.isnan(barrier({**dict.fromkeys((0.0, 0.25, 0.5, 0.75, 1.0), 1.0), place: NAN}))


def test_shares_of_infinitely_good_scores_are_equal() -> None:
    assert shares_by_score([INF, 5.0, INF, NAN], 1.0) == [0.5, 0.0, 0.5, 0.0]
    assert shares_by_score([NAN, -INF], 1.0) is None
    assert standing(NAN, "max") == standing(NAN, "min") == -INF


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/loss", "min"),
        ("val_loss", "min"),
        ("valLoss", "min"),
        ("loss_epoch", "min"),
        ("val/loss/dataloader_idx_1", "min"),
        ("test/perplexity", "min"),
        ("val/acc", "max"),
        ("valid/top1_accuracy", "max"),
        ("val_f1", "max"),
        ("val/score", None),
        ("val/negative_loss", None),
        ("val/loss_gain", None),
        ("", None),
    ],
)
def test_the_mode_is_known_by_the_last_word_or_asked_for(monitor: str, mode: Any) -> None:
    assert mode_by_name(monitor) == mode
    assert mode_of("It", monitor, "max") == "max"
    if mode is None:
        with pytest.raises(ValueError, match=r"`mode` of It must be given for .* 'min' if lower is, 'max' if higher"):
            mode_of("It", monitor, None)
    if mode == "max":
        with pytest.raises(ValueError, match=r"`monitor` of It must be a metric of which lower is better"):
            refuse_higher_is_better("It", monitor)
    else:
        refuse_higher_is_better("It", monitor)


def test_tables_are_not_empty() -> None:
    assert CHOOSERS
    assert SCORES
