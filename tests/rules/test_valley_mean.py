"""Which steps a valley is the mean of: published runs, a closed form, the released code's queues in plain Python."""

import io
import math
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import pytest
import torch
from live_memory import LiveMemory
from torch import Tensor

from lightning_merge.rules import ValleyMean
from lightning_merge.rules._segments import merged, single
from lightning_merge.weights import State

INF, NAN = math.inf, math.nan
PRESETS = ["intended", "paper", "official"]
every_preset = pytest.mark.parametrize("preset", PRESETS)


def each(first: int, last: int) -> dict[int, int]:
    """Every step of a range once."""
    return dict.fromkeys(range(first, last + 1), 1)


FALLING = [2.0, 1.5, 1.2, 1.0]
VALLEY = [
    *FALLING,
    0.9,
    0.8,
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.92,
    0.95,
    0.96,
    0.97,
    0.98,
    0.99,
    1.0,
    1.01,
    1.02,
    1.03,
    1.04,
]
EARLY = [1.0, 1.1, 1.2, 1.1, 1.0, 1.05, 1.1, 1.1, 1.1, 1.1, 1.1]
SHORT = [2.0, 1.0, 1.2, 1.1, 1.3]
BROKEN = [1.2, 1.1, NAN, 1.0, 1.05, 1.1]
BREAKING = [2.0, 1.0, 1.2, 1.1, NAN, INF]
CLIFF = [0.1, 5.0, 5.0, 9.0]
BELOW_ZERO = [-1.0, -2.0, -1.9, -1.8, -1.5, -1.0, -1.0, -1.0]

# Scores, (n_converge, n_tolerance), steps per evaluation; evaluation of convergence, threshold, evaluation of death;
# how often each step counts with each preset. Evaluation 0 follows step 0, as in the released code. The first ten runs
# are published (of `paper` those with one step per evaluation).
RUNS = {
    "A": (VALLEY, (3, 6), 1, (8, 0.975, 20), each(5, 14), each(6, 14), each(5, 14) | {6: 2}),
    "A2": (VALLEY, (3, 3), 1, (8, 0.975, 17), each(7, 14), each(6, 14), each(7, 14)),
    "A3": (VALLEY, (4, 2), 1, (9, 1.0075, 19), each(7, 17), each(6, 17), each(7, 17)),
    "B": (VALLEY[:14], (3, 6), 1, (8, 0.975, None), each(5, 13), each(6, 13), each(5, 13) | {6: 2}),
    "B2": (VALLEY[:9], (3, 6), 1, (8, 0.975, None), each(5, 8), each(6, 8), each(4, 8) | {5: 2, 6: 2}),
    "B3": (VALLEY[:10], (3, 6), 1, (8, 0.975, None), each(5, 9), each(6, 9), each(5, 9) | {5: 2, 6: 2}),
    "C": (FALLING, (3, 6), 1, (None, INF, None), each(3, 3), each(0, 3), each(3, 3)),
    "D": (EARLY, (3, 6), 1, (2, 1.43, None), each(0, 10), each(0, 10), each(0, 10) | {0: 3, 1: 2, 2: 2}),
    "E": (SHORT, (2, 2), 2, (2, 1.43, None), each(3, 8), each(1, 8), each(3, 8)),
    "F": (VALLEY[:14], (3, 6), 3, (8, 0.975, None), each(13, 39), each(16, 39), each(13, 39) | {16: 2, 17: 2, 18: 2}),
    "never converged, 3 steps per evaluation": (
        *(FALLING, (3, 6), 3, (None, INF, None)),
        *(each(7, 9), each(0, 9), each(7, 9)),
    ),
    "never converged at the second evaluation": (
        *(FALLING[:2], (3, 6), 3, (None, INF, None)),
        *(each(1, 3), each(0, 3), each(1, 3)),
    ),
    "segments of unequal length": (  # segment 0 is one step: a sixth of the official mean, a tenth of the others
        *(EARLY[:4], (3, 6), 3, (2, 1.43, None)),
        *(each(0, 9), each(0, 9), {0: 3} | dict.fromkeys(range(1, 7), 2) | each(7, 9)),
    ),
    "NaN before the minimum": (BROKEN, (3, 6), 1, (5, 1.365, None), each(3, 5), each(3, 5), each(1, 5)),
    "NaN and infinity end the valley": (BREAKING, (2, 2), 1, (2, 1.43, 5), each(2, 3), each(1, 3), each(2, 3)),
    "NaN only": ([NAN] * 5, (1, 1), 1, (None, INF, None), each(4, 4), each(0, 4), each(4, 4)),
    "minus infinity is no minimum": (
        *([2.0, -INF, 1.0, 1.1, 1.2], (3, 3), 1, (4, 1.43, None)),
        *(each(3, 4), each(2, 4), each(3, 4)),
    ),
    "a plateau is a minimum": ([2.0, 1.0, 1.0, 1.0], (3, 3), 1, (3, 1.3, None), each(2, 3), each(1, 3), each(2, 3)),
    "nothing after the minimum is low": (CLIFF[:3], (3, 3), 1, (2, 4.3766666666666667, None), *[each(0, 0)] * 3),
    "dead with nothing but the minimum": (CLIFF, (3, 3), 1, (2, 4.3766666666666667, 3), *[each(0, 0)] * 3),
    "high after the minimum, but not for long enough": (
        *([2.0, 1.0, 9.0, 1.0, 9.0], (4, 2), 1, (4, 6.5, None)),
        *(each(2, 3), each(1, 3), each(2, 3)),
    ),
    "scores below 0": (BELOW_ZERO, (3, 3), 1, (3, -1.33, 7), each(2, 4), each(1, 4), each(2, 4)),
    "shortest windows": ([1.0, 1.2, 1.1, 1.4, 1.0], (1, 1), 1, (0, 1.3, 3), each(1, 2), each(0, 2), each(1, 2)),
}
CASES = [(name, preset) for name in RUNS for preset in PRESETS]


def segments(count: int, stride: int) -> list[range]:
    """The steps of each segment."""
    return [range(max(0, stride * (i - 1) + 1), stride * i + 1) for i in range(count)]


ONE_HOT = torch.eye(70, dtype=torch.float64).unbind()


def one_hot(step: int) -> dict[str, Tensor]:
    """Weights whose mean shows how often each step counts."""
    return {"w": ONE_HOT[step]}


def counts(rule: ValleyMean, state: State) -> Tensor:
    return rule.result(state)["w"]


def shares(expected: dict[int, int]) -> Tensor:
    result, total = [0.0] * 70, sum(expected.values())
    for step, count in expected.items():
        result[step] = count / total
    return torch.tensor(result, dtype=torch.float64)


def run(rule: ValleyMean, state: State, scores: Sequence[float], stride: int) -> Iterator[int]:
    """Trains and evaluates; stops after each evaluation."""
    for evaluation, (steps, score) in enumerate(zip(segments(len(scores), stride), scores, strict=True)):
        for step in steps:
            rule.update(state, one_hot(step))
        rule.evaluate(state, score)
        yield evaluation


def finish(rule: ValleyMean, scores: Sequence[float], stride: int = 1) -> State:
    state = rule.init(one_hot(0))
    for _ in run(rule, state, scores, stride):
        pass
    rule.conclude(state)
    return state


@pytest.mark.parametrize(("name", "preset"), CASES, ids=[f"{n}-{p}".replace(" ", "_") for n, p in CASES])
def test_published_run(name, preset):
    scores, (n_converge, n_tolerance), stride, events, *expected = RUNS[name]
    rule = ValleyMean(n_converge, n_tolerance, 0.3, preset)
    state = rule.init(one_hot(0))
    converged, dead = None, None
    for evaluation in run(rule, state, scores, stride):
        converged = evaluation if converged is None and rule.converged(state) else converged
        dead = evaluation if dead is None and rule.finished(state) else dead
        assert (rule.result(state) is None) == (converged is None)
    rule.conclude(state)
    wanted = expected[PRESETS.index(preset)]
    assert (converged, dead) == (events[0], events[2])
    assert state["threshold"] == pytest.approx(events[1], rel=1e-12)
    torch.testing.assert_close(counts(rule, state), shares(wanted), rtol=0, atol=1e-12)
    assert rule.interval(state) == (min(wanted) + 1, max(wanted) + 1)


def test_published_scalars():
    published = {"A": 9.181818, "A2": 10.5, "A3": 12, "B": 8.7, "B2": 5.857143, "B3": 6.571429, "D": 3.866667}
    published |= {"E": 5.5, "F": 25.1}
    found = {}
    for name in published:
        scores, windows, stride, *_ = RUNS[name]
        rule = ValleyMean(*windows, preset="official")
        found[name] = float(counts(rule, finish(rule, scores, stride)) @ torch.arange(70, dtype=torch.float64))
    assert found == pytest.approx(published, rel=0, abs=5e-7)


# Scores, (n_converge, n_tolerance); evaluation of convergence; the segments that are merged by `intended` and `paper`.
OVER_BEFORE_IT_CONVERGED = {
    "two high in a row": ([2.0, 1.0, 1.0, 9.0, 9.0, 1.0, 1.0], (5, 2), 5, (2, 2), (1, 2)),
    "the last two are high": ([1.0, 1.1, 1.0, 9.0, 9.0, 1.0], (5, 2), 4, (1, 2), (0, 2)),
    "one is too many": ([1.0, 9.0, 1.0, 1.0], (3, 1), 2, (0, 0), (0, 0)),
    "high, low, and high for long": ([1.0, 9.0, 1.0, 9.0, 9.0, 1.0], (5, 2), 4, (1, 2), (0, 2)),
}


@pytest.mark.parametrize("preset", ["intended", "paper"])
@pytest.mark.parametrize("name", OVER_BEFORE_IT_CONVERGED)
def test_a_valley_that_was_over_before_it_converged_ends_before_its_first_high_score(name, preset):
    scores, (n_converge, n_tolerance), converged, intended, paper = OVER_BEFORE_IT_CONVERGED[name]
    rule = ValleyMean(n_converge, n_tolerance, preset=preset)
    state = rule.init(one_hot(0))
    for evaluation in run(rule, state, scores, 1):
        assert rule.converged(state) == rule.finished(state) == (evaluation >= converged)
    expected = shares(each(*(intended if preset == "intended" else paper)))
    assert (counts(rule, state) - expected).abs().max() < 1e-12


def closed_form(scores: Sequence[float], rule: ValleyMean) -> tuple[int, int] | None:
    """First and last segment of the average with `intended` and `paper`; None if the run does not converge."""
    n, k = rule.n_converge, rule.n_tolerance
    low = [score if math.isfinite(score) else INF for score in scores]
    last = len(low) - 1
    for c in range(n - 1, len(low)):
        window = low[c - n + 1 : c + 1]
        if INF not in window and window.index(min(window)) == 0:
            break
    else:
        return None
    s, limit = c - n + 1, (1 + rule.tolerance) * math.fsum(window) / n
    q = max(0, c - k + 1)
    if rule.preset == "paper":
        start = s
    elif k <= n:
        start = s + 1
    else:
        above = [j for j in range(q, s) if low[j] > limit]
        start = min(above[-1] + 2 if above else q + 1, s)
    for t in range(s + k, len(low)):  # before the run has converged too, if k < n
        if min(low[t - k + 1 : t + 1]) > limit:
            end = t - k
            break
    else:
        m = max(last - k + 1, s)
        end = max([i for i in range(m + 1, last + 1) if low[i] <= limit], default=m)
    return (start, end) if start <= end else (s, s)


def expected_of_closed_form(scores: Sequence[float], rule: ValleyMean, stride: int) -> dict[int, int] | None:
    ends = closed_form(scores, rule)
    if ends is None:
        return None
    return {step: 1 for steps in segments(len(scores), stride)[ends[0] : ends[1] + 1] for step in steps}


class ReleasedQueues:
    """The released code's bookkeeping over segment numbers, as its description says it."""

    def __init__(self, n: int, k: int, tolerance: float) -> None:
        self.converge: deque[tuple[int, float]] = deque(maxlen=n)
        self.smooth: deque[tuple[int, float]] = deque(maxlen=k)
        self.tolerance = tolerance
        self.limit: float | None = None
        self.s = -1
        self.merged: Counter[int] = Counter()
        self.dead = False

    def evaluate(self, number: int, score: float) -> None:
        if self.dead:
            return
        for queue in (self.converge, self.smooth):
            queue.append((number, score if math.isfinite(score) else INF))
        if self.limit is None:
            self._try_to_converge()
        elif self.smooth[0][0] >= self.s:
            if min(score for _, score in self.smooth) > self.limit:
                self.dead = True
            else:
                self.merged[self.smooth[0][0]] += 1

    def _try_to_converge(self) -> None:
        scores = [score for _, score in self.converge]
        n, k = self.converge.maxlen or 0, self.smooth.maxlen or 0
        if len(scores) < n or INF in scores or scores.index(min(scores)) != 0:
            return
        self.s, self.limit = self.converge[0][0], sum(scores) / n * (1 + self.tolerance)
        if k < n:
            self.merged.update(number for number, _ in list(self.converge)[1 : 1 + n - k])
        if k > n:
            head = list(self.smooth)[: k - n + 1]
            start = 0
            for i, (_, score) in enumerate(head):
                if score > self.limit:
                    start = i + 1
            self.merged.update(number for number, _ in head[start + 1 :])

    def final(self) -> Counter[int] | None:
        if self.limit is None:
            return None
        merged, rest = self.merged.copy(), list(self.smooth)[1:]
        while not self.dead and rest and min(score for _, score in rest) <= self.limit:
            merged[rest.pop(0)[0]] += 1
        return merged if merged else Counter([self.s])


def random_scores(chance: random.Random) -> list[float]:
    bottom, slope, noise = chance.randint(0, 12), chance.choice([0.0, 0.05, 0.2]), chance.choice([0.0, 0.1, 1.0])
    scores = [1 + slope * abs(i - bottom) + noise * chance.random() for i in range(chance.randint(1, 22))]
    if chance.random() < 0.3:
        scores = [round(score * 8) / 8 for score in scores]  # ties
    return [chance.choice([NAN, INF, -INF]) if chance.random() < 0.02 else score for score in scores]


def random_rule(chance: random.Random, preset: str) -> ValleyMean:
    return ValleyMean(chance.randint(1, 6), chance.randint(1, 8), chance.choice([0.0, 0.05, 0.3]), preset)


def random_stride(chance: random.Random) -> int:
    """Mostly one step per segment: scores decide which segments count, and updates are what takes the time."""
    return chance.choice([1, 1, 1, 1, 1, 1, 2, 3])


@pytest.mark.parametrize("preset", ["intended", "paper"])
def test_result_after_any_evaluation_is_the_closed_form_of_a_run_that_ends_there(preset):
    chance, seen = random.Random(0), Counter()
    for _ in range(600):
        rule, scores, stride = random_rule(chance, preset), random_scores(chance), random_stride(chance)
        state = rule.init(one_hot(0))
        for evaluation in run(rule, state, scores, stride):
            expected = expected_of_closed_form(scores[: evaluation + 1], rule, stride)
            if expected is None:
                assert rule.result(state) is None
            else:
                assert (counts(rule, state) - shares(expected)).abs().max() < 1e-12
        seen["dead" if rule.finished(state) else "alive" if rule.converged(state) else "never converged"] += 1
    assert min(seen[end] for end in ("dead", "alive", "never converged")) > 50, seen


def test_official_result_after_any_evaluation_is_that_of_the_released_queues():
    chance, seen = random.Random(1), Counter()
    for _ in range(600):
        rule, scores, stride = random_rule(chance, "official"), random_scores(chance), random_stride(chance)
        state = rule.init(one_hot(0))
        peer = ReleasedQueues(rule.n_converge, rule.n_tolerance, rule.tolerance)
        parts = segments(len(scores), stride)
        for evaluation in run(rule, state, scores, stride):
            peer.evaluate(evaluation, scores[evaluation])
            merged = peer.final()
            if merged is None:
                assert rule.result(state) is None
                continue
            expected = [0.0] * 70
            for number, times in merged.items():
                for step in parts[number]:
                    expected[step] += times / merged.total() / len(parts[number])
            assert (counts(rule, state) - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12
            seen["several times"] += max(merged.values()) > 1
        seen["dead" if rule.finished(state) else "alive" if rule.converged(state) else "never converged"] += 1
    assert min(seen[end] for end in ("dead", "alive", "never converged", "several times")) > 50, seen


@every_preset
def test_steps_after_the_last_evaluation_count_only_in_the_papers_mean_of_everything(preset):
    rule = ValleyMean(preset=preset)
    for scores, last in {tuple(FALLING): "9", tuple(VALLEY[:14]): "39"}.items():
        state = rule.init(one_hot(0))
        for _ in run(rule, state, scores, 3):
            pass
        before = rule.stored(state)
        for step in (int(last) + 1, int(last) + 2):
            rule.update(state, one_hot(step))
        assert rule.stored(state) is before
        rule.conclude(state)
        if rule.converged(state):
            assert rule.stored(state) is before
        else:
            expected = each(0, 11) if preset == "paper" else each(7, 9)
            torch.testing.assert_close(counts(rule, state), shares(expected), rtol=0, atol=1e-12)


@every_preset
def test_run_that_goes_on_after_its_conclusion_is_as_if_there_had_been_none(preset):
    rule = ValleyMean(preset=preset)
    state, expected = rule.init(one_hot(0)), rule.init(one_hot(0))
    for _ in zip(run(rule, state, VALLEY, 2), run(rule, expected, VALLEY, 2), strict=True):
        rule.conclude(state)
        assert rule.result(state) is not None
    rule.conclude(expected)
    assert bits(rule.save(state)) == bits(rule.save(expected))


@every_preset
@pytest.mark.parametrize("step", ["update", "evaluate"])
def test_conclusion_without_convergence_ends_with_the_next_step(preset, step):
    rule = ValleyMean(preset=preset)
    state = finish(rule, FALLING)
    rule.update(state, one_hot(4))
    assert rule.result(state) is None
    rule.conclude(state)
    assert rule.result(state) is not None
    if step == "update":
        rule.update(state, one_hot(5))
    else:
        rule.evaluate(state, 0.0)
    assert rule.result(state) is None


@every_preset
def test_without_an_evaluation_nothing_is_published(preset):
    rule = ValleyMean(preset=preset)
    state = rule.init(one_hot(0))
    rule.update(state, one_hot(0))
    assert rule.conclude(state) == "No score was taken in, so nothing is merged."
    assert rule.result(state) is None
    assert rule.interval(state) is None


def test_conclusion_says_what_happened():
    sentences = {
        (preset, name): ValleyMean(preset=preset).conclude(finish(ValleyMean(preset=preset), scores, 3))
        for preset, name, scores in [
            ("intended", "dead", VALLEY),
            ("intended", "alive", VALLEY[:14]),
            ("intended", "never", FALLING),
            ("paper", "never", FALLING),
        ]
    }
    assert sentences == {
        ("intended", "dead"): "The loss valley is over, a score of at most 0.975: the mean is of steps 14 to 43.",
        ("intended", "alive"): (
            "The run ended in its loss valley, a score of at most 0.975: the mean is of steps 14 to 40."
        ),
        ("intended", "never"): (
            "In 4 evaluations no score was the lowest of the 3 that begin with it: published is the mean of the last"
            " segment that was evaluated, steps 8 to 10."
        ),
        ("paper", "never"): (
            "In 4 evaluations no score was the lowest of the 3 that begin with it: published is the mean of all steps,"
            " steps 1 to 10."
        ),
    }


@every_preset
def test_evaluation_without_a_step_since_the_last_is_ignored(preset):
    rule = ValleyMean(preset=preset)
    state, expected = rule.init(one_hot(0)), rule.init(one_hot(0))
    rule.evaluate(state, 0.0)
    for _ in zip(run(rule, state, VALLEY, 2), run(rule, expected, VALLEY, 2), strict=True):
        rule.evaluate(state, 0.0)
    assert bits(state) == bits(expected)


@every_preset
def test_dead_valley_takes_nothing_in_and_holds_one_copy(preset):
    rule = ValleyMean(preset=preset)
    state = finish(rule, VALLEY[:21])
    assert rule.finished(state)
    before = bits(state)
    rule.update(state, one_hot(60))
    rule.evaluate(state, 0.0)
    assert bits(state) == before
    assert sum(t.numel() for t in tensors(state)) == 70


@every_preset
@pytest.mark.parametrize("scores", [VALLEY, VALLEY[:5], EARLY], ids=["valley", "never converged", "early"])
def test_at_most_8_copies_are_alive_at_defaults(preset, scores):
    rule, live = ValleyMean(preset=preset), {"w": torch.zeros(1000), "v": torch.zeros(24)}
    with LiveMemory() as memory:
        state = rule.init(live)
        for score in scores:
            for _ in range(2):
                rule.update(state, live)
                rule.stored(state)
            rule.evaluate(state, score)
            rule.stored(state)
        rule.update(state, live)
        rule.conclude(state)
        rule.stored(state)
    assert memory.peak <= 8 * 1024 * 4
    if scores is VALLEY:
        assert memory.peak == 8 * 1024 * 4  # so the count counts


@every_preset
def test_run_that_is_saved_and_loaded_after_every_event_equals_an_uninterrupted_run(preset):
    rule, generator = ValleyMean(preset=preset), torch.Generator().manual_seed(0)
    state, uninterrupted = rule.init({}), rule.init({})
    events = 0
    for score in [*VALLEY[:9], NAN, *VALLEY[9:]]:
        for _ in range(2):
            weights = {"w": torch.randn(5, generator=generator)}
            state = again(rule, state)
            rule.update(state, weights)
            rule.update(uninterrupted, weights)
        state = again(rule, state)
        rule.evaluate(state, score)
        rule.evaluate(uninterrupted, score)
        rule.conclude(again(rule, state))
        rule.result(uninterrupted)
        assert bits(rule.save(state)) == bits(rule.save(uninterrupted))
        assert bits(rule.result(again(rule, state))) == bits(rule.result(uninterrupted))
        events += 1
    assert rule.finished(state)
    assert events > 20


@every_preset
@pytest.mark.parametrize(
    ("scores", "windows"), [(VALLEY, (3, 6)), (FALLING, (3, 6)), (CLIFF, (3, 3))], ids=["valley", "falling", "cliff"]
)
def test_tensors_added_at_any_time_are_as_if_they_had_been_there(preset, scores, windows):
    rule, late, compared = ValleyMean(*windows, preset=preset), {"late": torch.full((), 3.0)}, 0
    for cut in range(len(scores)):
        state, expected = rule.init({}), rule.init({})
        for i, score in enumerate(scores):
            weights = {"w": torch.full((), float(i) ** 2)}
            rule.update(state, weights | late if i > cut else weights)
            rule.update(expected, weights | late)
            if i == cut:
                rule.result(state)
                rule.extend(state, late)
            if i >= cut:
                compared += rule.result(state) is not None
                assert bits(rule.result(state)) == bits(rule.result(expected))
            rule.evaluate(state, score)
            rule.evaluate(expected, score)
        rule.conclude(state)
        rule.conclude(expected)
        assert bits(rule.result(state)) == bits(rule.result(expected))
    assert compared or scores is FALLING


def test_interval_is_from_the_first_to_the_last_step_in_whatever_order_segments_are_merged():
    parts = [single(one_hot(step), step) for step in (4, 7, 2, 5)]
    total = merged((part, 1) for part in parts)
    assert (total["first"], total["last"]) == (2, 7)


BAD_ARGUMENTS = {
    "no evaluation to converge": ({"n_converge": 0}, "`n_converge` must be at least 1, got 0"),
    "no evaluation to tolerate": ({"n_tolerance": 0}, "`n_tolerance` must be at least 1, got 0"),
    "negative tolerance": ({"tolerance": -0.1}, "`tolerance` must be a finite number of at least 0, got -0.1"),
    "tolerance that is not a number": ({"tolerance": NAN}, "`tolerance` must be a finite number .* got nan"),
    "unbounded tolerance": ({"tolerance": INF}, "`tolerance` must be a finite number .* got inf"),
    "unknown preset": ({"preset": "best"}, "`preset` must be one of 'intended', 'paper', 'official', got 'best'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=list(BAD_ARGUMENTS))
def test_bad_argument_is_refused_by_name_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ValleyMean(**arguments)


def test_defaults_are_those_of_the_authors():
    assert ValleyMean() == ValleyMean(n_converge=3, n_tolerance=6, tolerance=0.3, preset="intended")
    assert ValleyMean.decides_on_score


def test_tables_are_not_empty():
    assert CASES
    assert BAD_ARGUMENTS


def again(rule: ValleyMean, state: State) -> State:
    """The state out of a file."""
    file = io.BytesIO()
    torch.save(rule.save(state), file)
    file.seek(0)
    return rule.load(torch.load(file, weights_only=True), {})


def bits(value: object) -> object:
    """Equal only if every number is."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value


def tensors(value: object) -> list[Tensor]:
    """All tensors in a state."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in items for tensor in tensors(item)]
