"""Averages are float32 whatever the model trains in, and what is packed or quantised is left alone and listed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny import Net, Walk, batches, steps, trainer, validation
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, LAWA, SWA, WeightMerging
from lightning_merge.rules import ExponentialMean, Mean
from lightning_merge.selections import Selection
from lightning_merge.weights import is_averaged

# Oracles: float64, in closed form. In their own precision all three stay at 1 (bfloat16, float16, bfloat16).
STALLS = [
    (ExponentialMean(0.999), torch.bfloat16, 1.5, 5000, 1.5 - 0.5 * 0.999**5000),
    (ExponentialMean(0.9999), torch.float16, 1.5, 5000, 1.5 - 0.5 * 0.9999**5000),
    (ExponentialMean(0.9999, compensated=True), torch.float32, 1.0005, 60000, 1.0005 - 0.0005 * 0.9999**60000),
]


@pytest.mark.parametrize(("rule", "dtype", "weight", "updates", "expected"), STALLS, ids=lambda value: str(value)[:12])
def test_averages_near_one_do_not_stall(
    rule: ExponentialMean, dtype: torch.dtype, weight: float, updates: int, expected: float
) -> None:
    state = rule.init({"w": torch.ones(1, dtype=dtype)})
    live = {"w": torch.full((1,), weight, dtype=dtype)}
    for _ in range(updates):
        rule.update(state, live)
    assert state["average"]["w"].item() == pytest.approx(expected, abs=2e-7 if rule.compensated else 2e-5)


def test_a_mean_of_bfloat16_weights_does_not_stall() -> None:
    state = Mean().init({"w": torch.ones(1, dtype=torch.bfloat16)})
    for value in [1.0] * 1000 + [2.0] * 1000:
        Mean().update(state, {"w": torch.full((1,), value, dtype=torch.bfloat16)})
    assert state["mean"]["w"].item() == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("average", [EMA, SWA, LAWA], ids=lambda kind: kind.__name__)
def test_any_number_of_validations_changes_the_float32_average_by_nothing(
    average: type[WeightMerging], precision: str, tmp_path: Path
) -> None:
    def merged(validations: int) -> dict[str, Tensor]:
        settings: dict[str, Any] = {EMA: {"decay": 0.9}, SWA: {"start_epoch": 0}, LAWA: {"k": 2}}[average]
        callback = average(**settings)
        if precision == "16-mixed":
            scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
            how: dict[str, Any] = {"plugins": [scaled]}
        else:
            how = {"precision": precision}
        run = trainer(tmp_path, [callback], max_epochs=3, limit_val_batches=validations, **how)
        run.fit(Net(lr=0.01), batches(), validation())
        return callback.merged_weights()

    never, often = merged(0), merged(2)
    for name, tensor in never.items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, often[name]), name


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_average_of_a_half_precision_run_moves_by_steps_that_it_could_not_hold(
    precision: str, tmp_path: Path
) -> None:
    ema = EMA(decay=0.999)
    module = Walk(growth=(0.5, 0.0), start=1.0)
    trainer(tmp_path, [ema], max_epochs=500, precision=precision, limit_val_batches=0).fit(module, steps(1))
    assert ema.merged_weights()["w"].item() == pytest.approx(1.5 - 0.5 * 0.999**500, abs=1e-5)


class Packed(Tensor):
    """Says it is bfloat16 and holds four bits each, as quantised tensors of libraries do."""

    @staticmethod
    def __new__(cls, data: Tensor, shape: tuple[int, ...]) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def __init__(self, data: Tensor, shape: tuple[int, ...]) -> None:
        self.packed = data

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].packed, tuple(args[0].shape))
        raise NotImplementedError(f"{function} on packed numbers")


class Quantised(Net):
    """A packed layer, one of 8-bit floats and one of integers beside the trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(Packed(torch.zeros(8, dtype=torch.uint8), (4, 4)), requires_grad=False)
        self.float8 = nn.Parameter(torch.zeros(4, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.integers = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["packed"]  # a library would save its numbers


def test_packed_and_quantised_parameters_are_left_alone_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, ema = Quantised(), EMA(decay=0.9, validate="both")
    before = module.packed, module.packed.packed.clone()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [ema], max_epochs=1).fit(module, batches(), validation())
    assert "leaves 3 quantised, packed or integer parameters alone: `packed`, `float8`, `integers`." in caplog.text
    assert ema.merged_weights().keys() == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert module.packed is before[0]
    assert torch.equal(module.packed.packed, before[1])


def test_parameters_that_were_left_out_on_purpose_are_not_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ema = EMA(decay=0.9, selection=Selection(exclude=("packed", "float8", "integers")))
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [ema], max_epochs=1).fit(Quantised(), batches(), validation())
    assert "alone" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_numbers_are_averaged_and_codes_are_not(dtype: torch.dtype) -> None:
    assert is_averaged(torch.zeros(1, dtype=dtype))
    assert is_averaged(nn.Parameter(torch.zeros(1, dtype=dtype)))
    for codes in (torch.float8_e5m2, torch.uint8, torch.bool):
        assert not is_averaged(torch.zeros(1, dtype=codes))
