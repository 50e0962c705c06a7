"""``Averager`` on two processes: under DDP, with Fabric, and with parameters that FSDP2 has sharded."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import Tensor, nn

from lightning_merge import Averager
from lightning_merge.rules import ExponentialMean

RULE = ExponentialMean(0.5)


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7) if norm else nn.Tanh(), nn.Linear(7, 1))


def batch(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The tensors put together from all processes. All must call this."""
    state = module.state_dict()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in state.items()}


def train(
    model: nn.Module, inner: nn.Module, optimizer: Any, steps: range, backward: Callable[[Tensor], Any]
) -> list[dict[str, Tensor]]:
    """The weights after each step."""
    seen = []
    for step in steps:
        optimizer.zero_grad()
        backward(model(batch(step)).square().mean())
        optimizer.step()
        seen.append(whole(inner))
    return seen


def by_hand(start: dict[str, Tensor], seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average of parameters."""
    names = [name for name, tensor in start.items() if tensor.is_floating_point() and "running" not in name]
    state = RULE.init({name: start[name] for name in names})
    for each in seen:
        RULE.update(state, {name: each[name] for name in names})
    return RULE.result(state) or {}


def agree(expected: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def under_ddp() -> dict[str, Any]:
    inner = net(norm=True)
    model = nn.parallel.DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, optimizer, RULE)
    start = whole(inner)
    seen = train(model, inner, optimizer, range(3), Tensor.backward)
    expected = by_hand(start, seen)
    with averager.merged():
        in_place = whole(inner)
        model(batch(9))  # broadcasts buffers
    return {
        "names": sorted(averager.merged_weights() or {}),
        "merged": agree(expected, in_place),
        "raw": agree(seen[-1], whole(inner)),
        "buffers": in_place["1.running_mean"],
        "own": seen[-1]["1.running_mean"],
    }


def with_fabric() -> dict[str, Any]:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    fabric.launch()
    inner = net()
    model, optimizer = fabric.setup(inner, torch.optim.AdamW(inner.parameters(), lr=0.1))
    averager = Averager(model, optimizer, RULE)
    start = whole(inner)
    with fabric.no_backward_sync(model):
        fabric.backward(model(batch(7)).sum())  # accumulates
    seen = train(model, inner, optimizer, range(3), fabric.backward)
    with averager.merged():
        in_place = whole(inner)
    return {
        "names": sorted(averager.merged_weights() or {}),
        "steps": averager.steps,
        "merged": agree(by_hand(start, seen), in_place),
        "raw": agree(seen[-1], whole(inner)),
    }


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = net()
    for block in (model[0], model[2]):
        fully_shard(block)
    fully_shard(model)
    return model


def with_fsdp2() -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    averager = Averager(model, optimizer, RULE)
    start = whole(model)
    seen = train(model, model, optimizer, range(2), Tensor.backward)
    saved = io.BytesIO()
    torch.save([{n: t.to_local() for n, t in model.state_dict().items()}, averager.state_dict()], saved)
    state = copy.deepcopy(optimizer.state_dict())

    optimizer.zero_grad()
    model(batch(2)).square().mean().backward()
    with CommDebugMode() as communication:
        optimizer.step()
    seen.append(whole(model))
    expected = by_hand(start, seen)
    health = averager.health()
    plain = net()
    plain.load_state_dict(expected)
    with averager.merged(), torch.no_grad():
        in_place = whole(model)
        same_output = torch.equal(model(batch(9)), plain(batch(9)))
    raw = agree(seen[-1], whole(model))

    saved.seek(0)
    live, average = torch.load(saved)
    other = sharded()
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            tensor.to_local().copy_(live[name])
    resumed_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    resumed_optimizer.load_state_dict(state)
    resumed = Averager(other, resumed_optimizer, RULE)
    resumed.load_state_dict(average)
    train(other, other, resumed_optimizer, range(2, 3), Tensor.backward)
    with resumed.merged():
        after = whole(other)
    return {
        "names": sorted(averager.merged_weights() or {}),
        "part": (averager.merged_weights() or {})["0.weight"].shape[0],
        "communicated": communication.get_total_counts(),
        "merged": agree(expected, in_place),
        "output": same_output,
        "raw": raw,
        "resumed": agree(expected, after),
        "steps": resumed.steps,
        "health": health,
        "distance": float(sum((expected[name] - seen[-1][name]).square().sum() for name in expected)) ** 0.5,
    }


def work(root: Path) -> dict[str, dict[str, Any]]:
    fabric = with_fabric()  # which sets the process group up
    return {"fabric": fabric, "ddp": under_ddp(), "fsdp2": with_fsdp2()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return launch(2, work, tmp_path_factory.mktemp("averagers"))


PARAMETERS = ["0.bias", "0.weight", "2.bias", "2.weight"]


@pytest.mark.multiprocess
def test_under_ddp_each_process_has_the_average_and_buffers_are_means(found: Any) -> None:
    for each in found:
        ddp = each["ddp"]
        assert [name for name in ddp["names"] if not name.startswith("1.")] == PARAMETERS
        assert (ddp["merged"], ddp["raw"]) == (True, True)
    first, second = (each["ddp"] for each in found)
    assert not torch.equal(first["own"], second["own"])
    assert torch.equal(first["buffers"], second["buffers"])


@pytest.mark.multiprocess
def test_with_fabric_the_loop_stays_as_it_is(found: Any) -> None:
    for each in found:
        assert each["fabric"] == {"names": PARAMETERS, "steps": 3, "merged": True, "raw": True}


@pytest.mark.multiprocess
def test_sharded_parameters_are_averaged_where_they_are(found: Any) -> None:
    for each in found:
        fsdp2 = each["fsdp2"]
        assert fsdp2["names"] == PARAMETERS
        assert (fsdp2["merged"], fsdp2["raw"], fsdp2["output"]) == (True, True, True)
        assert fsdp2["communicated"] == 0
        assert (fsdp2["resumed"], fsdp2["steps"]) == (True, 3)
    assert sum(each["fsdp2"]["part"] for each in found) == 7


@pytest.mark.multiprocess
def test_the_distance_of_sharded_parameters_is_that_of_the_whole(found: Any) -> None:
    first, second = (each["fsdp2"] for each in found)
    assert first["health"] == second["health"]
    assert first["health"]["merged/updates"] == 3
    assert first["health"]["merged/distance"] == pytest.approx(first["distance"], rel=1e-5)
