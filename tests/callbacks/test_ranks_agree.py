"""Two processes that see, log or keep different things: they decide alike, and none waits for the other."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from ranks import WideParts, ddp, fit
from tiny import of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_merge.callbacks import ASWA, EMA, SMA, SWAD, AcceptIfBetter, League
from lightning_merge.weights import mean_over_ranks_

pytestmark = pytest.mark.multiprocess

LOWEST, DAY = torch.finfo(torch.float32).min, 1764285750.0


def rank() -> int:
    return int(os.environ["RANK"])


# What each process holds, and what their mean is.
MEANS: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "the lowest numbers": (torch.full((2,), LOWEST),) * 3,
    "a mask of infinities": (torch.tensor([0.0, -torch.inf]),) * 3,
    "seconds in float64": (torch.tensor(DAY + 1 / 3, dtype=torch.float64),) * 3,
    "float64 that differs": tuple(torch.tensor(DAY + d, dtype=torch.float64) for d in (0.25, 0.75, 0.5)),  # type: ignore[dict-item]
    "the ends of float64": tuple(torch.tensor(s * 1.7e308, dtype=torch.float64) for s in (1, 1, 1)),  # type: ignore[dict-item]
    "half precision": (torch.tensor(2.0).half(), torch.tensor(4.0).half(), torch.tensor(3.0).half()),
    "complex numbers": (torch.tensor([1 + 2j]), torch.tensor([3 - 2j]), torch.tensor([2 + 0j])),
    "double complex numbers": (torch.tensor([DAY + 1j], dtype=torch.complex128),) * 3,
    "a count": (torch.tensor([[3, 5]]), torch.tensor([[4, 9]]), torch.tensor([[3, 5]])),
    "flags": (torch.tensor([True, False]), torch.tensor([False, False]), torch.tensor([True, False])),
    "nothing": (torch.empty(0),) * 3,
}


class UnevenParts(WideParts):
    """Logs its loss in one process alone, and something else in the other one first."""

    def __init__(self, logging: int = 0, name: str = "val/loss") -> None:
        super().__init__()
        self.logging, self.name = logging, name

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.loss(batch)
        if rank() != self.logging:
            self.log("val/other", loss, rank_zero_only=rank() == 0)
        else:
            self.log(self.name, loss, rank_zero_only=rank() == 0)
            self.log("val/other", loss, rank_zero_only=rank() == 0)


def decided(root: Path, callback: Any, *others: Any, **settings: Any) -> Any:
    module = of(UnevenParts)(**settings)
    try:
        fit(root, [callback, *others], module, ddp(), max_epochs=3)
    except ValueError as error:
        return str(error)
    return [tensor.tolist() for tensor in module.state_dict().values()]


def work(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for first in (0, 1):
        judge = AcceptIfBetter("val/loss", shares=(0.0, 0.5))
        found[f"judge {first}"] = decided(root, EMA(0.5), judge, logging=first), judge.scores
        league = League([EMA(0.5), EMA(0.9, name="slow")], "val/loss")
        found[f"league {first}"] = decided(root, league, logging=first), league.winner
        swad = SWAD("val/loss", n_converge=1, n_tolerance=2)
        found[f"swad {first}"] = decided(root, swad, logging=first), swad.updates
        sma = SMA("val/loss", start_step=1)
        found[f"sma {first}"] = decided(root, sma, logging=first), sma.updates
        aswa = ASWA("val/loss")
        found[f"aswa {first}"] = decided(root, aswa, logging=first), aswa.score
    for title, callbacks in {
        "judge": [EMA(), AcceptIfBetter("val/loss")],
        "league": [League([EMA()], "val/loss")],
        "swad": [SWAD("val/loss")],
        "aswa": [ASWA("val/loss", start_epoch=1)],
    }.items():
        found[f"{title} without it"] = decided(root, *callbacks, name="val/lost"), None
    found["means"] = {name: each[rank()].clone() for name, each in MEANS.items()}
    mean_over_ranks_(dict(reversed(found["means"].items())) if rank() else found["means"])
    spread = DeviceMesh("cpu", [0, 1])
    for title, placement in {"parts": Shard(0), "copies": Replicate()}.items():
        part = torch.full((2 - rank(),) if title == "parts" else (2,), float(rank()))  # parts of 2 and 1 numbers
        layout = (3,) if title == "parts" else (2,)
        like = DTensor.from_local(part, spread, [placement], shape=torch.Size(layout), stride=(1,), run_check=False)
        mean_over_ranks_({"buffer": part}, {"buffer": like})
        found[title] = part.tolist()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return launch(2, work, tmp_path_factory.mktemp("agree"))


@pytest.mark.parametrize("what", MEANS)
def test_the_mean_over_processes_of_equal_numbers_is_that_number_whatever_it_is(
    what: str, found: list[dict[str, Any]]
) -> None:
    for each in found:
        torch.testing.assert_close(each["means"][what], MEANS[what][2], rtol=0, atol=0)


def test_parts_of_a_buffer_are_not_averaged_with_each_other(found: list[dict[str, Any]]) -> None:
    assert [each["parts"] for each in found] == [[0.0, 0.0], [1.0]]
    assert [each["copies"] for each in found] == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("who", ["judge", "league", "swad", "sma", "aswa"])
def test_all_decide_by_the_process_that_logs_the_metric(who: str, first: int, found: list[dict[str, Any]]) -> None:
    model, decision = found[0][f"{who} {first}"]
    assert isinstance(model, list)
    assert decision
    assert found[1][f"{who} {first}"] == (model, decision)


@pytest.mark.parametrize("who", ["judge", "league", "swad", "aswa"])
def test_a_metric_that_no_process_logs_is_refused_in_all_of_them(who: str, found: list[dict[str, Any]]) -> None:
    for each in found:
        message, _ = each[f"{who} without it"]
        assert "must be a metric that validation logs, got 'val/loss'" in message
        assert "val/lost" in message
        assert "val/other" in message
