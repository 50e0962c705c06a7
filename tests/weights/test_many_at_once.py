"""Operations on many tensors at once: the same numbers as tensor by tensor, in few operations and without waiting."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_counts import fake_cuda
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lightning_merge import Averager, weights
from lightning_merge.rules import ExponentialMean, Mean, PowerMeans, SelectedMean, WindowMean
from lightning_merge.weights import _one_pass
from lightning_merge.weights._pairs import pairs, runs

KINDS: dict[str, Callable[[int], Tensor]] = {
    "float32": lambda i: torch.randn(3 + i, 4),
    "bfloat16": lambda i: torch.randn(3 + i, 4).bfloat16(),
    "float64": lambda i: torch.randn(3 + i, 4, dtype=torch.float64),
    "complex": lambda i: torch.randn(3 + i, 4, dtype=torch.complex64),
    "turned": lambda i: torch.randn(4, 3 + i).t(),
    "large": lambda i: torch.randn(1 << 15),
    "number": lambda i: torch.tensor(float(i)),
    "empty": lambda i: torch.zeros(0),
}


def live(*kinds: str) -> weights.Weights:
    torch.manual_seed(0)
    return {f"{kind} {i}": KINDS[kind](i) for i in range(3) for kind in kinds or KINDS}


def one_by_one(state: weights.Weights, source: weights.Weights, weight: float) -> weights.Weights:
    return {name: torch.lerp(t, source[name].to(t), weight) for name, t in state.items()}


def same(left: weights.Weights, right: weights.Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kinds", [(), ("float32",), ("bfloat16",), ("bfloat16", "float32"), ("large", "complex")])
def test_a_step_is_that_of_each_tensor(kinds: tuple[str, ...]) -> None:
    source = live(*kinds)
    mean = weights.clone({name: t + 1 for name, t in source.items()})
    expected = one_by_one(mean, source, 0.3)
    weights.lerp_(mean, source, 0.3)
    assert same(mean, expected)


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("kinds", [(), ("bfloat16",), ("large",)])
def test_means_that_take_the_same_weights_in_at_once_are_those_of_one_after_the_other(
    kinds: tuple[str, ...], anew: bool
) -> None:
    source = live(*kinds)
    half = dict(list(source.items())[::2])
    rules = [ExponentialMean(0.9), Mean(), SelectedMean(), PowerMeans(every=1), ExponentialMean(0.5), WindowMean(2)]
    taken = [source, source, source, source, half, source]
    apart, together = ([rule.init(each) for rule, each in zip(rules, taken, strict=True)] for _ in range(2))
    for step in range(3):
        moved = {name: t + step for name, t in source.items()}
        parts = [{name: moved[name] for name in each} for each in taken]
        for rule, state, part in zip(rules, apart, parts, strict=True):
            rule.update(state, part)
        with weights.made_anew() if anew else torch.no_grad(), weights.in_one_pass(), weights.joining():
            for rule, state, part in zip(rules, together, parts, strict=True):
                rule.update(state, part)
    for rule, one, other in zip(rules, apart, together, strict=True):
        left, right = rule.result(one), rule.result(other)
        assert left is not None
        assert right is not None
        assert same(left, right)


@pytest.mark.parametrize("at_a_time", [1, 5, 64, 2**19])
def test_tensors_that_are_cut_for_several_means_end_as_whole_ones(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_one_pass._AT_A_TIME, "cpu", at_a_time)
    live = {
        "odd": torch.randn(7, 11),
        "half": torch.randn(13).half(),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(5, 9).T,
        "scalar": torch.randn(()),
        "none": torch.zeros(0),
    }
    means = [weights.clone(live) for _ in range(3)]
    means.append({name: t.contiguous() for name, t in weights.clone(live).items()})  # laid out in another way
    alone = [{name: t.clone() for name, t in mean.items()} for mean in means]
    for _ in range(2):
        for tensor in live.values():
            tensor.add_(torch.randn_like(tensor))
        with weights.in_one_pass(), weights.joining():
            for number, mean in enumerate(means):
                weights.lerp_(mean, live, 0.1 * (number + 1))
        for number, mean in enumerate(alone):
            weights.lerp_(mean, live, 0.1 * (number + 1))
    assert all(same(one, other) for one, other in zip(means, alone, strict=True))


def test_what_does_not_join_does_not_wait() -> None:
    mean = {"w": torch.zeros(2)}
    with weights.in_one_pass():
        weights.lerp_(mean, {"w": torch.ones(2)}, 0.5)
        assert mean["w"].tolist() == [0.5, 0.5]
    with weights.joining():
        weights.lerp_(mean, {"w": torch.ones(2)}, 0.5)
        assert mean["w"].tolist() == [0.75, 0.75]


def test_what_waits_is_done_whatever_happens_in_the_block() -> None:
    mean = {"w": torch.zeros(2)}

    def fails() -> None:
        with weights.in_one_pass(), weights.joining():
            weights.lerp_(mean, {"w": torch.ones(2)}, 0.5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert mean["w"].tolist() == [0.5, 0.5]


def test_runs_hold_about_as_much_as_is_asked_for() -> None:
    tensors = [torch.zeros(n) for n in (3, 3, 9, 1, 1, 0, 5)]
    assert list(runs(tensors, 6)) == [(0, 2), (2, 3), (3, 6), (6, 7)]
    assert list(runs([], 6)) == []
    groups = [names for names, *_ in pairs(weights.clone(live()), live())]
    assert sorted(name for names in groups for name in names) == sorted(live())


# ---- whether they are finite


@pytest.mark.parametrize("spoilt", [None, *KINDS])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_fixed_set_is_looked_at_as_any(spoilt: str | None, bad: float) -> None:
    found = live()
    fixed = weights.Fixed(found)
    expected = set()
    for _ in range(2):  # before, and with what was worked out
        assert weights.find_nonfinite(fixed).names() == weights.nonfinite(found) == expected
        if spoilt is not None and found[f"{spoilt} 1"].numel():
            found[f"{spoilt} 1"][(-1,) * found[f"{spoilt} 1"].dim()] = bad
            expected = {f"{spoilt} 1"} if bad != 3e38 else set()


def test_a_fixed_set_notices_other_dtypes_and_layouts_under_the_same_objects() -> None:
    module = nn.Sequential(nn.Linear(200, 200), nn.Conv2d(3, 8, 3), nn.BatchNorm1d(3))
    fixed = weights.Fixed({**weights.named_parameters(module), **weights.named_buffers(module)})
    for change in (nn.Module.double, nn.Module.bfloat16, nn.Module.float, _channels_last, _turned):
        assert weights.find_nonfinite(fixed).names() == set()
        change(module)
        module[0].weight.data[-1, -1] = torch.nan
        assert weights.find_nonfinite(fixed).names() == {"0.weight"}
        module[0].weight.data[-1, -1] = 0


def _channels_last(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)


def _turned(module: Any) -> None:
    module[0].weight.data = module[0].weight.data.t()


# ---- on a device


def on_a_device(dtype: torch.dtype) -> weights.Weights:
    return {f"{i}": torch.empty(64, 64, device="cuda", dtype=dtype) for i in range(160)}


@pytest.mark.parametrize(("dtype", "converts"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_an_update_with_its_check_is_a_handful_of_launches_and_no_read(dtype: torch.dtype, converts: int) -> None:
    with fake_cuda() as counts:
        source, rule = weights.Fixed(on_a_device(dtype)), ExponentialMean(0.99)
        state = rule.init(source)
        counts.restart()
        finding = weights.find_nonfinite(source)
        assert counts.reads == ["_to_copy"]  # which the host does not wait for
        assert not finding.is_there
        with weights.made_anew():
            rule.update(state, source)
        assert len(counts.launches) == 3 + converts, counts.launches
        assert counts.reads == ["_to_copy"]


def layers(norms: int) -> nn.Module:
    linear = [nn.Linear(8, 8, device="cuda") for _ in range(53)]
    return nn.Sequential(*linear, *[nn.BatchNorm1d(8, device="cuda") for _ in range(norms)])


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("norms", "most"), [(0, 4), (53, 5)])
def test_a_step_of_an_average_launches_no_more_than_one_of_timm_and_the_look_for_nan(
    norms: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**40))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())  # there is no device to have one
    monkeypatch.setattr("timm.utils.model_ema.deepcopy", lambda module: layers(norms))
    with fake_cuda() as counts:
        module = layers(norms)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        average, theirs = Averager(module, optimizer, ExponentialMean(0.99)), ModelEmaV3(module, 0.99)
        for _ in range(2):  # without gradients it steps nothing
            counts.restart()
            optimizer.step()
        ours, reads = len(counts.launches), counts.reads[:]
        counts.restart()
        theirs.update(module)
        timm = len(counts.launches)
        assert average.updates == 2
    assert ours <= most
    assert ours <= timm + 3
    assert reads == ["tolist", "_to_copy"]  # the answer of the look before, which is there, and this one on its way
