"""What OnDARE and OnTIES promise beyond their formulas: they wrap any optimizer, lose nothing, and resume exactly."""

import gc
import io
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from lightning_merge.optim import OnDARE, OnTIES
from lightning_merge.optim._blocks import BLOCK, Draw
from lightning_merge.optim._cut import find_cut
from lightning_merge.optim._online import OnlineMerging
from lightning_merge.weights._held import Part

Methods = pytest.mark.parametrize("method", [OnDARE, OnTIES])


def model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    return net


def named(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: t.detach().clone() for name, t in model(seed).named_parameters()}


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return model()


def backward(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step), dtype=next(net.parameters()).dtype)
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
    net.zero_grad()
    loss.backward()
    return loss


def wrap(
    net: nn.Module, method: type[OnlineMerging] = OnDARE, base: Callable[..., Any] = torch.optim.AdamW, **settings: Any
) -> Any:
    arguments = {"reference": named(), "pretrained": named(1), "density": 0.5, "alpha": 1e-3, "module": net}
    return method(base(net.parameters(), lr=1e-2), **(arguments | settings))


def train(net: nn.Module, optimizer: Any, first: int, last: int) -> list[Tensor]:
    for step in range(first, last):
        backward(net, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- the wrapped optimizer


@Methods
@pytest.mark.parametrize(
    "base",
    [
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1, foreach=True),
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1, fused=True),
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
        lambda p, lr: torch.optim.Adafactor(p, lr),
    ],
)
def test_alpha_0_and_density_1_is_the_wrapped_optimizer_bit_for_bit(method: Any, base: Any) -> None:
    plain, merging = fresh(), fresh()
    without = train(plain, base(plain.parameters(), 1e-2), 0, 20)
    with_ = train(merging, wrap(merging, method, base, alpha=0.0, density=1.0), 0, 20)
    assert same(without, with_)


def test_stepping_a_tensor_at_a_time_changes_nothing() -> None:
    whole, tensorwise = fresh(), fresh()
    at_once = train(whole, wrap(whole, chunk_size=None), 0, 10)
    in_turn = train(tensorwise, wrap(tensorwise, chunk_size=1), 0, 10)
    assert same(at_once, in_turn)


@Methods
def test_decoupled_decay_is_applied_to_the_whole_result(method: Any) -> None:
    net = fresh()
    optimizer = wrap(net, method, lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.5), alpha=0.0, density=0.2)
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        assert torch.allclose(new, old * (1 - 1e-2 * 0.5), rtol=1e-6)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_hooks_of_both_optimizers_fire_once_a_step_after_the_merge() -> None:
    net, calls = fresh(), []
    base = torch.optim.AdamW(net.parameters(), lr=1e-2)
    base.register_step_pre_hook(lambda opt, *_: calls.append(("before", opt)))
    base.register_step_post_hook(lambda opt, *_: calls.append(("after", opt, net[0].weight.detach().clone())))
    optimizer = OnDARE(base, named(), named(1), density=0.5, alpha=0.1, module=net, chunk_size=1)
    optimizer.register_step_post_hook(lambda opt, *_: calls.append(("ours", opt)))
    train(net, optimizer, 0, 1)
    assert [call[:2] for call in calls] == [("before", base), ("after", base), ("ours", optimizer)]
    assert torch.equal(calls[1][2], net[0].weight)


def test_schedules_of_either_optimizer_set_the_rate_and_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    net = fresh()
    base = torch.optim.SGD(net.parameters(), lr=1.0)
    before = torch.optim.lr_scheduler.StepLR(base, 1, 0.5)
    optimizer = OnDARE(base, named(), named(1), density=0.5, alpha=0.1, module=net)
    after = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(net, optimizer, 0, 1)
    before.step()
    after.step()
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.25
    assert not recwarn.list


def test_a_step_that_the_scaler_skips_merges_nothing() -> None:
    net = fresh()
    optimizer = wrap(net, alpha=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in net.parameters()]
    for factor in (float("inf"), 1.0):
        net.zero_grad()
        scaler.scale(net(torch.ones(2, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = not same(before, [p.detach() for p in net.parameters()])
        assert moved == (factor == 1.0)
    assert optimizer.param_groups[0]["merge_step"] == 1


def test_the_closure_runs_once_with_gradients() -> None:
    net, calls = fresh(), []
    optimizer = wrap(net, chunk_size=1)
    loss = optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or backward(net, 0))
    assert calls == [True]
    assert loss.requires_grad


def test_groups_and_patterns_are_exempt() -> None:
    merged, plain = fresh(), fresh()
    groups = [{"params": list(merged[0].parameters())}, {"params": list(merged[1:].parameters()), "merge": False}]
    optimizer = OnDARE(
        torch.optim.AdamW(groups, lr=1e-2), named(), named(1), density=0.5, alpha=1e-3, module=merged, exempt=["*.bias"]
    )
    assert list(optimizer.tau) == ["0.weight"]
    left, right = train(merged, optimizer, 0, 1), train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 0, 1)
    assert [torch.equal(a, b) for a, b in zip(left, right, strict=True)] == [False] + [True] * 5


def test_small_tensors_are_merged_in_full_if_asked() -> None:
    net = fresh()
    optimizer = wrap(net, density=0.01, min_numel=16)
    assert {name for name, kept in optimizer.tau.items() if kept.index is None} == {
        name for name, p in net.named_parameters() if p.numel() < 16
    }


class Coupled(torch.optim.SGD):
    """Counts its steps in its group, as Prodigy does."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


class Replacing(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.1


def test_an_optimizer_that_couples_tensors_is_stepped_at_once_or_refused() -> None:
    net = fresh()
    with pytest.raises(ValueError, match=r"Coupled keeps `k`.*`chunk_size=None`"):
        train(net, wrap(net, base=Coupled), 0, 1)
    optimizer = wrap(net, base=Coupled, chunk_size=None)
    train(net, optimizer, 0, 3)
    assert optimizer.param_groups[0]["k"] == 3


class CountsInState(torch.optim.SGD):
    """Keeps the number of its steps in its state, as MADGRAD does, or in itself."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["k"] = torch.tensor([1.0]) + self.state.get("k", 0)  # type: ignore[index, call-overload]
        super().step()


class CountsItself(CountsInState):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        torch.optim.SGD.step(self)


class Clipped(torch.optim.Adam):
    """Divides by the norm of all gradients of all groups, of which it keeps nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        given = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in given]).norm()
        for gradient in given:
            gradient.div_(norm)
        super().step()


@pytest.mark.parametrize(("base", "what"), [(CountsInState, "k"), (CountsItself, "calls")])
def test_counters_of_an_optimizer_outside_its_groups_are_seen(base: Any, what: str) -> None:
    net = fresh()
    with pytest.raises(ValueError, match=rf"keeps `{what}` of its steps.*`chunk_size=None`"):
        train(net, wrap(net, base=base), 0, 1)
    train(net, wrap(net, base=base, chunk_size=None), 0, 2)


@pytest.mark.parametrize("base", [Clipped, lambda p, lr: timm.optim.Lamb(p, lr, weight_decay=0.1)], ids=["own", "timm"])
def test_an_optimizer_that_looks_at_all_gradients_is_stepped_once_across_groups_and_exempt_tensors(base: Any) -> None:
    def groups(net: nn.Module) -> list[dict[str, Any]]:
        first, *others = net.parameters()
        return [{"params": [first]}, {"params": others, "weight_decay": 0.01}]

    plain, merging = fresh().double(), fresh().double()
    without = train(plain, base(groups(plain), 1e-2), 0, 5)
    # Almost no merge, so that it is the wrapped optimizer's own path, through the code that merges.
    settings: dict[str, Any] = {"alpha": 1e-30, "density": 1.0, "exempt": ["*bias"], "chunk_size": None}
    optimizer = OnDARE(base(groups(merging), 1e-2), named(), named(1), module=merging, **settings)
    for left, right in zip(without, train(merging, optimizer, 0, 5), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    assert [group["weight_decay"] for group in optimizer.param_groups][1] == 0.01


def test_exempt_tensors_keep_their_decay_in_a_call_with_others() -> None:
    found = []
    for chunk_size in (None, 1):
        net = fresh()
        settings: dict[str, Any] = {"exempt": ["*bias", "1.*"], "chunk_size": chunk_size}
        optimizer = wrap(net, base=lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.5), **settings)
        found.append(train(net, optimizer, 0, 5))
    assert same(*found)


class Lamb(torch.optim.Optimizer):
    """LAMB without moments: the length of a tensor's step is that of the tensor."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                trust = parameter.norm() / parameter.grad.norm()
                parameter.sub_(group["lr"] * trust * parameter.grad)


def test_an_optimizer_with_norms_of_tensors_is_stepped_a_tensor_at_a_time() -> None:
    """A tensor is never cut; what keeps anything else is refused."""
    whole, tensorwise = fresh(), fresh()
    at_once = train(whole, wrap(whole, base=Lamb, chunk_size=None), 0, 10)
    assert same(at_once, train(tensorwise, wrap(tensorwise, base=Lamb, chunk_size=1), 0, 10))
    unclipped = wrap(whole, base=lambda p, lr: timm.optim.Lamb(p, lr, max_grad_norm=None))
    with pytest.raises(ValueError, match="Lamb keeps `step` of its steps"):
        train(whole, unclipped, 0, 1)
    with pytest.raises(ValueError, match=r"`chunk_size` must be None.*Lamb limits the norm of all gradients"):
        wrap(fresh(), base=timm.optim.Lamb)


def test_an_optimizer_that_replaces_parameters_is_refused() -> None:
    net = fresh()
    with pytest.raises(RuntimeError, match="Replacing replaces parameters"):
        train(net, wrap(net, base=Replacing), 0, 1)


# ---- small terms


def drift(dtype: torch.dtype = torch.float32, steps: int = 953, weight: float = 0.02, **settings: Any) -> Tensor:
    """How far weights move under a zero gradient, as a share of ``alpha * steps * tau``."""
    w = nn.Parameter(torch.linspace(weight, weight * 1.9, 1000).to(dtype))
    start, tau = w.detach().clone(), torch.full((1000,), 1e-3)
    base = torch.optim.SGD([("w", w)], lr=1.0)
    optimizer = OnDARE(base, {"w": tau}, "zero", **({"alpha": 5e-7, "density": 1.0} | settings))
    w.grad = torch.zeros_like(w)
    for _ in range(steps):
        optimizer.step()
    return (w.detach().double() - start.double()) / (optimizer.param_groups[0]["merge_alpha"] * steps * 1e-3)


def test_the_order_of_adds_of_the_published_code_loses_the_reference() -> None:
    w = torch.tensor(0.02)
    for _ in range(953):
        w.add_(torch.tensor(1e-3) * 5e-7)
    assert w == torch.tensor(0.02)


@pytest.mark.parametrize("tau_every", [1, 7])
def test_terms_below_the_resolution_add_up(tau_every: int) -> None:
    moved = drift(tau_every=tau_every)
    applied = 953 // tau_every * tau_every / 953
    assert (moved / applied - 1).abs().max() < 0.02


def test_terms_below_the_resolution_add_up_where_few_are_kept() -> None:
    moved = drift(density=0.05)
    kept = moved != 0
    assert 20 <= kept.sum() <= 80
    assert (moved[kept] - 1).abs().max() < 0.02


def test_terms_below_the_resolution_add_up_in_bfloat16() -> None:
    moved = drift(torch.bfloat16, alpha=1e-3, steps=2000)  # 1e-6 a step; bfloat16 numbers near 0.02 are 1e-4 apart
    assert (moved - 1).abs().max() < 0.15  # two of the 13 last places that 2000 steps move


def test_weights_to_which_nothing_is_added_stay() -> None:
    w = nn.Parameter(torch.tensor([1.0, 0.5, 0.0, -2.0, 0.3]))
    start = w.detach().clone()
    reference = {"w": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])}
    optimizer = OnDARE(torch.optim.SGD([("w", w)], lr=1.0), reference, "zero", density=1.0, alpha=1e-3)
    w.grad = torch.zeros_like(w)
    for _ in range(50):
        optimizer.step()
    assert torch.equal(w[:4], start[:4])
    assert w[4].item() == pytest.approx(0.35)


@Methods
@pytest.mark.parametrize("shares", [[1.0, 0.5, 0.25], [0.5, 1.0, 0.25]])
def test_alpha_follows_the_rate_if_asked(method: Any, shares: list[float]) -> None:
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    base = torch.optim.SGD([("w", w)], lr=1e-3)
    base.param_groups[0]["initial_lr"] = 1e-3
    optimizer = method(base, {"w": torch.ones(4)}, "zero", density=1.0, alpha=0.1, alpha_schedule="lr")
    w.grad = torch.zeros_like(w)
    for share in shares:
        optimizer.param_groups[0]["lr"] = 1e-3 * share
        optimizer.step()
    assert torch.allclose(w.detach(), torch.full((4,), 0.175, dtype=torch.float64), atol=1e-15)


# ---- several steps at once


@Methods
def test_merging_once_at_the_end_is_offline_merging(method: Any) -> None:
    plain, merging = fresh().double(), fresh().double()
    start = [p.detach().clone() for p in plain.parameters()]
    trained = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 0, 12)
    double = {"reference": {n: t.double() for n, t in named().items()}, "pretrained": "zero"}
    merged = train(merging, wrap(merging, method, merge_every=12, density=1.0, alpha=0.1, **double), 0, 12)
    for begun, raw, result, tau in zip(start, trained, merged, double["reference"].values(), strict=True):
        ours, theirs = 0.9 * (raw - begun), 0.1 * tau
        if method is OnTIES:
            ours, theirs = (
                torch.where((ours * theirs < 0) & (ours.abs() < theirs.abs()), 0, ours),
                torch.where((ours * theirs < 0) & (ours.abs() > theirs.abs()), 0, theirs),
            )
        assert torch.allclose(result, begun + ours + theirs, atol=1e-14)


def test_between_merges_steps_are_those_of_the_wrapped_optimizer() -> None:
    plain, merging = fresh(), fresh()
    without = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 0, 2)
    assert same(without, train(merging, wrap(merging, merge_every=3), 0, 2))


# ---- going on


@Methods
@pytest.mark.parametrize("stop", range(1, 7))
def test_resumed_run_equals_uninterrupted_run_at_every_step_of_a_cycle(method: Any, stop: int) -> None:
    settings = {"merge_every": 3} | ({"tau_every": 2} if method is OnDARE else {})
    through, begun, resumed = fresh(), fresh(), fresh()
    expected = train(through, wrap(through, method, **settings), 0, 14)
    optimizer = wrap(begun, method, **settings)
    train(begun, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": begun.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    again = wrap(resumed, method, **settings)
    again.load_state_dict(saved["optimizer"])
    assert same(expected, train(resumed, again, stop, 14))


def test_the_state_is_that_of_the_wrapped_optimizer_both_ways() -> None:
    net = fresh()
    optimizer = wrap(net)
    train(net, optimizer, 0, 2)
    plain = torch.optim.AdamW(net.parameters(), lr=1e-2)
    plain.load_state_dict(optimizer.state_dict())
    assert torch.equal(plain.state[net[0].weight]["exp_avg"], optimizer.state[net[0].weight]["exp_avg"])
    another = wrap(net)
    another.load_state_dict(torch.optim.AdamW(net.parameters(), lr=5.0).state_dict())
    assert another.param_groups[0]["lr"] == another.base.param_groups[0]["lr"] == 5.0
    assert another.param_groups[0]["merge_alpha"] == 1e-3
    another.base.load_state_dict(optimizer.state_dict())
    assert another.state is another.base.state
    assert another.param_groups is another.base.param_groups


def test_a_task_vector_is_handed_on_as_plain_data() -> None:
    one, two = fresh(), fresh()
    optimizer = wrap(one, density=0.2, form="official")
    again = wrap(two, density=0.2, form="official", reference=None, pretrained=None, tau=optimizer.tau_state())
    assert same(train(one, optimizer, 0, 5), train(two, again, 0, 5))


def test_a_state_of_another_task_vector_is_refused() -> None:
    net = fresh()
    with pytest.raises(ValueError, match="another task vector"):
        wrap(net, pretrained=named(2)).load_state_dict(wrap(net).state_dict())


# ---- masks and thresholds


@pytest.mark.parametrize("density", [0.003, 0.02, 0.3, 0.77])
def test_a_part_draws_what_the_whole_tensor_draws(density: float) -> None:
    numel = 2 * BLOCK + 1234
    draw = Draw(7, 3, "w", numel, torch.device("cpu"))
    whole = draw.kept(density, 0, numel)
    cuts = [0, 5, 1000, BLOCK - 1, BLOCK + 10, 2 * BLOCK + 1000, numel]
    parts = [draw.kept(density, a, b) + a for a, b in pairwise(cuts)]
    assert torch.equal(whole, torch.cat(parts))
    assert abs(len(whole) / numel / density - 1) < 5 / (density * numel) ** 0.5


def test_masks_differ_by_seed_step_name_and_block() -> None:
    def mask(seed: int, step: int, name: str, block: int = 0) -> Tensor:
        return Draw(seed, step, name, 2 * BLOCK, torch.device("cpu")).keep(0.5, block, 0, 1000)

    first = mask(0, 1, "a")
    assert torch.equal(first, mask(0, 1, "a"))
    for other in (mask(1, 1, "a"), mask(0, 2, "a"), mask(0, 1, "b"), mask(0, 1, "a", 1)):
        assert 400 < (first == other).sum() < 600


@pytest.mark.parametrize("kind", ["normal", "ties", "heavy"])
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_the_sampled_threshold_keeps_the_density_within_five_percent(kind: str, density: float) -> None:
    numel = 3 * BLOCK
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    values = {"normal": values, "ties": values.sign() * 1e-6, "heavy": values**5}[kind]
    draw, part = Draw(0, 1, "w", numel, torch.device("cpu")), Part(numel, 0, numel)
    cut = find_cut(values, part, draw, density)
    kept = sum(
        int(cut.keep(values[i : i + BLOCK], slice(i, i + BLOCK), draw, (i // BLOCK, 0, BLOCK)).sum())
        for i in range(0, numel, BLOCK)
    )
    assert abs(kept / numel / density - 1) < 0.05


def test_below_a_quarter_the_task_vector_takes_less_than_a_dense_one_and_models_are_let_go() -> None:
    net = nn.Linear(1000, 1000, bias=False)
    reference, pretrained = {"weight": torch.randn(1000, 1000)}, {"weight": torch.randn(1000, 1000)}
    alive = [weakref.ref(t) for t in (*reference.values(), *pretrained.values())]
    sizes = {}
    for density in (0.01, 0.24, 0.5):
        optimizer = OnDARE(
            torch.optim.SGD(net.parameters(), lr=0.1), reference, pretrained, density=density, alpha=1e-3, module=net
        )
        sizes[density] = optimizer.tau_bytes / net.weight.nbytes
    assert sizes[0.01] < 0.1
    assert sizes[0.24] < 1
    assert sizes[0.5] == 1
    reference.clear()
    pretrained.clear()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    optimizer.step()


# ---- bad input


def test_a_parameter_needs_a_name() -> None:
    net = fresh()
    with pytest.raises(ValueError, match=r"of shape \(8, 4\) has no name: give `module`"):
        OnDARE(torch.optim.SGD(net.parameters(), lr=0.1), named(), named(1))
    OnDARE(torch.optim.SGD(net.named_parameters(), lr=0.1), named(), named(1))
    OnDARE(torch.optim.SGD(net.parameters(), lr=0.1), net, named(1))


@Methods
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"`density` must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"`density` must be in \(0, 1\], got 1.5"),
        ({"alpha": -0.1}, r"`alpha` must be in \[0, 1\], got -0.1"),
        ({"alpha": 2.0}, r"`alpha` must be in \[0, 1\], got 2.0"),
        ({"form": "released"}, "`form` must be one of .*'paper', 'official'"),
        ({"rescale": "l2"}, "`rescale` must be one of"),
        ({"alpha_schedule": "cosine"}, "`alpha_schedule` must be one of"),
        ({"merge_every": 0}, "`merge_every` must be at least 1"),
        ({"min_numel": -1}, "`min_numel` must be at least 0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1 or None"),
        ({"pretrained": None}, "give either `reference` and `pretrained`"),
        ({"pretrained": named()}, "is 0 everywhere, so merging would do nothing"),
        ({"pretrained": {**named(1), "2.bias": torch.tensor([float("nan")])}, "density": 1.0}, "NaN"),
        ({"pretrained": {"0.weight": torch.zeros(8, 4)}}, r"`pretrained` lacks `0.bias` of shape \(8,\)"),
        ({"reference": {**named(), "0.bias": torch.zeros(3)}}, r"`0.bias` has shape \(3,\) in `reference`"),
        ({"reference": {"step": 3}}, "`reference` holds no named tensors"),
        ({"pretrained": "no/such.ckpt"}, "there is no file no/such.ckpt"),
        ({"exempt": ["*"]}, "leave no parameter to merge"),
    ],
)
def test_bad_input_is_refused_with_a_cure(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(fresh(), method, **settings)


def test_what_cannot_be_wrapped_is_refused() -> None:
    net = fresh()
    with pytest.raises(ValueError, match="must update once per step, got LBFGS"):
        wrap(net, base=lambda p, lr: torch.optim.LBFGS(p, lr))
    with pytest.raises(ValueError, match="merges already, got OnDARE"):
        OnDARE(wrap(net), named(), named(1), module=net)
    with pytest.raises(TypeError, match="must be a torch optimizer, got int"):
        OnDARE(3, named(), named(1), module=net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give it `merge` False"):
        wrap(net).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="`tau_every` must be at least 1"):
        wrap(net, tau_every=0)
    with pytest.raises(ValueError, match="`rescale` must be 'inverse_p' or 'l1' in the official form"):
        wrap(net, form="official", rescale="none")


class WithEmpty(nn.Module):
    """A parameter without numbers among others, as of a layer that is switched off."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(200))
        self.none = nn.Parameter(torch.ones(0, 3))
        self.odd = nn.Parameter(torch.ones(2, dtype=dtype))


@Methods
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("settings", [{}, {"form": "official", "rescale": "l1"}, {"rescale": "l1"}], ids=repr)
def test_a_parameter_without_numbers_is_no_trouble(method: Any, density: float, settings: dict[str, Any]) -> None:
    net = WithEmpty()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    reference = {name: p.detach() + 1 for name, p in net.named_parameters()}
    sgd = torch.optim.SGD(net.named_parameters(), lr=0.1)
    method(sgd, reference, "zero", density=density, alpha=0.5, **settings).step()
    assert net.none.numel() == 0
    assert bool(net.w.isfinite().all())


@Methods
def test_a_parameter_that_cannot_be_merged_is_refused_unless_it_is_left_out_by_name(method: Any) -> None:
    net = WithEmpty(torch.complex64)
    reference = {name: p.detach() + 1 for name, p in net.named_parameters()}
    sgd = torch.optim.SGD(net.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"`odd` holds complex numbers.*`exempt=\['odd'\]`"):
        method(sgd, reference, "zero", alpha=0.5)
    optimizer = method(sgd, reference, "zero", alpha=0.5, exempt=["odd"])
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert net.odd[0].item() == pytest.approx(0.9)
