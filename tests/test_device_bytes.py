"""What moves through a GPU's memory, counted without one: where launches are few, it is what large tensors take.

Numbers per parameter, as if no operation found in a cache what the one before has left there.
"""

from typing import Any

import pytest
import torch
from device_bytes import Moved
from device_counts import fake_cuda

from lightning_merge import _to_host, weights
from lightning_merge._averaging._elsewhere import Taken
from lightning_merge.combiners import DARE, TIES, Average, Breadcrumbs, Combiner, ExponentialAverage, MagMax, Sum
from lightning_merge.optim import OnDARE, OnTIES
from lightning_merge.rules import ExponentialMean, Mean, Rule

SHAPES = {f"{i}.{name}": shape for i in range(3) for name, shape in {"w": (256, 256), "f": (1024, 256)}.items()}
NUMBERS = sum(torch.Size(shape).numel() for shape in SHAPES.values())
FLAT = 3 + 1
"""Numbers that a flat ``lerp_`` and a flat read move."""


def model(dtype: torch.dtype = torch.float32) -> weights.Weights:
    return {name: torch.empty(shape, device="cuda", dtype=dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("rule", [ExponentialMean(0.99), Mean()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1.0), (torch.bfloat16, 1.25)])
def test_an_update_with_its_check_moves_what_a_flat_one_moves(rule: Rule, dtype: torch.dtype, times: float) -> None:
    with fake_cuda():
        source = weights.Fixed(model(dtype))
        state = rule.init(source)
        rule.update(state, source)
        with Moved() as moved:
            weights.find_nonfinite(source)
            with weights.made_anew():
                rule.update(state, source)
    assert moved.bytes == pytest.approx(times * 4 * FLAT * NUMBERS, rel=1e-3)
    assert moved.made == pytest.approx(4 * NUMBERS, rel=1e-3) or dtype != torch.float32  # the average anew, no more


# Reading eight vectors is 8.
AT_ONCE = [
    (Sum(0.3), 26),
    (Average(), 26),
    (ExponentialAverage(), 24),
    (MagMax(), 124),
    (DARE(), 115),
    (TIES(), 280),
    (Breadcrumbs(), 201),
]


@pytest.mark.parametrize(("combiner", "most"), AT_ONCE, ids=lambda each: type(each).__name__)
def test_eight_vectors_at_once_move_no_more_than_they_did(combiner: Combiner, most: float) -> None:
    with fake_cuda():
        vectors = [model() for _ in range(8)]
        with Moved() as moved:
            combiner.combine(vectors)
    assert 0.8 * most < round(moved.bytes / 4 / NUMBERS, 1) <= most


# A fused step of AdamW is 7, or 8 as torch declares it.
ONLINE = {(OnDARE, 0.5): 52, (OnDARE, 0.01): 54, (OnTIES, 0.5): 80, (OnTIES, 0.01): 86}


@pytest.mark.parametrize(("method", "density"), ONLINE)
def test_a_merged_step_moves_no_more_than_it_did(method: Any, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_merge.weights._chunks._is_host", lambda tensor: False)
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    reference = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    pretrained = {name: tensor + torch.randn(tensor.shape) / 50 for name, tensor in reference.items()}
    adamw = torch.optim.AdamW(list(parameters.items()), lr=1e-3, weight_decay=0.0, fused=True)
    optimizer = method(adamw, reference, pretrained, density, 1e-6)
    optimizer.step()
    with Moved() as moved:
        optimizer.step()
    most = ONLINE[method, density]
    assert 0.8 * most < round(moved.bytes / 4 / NUMBERS, 1) <= most


def test_an_average_in_host_memory_takes_one_copy_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_to_host.ToHost, "_sent", lambda self, source: source)  # there is no stream without a device
    with fake_cuda():
        live = model()
        with Moved() as moved:
            Taken.to_host(live, {})
    assert moved.made == 4 * NUMBERS
    assert moved.bytes == 2 * 4 * NUMBERS


def test_bytes_are_counted_as_they_are_read_and_written() -> None:
    x, y = torch.ones(10), torch.ones(10)
    for operation, numbers, made in (
        (lambda: torch.add(x, y), 30, 10),
        (lambda: x.add_(y), 30, 0),
        (lambda: x.copy_(y), 20, 0),
        (lambda: torch._foreach_lerp_([x], [y], 0.5), 30, 0),
        (lambda: torch.abs(x, out=y), 20, 0),
        (lambda: x.view(2, 5).t(), 0, 0),
    ):
        with Moved() as moved:
            operation()
        assert (moved.bytes, moved.made) == (4 * numbers, 4 * made)
