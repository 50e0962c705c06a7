"""What every rule keeps to, whatever it computes. Adding a rule adds a line to ``RULES``."""

import io
import itertools
from copy import deepcopy

import pytest
import torch
from torch import Tensor

import lightning_merge.rules
from lightning_merge.rules import (
    AnnealedMean,
    BestMean,
    BiasCorrectedMean,
    DiffusersWarmup,
    EmaPytorchWarmup,
    ExponentialMean,
    GatedMean,
    Interpolation,
    Mean,
    PowerMeans,
    Rule,
    SelectedMean,
    SlidingAnnealedMean,
    TimmWarmup,
    ValleyMean,
    WindowMean,
)
from lightning_merge.schedules import Duration, RunLength
from lightning_merge.weights import State, Weights

RULES = [
    ExponentialMean(),
    ExponentialMean(decay=0.0),
    ExponentialMean(half_life=3.5, steps_per_update=2),
    ExponentialMean(half_life="2 epochs"),
    ExponentialMean(decay=0.9, warmup="timm"),
    ExponentialMean(decay=0.9, warmup=TimmWarmup(power=1)),
    ExponentialMean(decay=0.9, warmup=DiffusersWarmup(), steps_per_update=3),
    ExponentialMean(decay=0.9, warmup=EmaPytorchWarmup(power=0.5)),
    ExponentialMean(decay=0.9, compensated=True),
    Interpolation(),
    Interpolation(alpha=1.5),
    Mean(),
    AnnealedMean(),
    AnnealedMean("cosine", window=5),
    AnnealedMean("1-sqrt", window="1 epochs", steps_per_update=2),
    AnnealedMean("exponential", window=1),
    SlidingAnnealedMean("linear", window=7, memory=3),
    SlidingAnnealedMean("cosine", window="2 epochs", steps_per_update=4, memory=9),
    SlidingAnnealedMean("exponential", window=6, memory=4),
    SlidingAnnealedMean("1-sqrt", window=1, memory=2),
    BiasCorrectedMean(),
    BiasCorrectedMean(0.7, 0.3, lag=1, multiplier=0.5, steps_per_update=4),
    BestMean(k=1),
    BestMean(k=3),
    SelectedMean(),
    PowerMeans(every=3),
    PowerMeans((0.05, 0.1, 0.2), every=2, directory="averages"),
    GatedMean(),
    GatedMean(hard=True),
    WindowMean(k=1),
    WindowMean(k=3),
    WindowMean(k=3, store="cpu"),
    WindowMean(k=3, store="disk", directory="snapshots"),
    ValleyMean(),
    ValleyMean(n_converge=1, n_tolerance=1),
    ValleyMean(n_converge=2, n_tolerance=2, preset="paper"),
    ValleyMean(n_converge=2, preset="official"),
]
RUN = RunLength(steps=40, epochs=4, steps_per_epoch=10)

every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def stream(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Weights]:
    """Weights of several shapes that differ at each update."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (4, 3), "layer.bias": (4,), "scale": (), "empty": (0, 2)}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def run(rule: Rule, start: Weights, updates: list[Weights]) -> tuple[Rule, State]:
    rule = rule.resolve(RUN)
    state = rule.init(start)
    go_on(rule, state, updates)
    return rule, state


def go_on(rule: Rule, state: State, updates: list[Weights]) -> None:
    for weights in updates:
        rule.update(state, weights)
        if state["updates"] % 2 == 0:
            rule.evaluate(state, 1.0, weights)  # as low as those before: the first three are a valley


def devices(weights: Weights) -> dict[str, torch.device]:
    return {name: tensor.device for name, tensor in weights.items()}


def bits(value: object) -> object:
    """Something that is equal for two states only if every number in them is the same, bit for bit."""
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, value.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return value if not isinstance(value, str) else str  # names of files differ from run to run


@every_rule
def test_results_own_their_memory(rule):
    first, *rest = stream(13)
    rule, state = run(rule, first, rest)
    rule.conclude(state)
    result = rule.result(state)
    assert result is not None
    before = bits(deepcopy(state))
    for tensor in result.values():
        tensor.fill_(7)
    assert bits(state) == before
    again = rule.result(state)
    kept = bits(deepcopy(again))
    go_on(rule, state, stream(4, seed=1))
    assert bits(again) == kept


def test_a_rule_of_ones_own_defines_result_or_stored():
    class Neither(Rule):
        init = update = lambda self, *_: {}

    with pytest.raises(NotImplementedError, match="Neither must define `result`, or `stored`"):
        Neither().result({})


def test_table_has_every_rule():
    public = [getattr(lightning_merge.rules, name) for name in lightning_merge.rules.__all__]
    rules = {each for each in public if issubclass(each, Rule) and each is not Rule}
    assert rules
    assert {type(rule) for rule in RULES} == rules


@every_rule
def test_input_is_not_written_to(rule):
    updates = stream(5)
    before = deepcopy(updates)
    rule, state = run(rule, updates[0], updates[1:])
    rule.result(state)
    assert bits(dict(enumerate(updates))) == bits(dict(enumerate(before)))


@every_rule
def test_state_does_not_share_memory_with_the_model(rule):
    start, first = stream(2)
    rule, state = run(rule, start, [first])
    expected = bits(deepcopy(state))
    for tensor in itertools.chain(start.values(), first.values()):
        tensor.fill_(7)
    assert bits(state) == expected


@every_rule
def test_constant_weights_are_a_fixed_point_bit_for_bit(rule):
    (weights,) = stream(1)
    rule, state = run(rule, weights, [weights] * 50)
    assert bits(rule.result(state)) == bits(weights)


@every_rule
def test_there_is_no_result_before_the_first_update_and_there_is_one_in_time(rule):
    start, *updates = stream(8)
    rule, state = run(rule, start, [])
    assert rule.result(state) is None
    go_on(rule, state, updates)
    assert rule.result(state) is not None


@every_rule
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(rule):
    start, *updates = stream(13)
    rule, state = run(rule, start, updates[:6])
    rule.result(state)
    file = io.BytesIO()
    torch.save(rule.save(state), file)
    file.seek(0)
    resumed = rule.load(torch.load(file, weights_only=True), devices(start))
    assert bits(resumed) == bits(rule.save(state))
    go_on(rule, resumed, updates[6:])
    _, uninterrupted = run(rule, start, updates[:6])
    rule.save(uninterrupted)
    go_on(rule, uninterrupted, updates[6:])
    assert bits(resumed) == bits(uninterrupted)
    assert bits(rule.result(resumed)) == bits(rule.result(uninterrupted))


@every_rule
def test_what_can_be_computed_again_is_not_saved(rule):
    start, *updates = stream(8)
    rule, state = run(rule, start, updates)
    before = bits(rule.result(state))
    assert "cache" not in rule.save(state)
    assert "cache" not in rule.load(state, devices(start))
    assert bits(rule.result(rule.load(state, devices(start)))) == before


@every_rule
def test_only_rules_that_decide_on_a_score_notice_it(rule):
    start, *updates = stream(4)
    rule, state = run(rule, start, updates)
    before = bits(deepcopy(state))
    rule.evaluate(state, 0.5, start)
    assert (bits(state) != before) == (rule.wants_score is not None)


@every_rule
@pytest.mark.parametrize(
    ("live", "average"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
    ids=str,
)
def test_average_is_float32_or_wider(rule, live, average):
    start, *updates = stream(8, live)
    rule, state = run(rule, start, updates)
    assert {tensor.dtype for tensor in rule.result(state).values()} == {average}


@every_rule
def test_low_precision_weights_are_averaged_as_exactly_as_the_same_numbers_in_float32(rule):
    start, *updates = stream(8, torch.bfloat16)
    rule, low = run(rule, start, updates)
    wide = [{name: tensor.float() for name, tensor in weights.items()} for weights in (start, *updates)]
    _, high = run(rule, wide[0], wide[1:])
    assert bits(rule.result(low)) == bits(rule.result(high))


@every_rule
def test_repr_evaluates_to_the_rule(rule):
    names = {**vars(lightning_merge.rules), "Duration": Duration}
    assert eval(repr(rule), names) == rule
    assert eval(repr(rule.resolve(RUN)), names) == rule.resolve(RUN)


@every_rule
def test_rule_can_not_be_changed(rule):
    with pytest.raises(AttributeError):
        rule.anything = 1


@every_rule
def test_tensors_added_later_are_as_if_they_had_been_there_unchanged_since_the_start(rule):
    start, *updates = stream(8)
    late = {"scale": start["scale"]}
    constant = [{**weights, **late} if i < 3 else weights for i, weights in enumerate(updates)]
    rule, expected = run(rule, start, constant)
    early = [{name: t for name, t in weights.items() if name != "scale"} for weights in (start, *updates[:3])]
    _, state = run(rule, early[0], early[1:])
    rule.result(state)
    rule.extend(state, late)
    assert "scale" in (rule.result(state) or late)
    late["scale"].add_(1)  # the state has copied it
    go_on(rule, state, updates[3:])
    late["scale"].sub_(1)
    order = list(rule.result(expected))
    result = rule.result(state)
    assert bits({name: result[name] for name in order}) == bits(rule.result(expected))


@every_rule
@pytest.mark.parametrize("updates", [1, 2, 7])
def test_initial_share_is_the_weight_of_the_start_in_the_result(rule, updates):
    one, zero = {"w": torch.ones((), dtype=torch.float64)}, {"w": torch.zeros((), dtype=torch.float64)}
    rule, state = run(rule, one, [zero] * updates)
    expected = (rule.result(state) or zero)["w"].item()
    assert rule.initial_share(state) == pytest.approx(expected, rel=1e-12, abs=1e-15)
