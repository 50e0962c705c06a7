"""Results of the rules, from closed forms, published figures and independent implementations."""

import math
from copy import deepcopy

import pytest
import torch
from ema_pytorch import EMA
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_merge.rules import (
    BiasCorrectedMean,
    DiffusersWarmup,
    EmaPytorchWarmup,
    ExponentialMean,
    Interpolation,
    Mean,
    Rule,
    TimmWarmup,
    WindowMean,
)
from lightning_merge.schedules import Duration, RunLength
from lightning_merge.weights import State

NAN = math.nan

# rule, weights at the start, weights at each update, result after each update (to 1e-12; None: none yet).
VALUES = {
    "uniform mean": (Mean(), 100.0, [4, 2, 9, 1, 5], [4, 3, 5, 4, 4.2]),
    "uniform mean forgets a start that is not a number": (Mean(), NAN, [4, 2], [4, 3]),
    "a quarter of the way from the start": (Interpolation(0.25), 4.0, [8, 0, 6], [5, 3, 4.5]),
    "half as far again": (Interpolation(1.5), 4.0, [8, 0, 6], [10, -2, 7]),
    "without the lag": (  # published, from the formulas of TRL's callback
        BiasCorrectedMean(),
        1.0,
        [0.6, 0.9, 0.1, 0.3],
        [0.6317778938953563, 0.8245070457112322, 0.12869581871068436, 0.1563761014470511],
    ),
    "without the lag, every second step, half of it corrected": (
        BiasCorrectedMean(1.0, 1.0, lag=2, multiplier=0.5, steps_per_update=2),
        0.0,
        [8, 8],
        [2 + 1, 2 + 1 + 2 / 3],  # the average is 2, then 3; the correction 4 / 4, then 4 / 6
    ),
    "last 1": (WindowMean(1), NAN, [4, 16], [4, 16]),
    "last 3 of the squares of 2, 4, ... 12": (
        WindowMean(3),
        NAN,
        [4, 16, 36, 64, 100, 144],
        [None, None, 56 / 3, 116 / 3, 200 / 3, 308 / 3],  # published as 18.666667, 38.666667, 66.666667, 102.666667
    ),
    "decay 0.9 from a copy": (
        ExponentialMean(0.9),
        1.0,
        [2, 3, 4, 5, 6],
        [1.1, 1.29, 1.561, 1.9049, 2.31441],
    ),
    "decay 0.9 from a copy, compensated": (
        ExponentialMean(0.9, compensated=True),
        1.0,
        [2, 3, 4, 5, 6],
        [1.1, 1.29, 1.561, 1.9049, 2.31441],
    ),
    "decay 0 copies": (ExponentialMean(0.0), NAN, [2, 3], [2, 3]),
    "decay 0 copies, compensated": (ExponentialMean(0.0, compensated=True), NAN, [2, 3], [2, 3]),
    "half-life of one step": (ExponentialMean(half_life=1), 0.0, [8, 8, 8], [4, 6, 7]),
    "half-life of two steps, updated every two": (
        ExponentialMean(half_life="2 steps", steps_per_update=2),
        0.0,
        [8, 8, 8],
        [4, 6, 7],
    ),
    "timm's warm-up": (
        ExponentialMean(0.9999, warmup="timm"),
        NAN,
        [1, 2, 3, 4, 5, 6],
        # Published as 1.62996054, 2.28860688, 2.96777368, 3.66278529, 4.37061882, which is this in float32.
        [1, 1.6299605249474, 2.2886068063470, 2.9677736453310, 3.6627852822683, 4.3706187811784],
    ),
    "timm's warm-up of power 1 is the uniform mean": (
        ExponentialMean(0.9999, warmup=TimmWarmup(power=1)),
        NAN,
        [1, 2, 3, 4, 5, 6],
        [1, 1.5, 2, 2.5, 3, 3.5],
    ),
    "a warm-up ends at the decay": (
        ExponentialMean(0.5, warmup=TimmWarmup(power=1)),
        NAN,
        [0, 8, 8, 8],
        [0, 4, 6, 7],
    ),
    "diffusers' warm-up": (
        ExponentialMean(0.9999, warmup="diffusers"),
        NAN,
        [1, 12, 12, 25],
        [1, 10, 11.5, 25 - 13.5 * 4 / 13],  # decays 0, 2/11, 3/12, 4/13
    ),
    "ema-pytorch's defaults: start at call 100, then every 10 calls": (
        ExponentialMean(0.9999, steps_per_update=10, warmup="ema_pytorch"),
        100.0,
        [110, 120, 130, 140, 150],
        # Published as 102.021797, 104.383728, 106.979553, 112.682938 (after call 150), which is this in float32.
        [102.0218000823357, 104.3837281966529, 106.9795495072804, 109.7566638164065, 112.6829302069521],
    ),
}

# warm-up, steps per update, step: decay under a limit of 0.9999, digits after the point that are exact.
DECAYS = {
    "timm": (
        TimmWarmup(),
        1,
        {1: 0, 2: 0.37003948, 3: 0.51925014, 4: 0.60314974, 5: 0.65800481, 6: 0.69714657},
        8,
    ),
    "timm ends at the limit": (TimmWarmup(), 1, {10**9: 0.9999}, 12),
    "timm every 2 steps": (TimmWarmup(power=1), 2, {2: 0.25, 4: 0.5625}, 12),
    "diffusers": (DiffusersWarmup(), 1, {1: 0, 2: 0.181818, 3: 0.25, 4: 0.307692, 5: 0.357143, 101: 0.918182}, 6),
    "diffusers ends at the limit": (DiffusersWarmup(), 1, {10**9: 0.9999}, 12),
    "diffusers every 3 steps": (DiffusersWarmup(), 3, {3: 0.25**3, 9: 0.125}, 12),
    "ema-pytorch": (EmaPytorchWarmup(power=1), 10, {10: 10 / 11, 20: 20 / 21}, 12),
    "ema-pytorch ends at the limit": (EmaPytorchWarmup(), 10, {10**9: 0.9999}, 12),
}

HALF_LIVES = {
    "steps": (1000, RunLength(), 0.999307093),
    "epochs": ("2 epochs", RunLength(steps_per_epoch=500), 0.999307093),
    "share of the run": ("5%", RunLength(steps=20_000), 0.999307093),
    "a duration": (Duration(0.05, "run"), RunLength(steps=20_000), 0.999307093),
}


def weights(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3,), float(value), dtype=torch.float64)}


def started(rule: Rule, value: float) -> State:
    return rule.init(weights(value))


@pytest.mark.parametrize(
    ("rule", "start", "inputs", "expected"), VALUES.values(), ids=[name.replace(" ", "_") for name in VALUES]
)
def test_rule_gives_the_expected_values(rule, start, inputs, expected):
    state = started(rule, start)
    for value, wanted in zip(inputs, expected, strict=True):
        rule.update(state, weights(value))
        result = rule.result(state)
        if wanted is None:
            assert result is None
            continue
        assert result["w"].dtype == torch.float64
        assert result["w"].tolist() == pytest.approx([wanted] * 3, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("warmup", "steps_per_update", "decays", "digits"), DECAYS.values(), ids=[name.replace(" ", "_") for name in DECAYS]
)
def test_warmup_gives_the_expected_decays(warmup, steps_per_update, decays, digits):
    found = {step: warmup.decay(0.9999, step, steps_per_update) for step in decays}
    assert found == pytest.approx(decays, rel=0, abs=0.6 * 10**-digits)


@pytest.mark.parametrize(("half_life", "run", "decay"), HALF_LIVES.values(), ids=list(HALF_LIVES))
def test_half_life_becomes_a_decay(half_life, run, decay):
    assert ExponentialMean(half_life=half_life).resolve(run).decay == pytest.approx(decay, rel=0, abs=6e-10)


def test_tables_are_not_empty():
    assert VALUES
    assert DECAYS
    assert HALF_LIVES


def test_update_every_10_steps_with_10_steps_per_update_equals_update_at_every_step():
    dense, sparse = ExponentialMean(0.99), ExponentialMean(0.99, steps_per_update=10)
    dense_state, sparse_state = started(dense, 0.0), started(sparse, 0.0)
    for value in (3.0, -1.0, 4.0):
        for _ in range(10):
            dense.update(dense_state, weights(value))
        sparse.update(sparse_state, weights(value))
    torch.testing.assert_close(sparse.result(sparse_state), dense.result(dense_state), rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("ignore:.*updates are below the resolution of float32")
def test_float32_average_stalls_near_one_and_the_compensated_one_does_not():
    # Each step moves the average by less than half of the last place of 1, for six times the length of its memory.
    ahead, steps = torch.tensor([5e-5, 3e-5, 1e-5, -2e-5]), 6000
    live = {"w": 1.0 + ahead}
    truth = (live["w"].double() - 1.0) * (1 - 0.999**steps)
    results = {}
    for rule in (ExponentialMean(0.999), ExponentialMean(0.999, compensated=True)):
        state = rule.init({"w": torch.ones(4)})
        for _ in range(steps):
            rule.update(state, live)
        results[rule.compensated] = rule.result(state)["w"].double() - 1.0
    assert not results[False].any()
    torch.testing.assert_close(results[True], truth, rtol=0, atol=1.5e-7)  # one unit in the last place


class Stream:
    """A module in float64 whose weights take random values, step by step."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.module = nn.Linear(3, 2).double()
        self.step()

    def step(self) -> None:
        with torch.no_grad():
            for p in self.module.parameters():
                p.copy_(torch.randn(p.shape, generator=self.generator, dtype=p.dtype))

    def weights(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())


def close(rule: Rule, state: State, module: nn.Module, tolerance: float = 1e-12) -> None:
    expected = {name: p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(rule.result(state), expected, rtol=0, atol=tolerance)


def test_mean_equals_torch_averaged_model():
    stream, rule = Stream(), Mean()
    peer, state = AveragedModel(stream.module), rule.init(stream.weights())
    for _ in range(20):
        stream.step()
        peer.update_parameters(stream.module)
        rule.update(state, stream.weights())
        close(rule, state, peer.module)


def test_exponential_mean_equals_torch_averaged_model():
    stream, rule = Stream(), ExponentialMean(0.9)
    peer, state = AveragedModel(stream.module, multi_avg_fn=get_ema_multi_avg_fn(0.9)), rule.init(stream.weights())
    peer.update_parameters(stream.module)  # its first update is the copy that ours starts from
    for _ in range(20):
        stream.step()
        peer.update_parameters(stream.module)
        rule.update(state, stream.weights())
        close(rule, state, peer.module)


@pytest.mark.parametrize("power", [2 / 3, 3 / 4, 1.0])
@pytest.mark.parametrize("start", [0, 4])
def test_timm_warmup_equals_timm(power, start):
    stream, rule = Stream(), ExponentialMean(0.8, warmup=TimmWarmup(power))
    peer = ModelEmaV3(stream.module, 0.8, update_after_step=start, use_warmup=True, warmup_power=power)
    state = rule.init(stream.weights())
    for step in range(1, 30):
        stream.step()
        peer.update(stream.module, step=step)
        if step <= start:
            state = rule.init(stream.weights())
        else:
            rule.update(state, stream.weights())
            close(rule, state, peer.module)


@pytest.mark.parametrize(("beta", "power", "after", "every"), [(0.9999, 2 / 3, 100, 10), (0.9, 1.0, 6, 3)])
def test_ema_pytorch_warmup_equals_ema_pytorch(beta, power, after, every):
    stream = Stream()
    rule = ExponentialMean(beta, steps_per_update=every, warmup=EmaPytorchWarmup(power))
    peer = EMA(
        stream.module, deepcopy(stream.module), beta=beta, power=power, update_after_step=after, update_every=every
    )
    start, state, compared = after + 1, rule.init(stream.weights()), 0
    for step in range(1, after + 6 * every):
        stream.step()
        peer.update()
        if step == start:
            state = rule.init(stream.weights())
        elif step > start and (step - start) % every == 0:
            rule.update(state, stream.weights())
            close(rule, state, peer.ema_model, tolerance=1e-6)  # ema-pytorch computes its decay in float32
            compared += 1
    assert compared == 5


def test_initial_share_is_the_product_of_the_decays():
    rule = ExponentialMean(0.9, steps_per_update=2)
    state = started(rule, 1.0)
    assert rule.initial_share(state) == 1.0
    for _ in range(3):
        rule.update(state, weights(0.0))
    assert rule.initial_share(state) == pytest.approx(0.9**6, rel=1e-14)


BAD_ARGUMENTS = {
    "decay of 1": ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
    "negative decay": ({"decay": -0.1}, r"`decay` must be in \[0, 1\), got -0.1"),
    "decay that is not a number": ({"decay": NAN}, r"`decay` must be in \[0, 1\), got nan"),
    "decay and half-life": ({"decay": 0.5, "half_life": 3}, "`decay` or `half_life`, not both; got 0.5 and 3"),
    "half-life of 0": ({"half_life": 0}, "more than 0, got 0"),
    "half-life in words": ({"half_life": "long"}, "must read like '500 steps', '2 epochs' or '5%', got 'long'"),
    "no steps": ({"steps_per_update": 0}, "`steps_per_update` must be at least 1, got 0"),
    "unknown warm-up": ({"warmup": "slow"}, "`warmup` must be one of 'timm', 'diffusers', 'ema_pytorch', got 'slow'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=list(BAD_ARGUMENTS))
def test_bad_argument_is_refused_by_name_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExponentialMean(**arguments)


@pytest.mark.parametrize("warmup", [TimmWarmup, EmaPytorchWarmup])
def test_power_of_0_is_refused(warmup):
    with pytest.raises(ValueError, match="`power` must be more than 0, got 0"):
        warmup(power=0)


def test_half_life_in_epochs_that_was_not_resolved_is_an_error_with_the_cure():
    rule = ExponentialMean(half_life="2 epochs")
    state = started(rule, 0.0)
    with pytest.raises(ValueError, match=r"half_life=.*epochs.*resolve"):
        rule.update(state, weights(1.0))


def test_a_share_of_a_very_short_run_may_be_less_than_a_step():
    rule = ExponentialMean(half_life="5%").resolve(RunLength(steps=2))
    assert rule.decay == pytest.approx(2.0**-10)


def test_default_decay_is_0999():
    assert ExponentialMean() == ExponentialMean(decay=0.999)
