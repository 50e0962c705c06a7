"""OnDARE and OnTIES off the CPU: the numbers of the CPU, nothing read back, launches by size and not by tensor."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from device_counts import Counts
from test_online_values import CASES, MASKS, PublishedAdam, run
from torch import Tensor, nn

from lightning_merge.optim import OnDARE, OnTIES
from lightning_merge.optim import _cut as cut
from lightning_merge.optim import _ondare as ondare
from lightning_merge.optim import _side as side
from lightning_merge.optim._blocks import Draw
from lightning_merge.optim._online import OnlineMerging


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Walks tensors on the CPU as on an accelerator."""
    return lambda: monkeypatch.setattr("lightning_merge.weights._chunks._is_host", lambda tensor: False)


def model(layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)) for _ in range(layers)
    ]
    return nn.Sequential(nn.Embedding(40, 8), *blocks).to(dtype)


class SignSGD(torch.optim.Optimizer):
    """Every number moves as far as any other, so that all magnitudes are equal."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())


def wrapped(net: nn.Module, method: type[OnlineMerging], base: Any, **settings: Any) -> OnlineMerging:
    generator = torch.Generator().manual_seed(1)
    reference = {name: p.detach().clone() for name, p in net.named_parameters()}
    moved = {name: p + torch.randn(p.shape, generator=generator) / 50 for name, p in reference.items()}
    chosen = {"density": 0.5, "alpha": 1e-3, "module": net, **settings}
    return method(base(net.parameters()), reference, moved, **chosen)


def trained(steps: int = 3, **arguments: Any) -> list[Tensor]:
    net = model(dtype=arguments.pop("dtype", torch.float32))
    optimizer = wrapped(net, **arguments)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


ADAMW = {"base": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)}
SETTINGS: list[dict[str, Any]] = [
    ADAMW,
    {**ADAMW, "density": 1.0},
    {**ADAMW, "density": 0.05},
    {**ADAMW, "density": 0.05, "min_numel": 50},
    {**ADAMW, "rescale": "inverse_p"},
    {**ADAMW, "rescale": "l1"},
    {**ADAMW, "rescale": "l1", "density": 0.2},
    {**ADAMW, "form": "official", "rescale": "inverse_p"},
    {**ADAMW, "form": "official", "rescale": "l1"},
    {**ADAMW, "merge_every": 2, "alpha_schedule": "lr"},
    {**ADAMW, "dtype": torch.bfloat16, "alpha": 0.1},
    {**ADAMW, "dtype": torch.float64},
    {**ADAMW, "chunk_size": None, "exempt": ["*.bias"]},
    {"base": lambda p: SignSGD(p, 1e-2)},
    {"base": lambda p: SignSGD(p, 1e-2), "density": 0.1, "tau_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sample", [4096, 16], ids=["exact", "sampled"])
@pytest.mark.parametrize("method", [OnDARE, OnTIES])
def test_values_are_those_of_the_cpu_bit_for_bit(
    method: Any, sample: int, settings: Any, monkeypatch: Any, no_host: Any
) -> None:
    monkeypatch.setattr(cut, "KEPT_IN_SAMPLE", sample)
    monkeypatch.setattr(side, "KEPT_IN_SAMPLE", sample)
    monkeypatch.setattr(ondare, "_INDICES_BELOW", 0.0)  # where few are kept the CPU draws the gaps between them
    expected = trained(method=method, **settings)
    no_host()
    for found, parameter in zip(trained(method=method, **settings), expected, strict=True):
        if settings.get("rescale") == "l1":  # the CPU sums a tensor piece by piece
            torch.testing.assert_close(found, parameter, rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(found, parameter)


def recorded(self: Draw, start: int, stop: int) -> Tensor:
    _, step, name = self.key.split("/")
    bits = torch.tensor([bit == "1" for bit in MASKS[name][int(step)]])[start:stop]
    return torch.where(bits, -(2**15), 2**15 - 1).to(torch.int16)


@pytest.mark.parametrize(("method", "settings", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_three_steps_give_the_published_numbers(
    method: type[OnlineMerging], settings: dict[str, Any], expected: str, monkeypatch: Any, no_host: Any
) -> None:
    chosen = {"density": 1.0, "alpha": 0.1, **settings}
    decay = chosen.pop("weight_decay", 0.0)
    if method is OnDARE:  # the task vector's mask too, which is drawn by `keep` on any device
        monkeypatch.setattr(Draw, "words", recorded)
        monkeypatch.setattr(Draw, "keep", lambda draw, density, block, start, stop: recorded(draw, start, stop) < 0)
    no_host()
    found = run(method, lambda named: PublishedAdam(named, decay), chosen)
    numbers = torch.tensor([float(x) for x in expected.split()], dtype=torch.float64)
    torch.testing.assert_close(found, numbers, rtol=0, atol=6e-11)


# Launches of a step on tensors of five sizes, and what a further tensor of one of them adds: its random mask, and the
# places of its task vector where that is stored sparse.
BARS = {(OnDARE, 0.5): (120, 1), (OnDARE, 0.05): (140, 2), (OnTIES, 0.5): (250, 0), (OnTIES, 0.05): (270, 1)}


@pytest.mark.parametrize(("method", "density"), BARS)
def test_a_step_reads_nothing_and_launches_by_size(method: Any, density: float, no_host: Any) -> None:
    no_host()
    found = []
    for layers in (2, 4):
        net = model(layers)
        optimizer = wrapped(net, method, lambda p: torch.optim.SGD(p, 1e-2, foreach=True), density=density)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with Counts(cpu=True) as counts, patch.object(Tensor, "tolist", lambda t: counts.tolist(t)):
            optimizer.step()
        assert not counts.reads
        found.append((len(counts.launches), len(list(net.parameters()))))
    (few, fewer_tensors), (many, tensors) = found
    most, each = BARS[method, density]
    assert few <= most
    assert many - few == each * (tensors - fewer_tensors)
