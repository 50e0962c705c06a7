"""OnDARE and OnTIES on two gloo processes: replicas stay equal, and shards equal the whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard
from torch.nn.parallel import DistributedDataParallel

from lightning_merge.optim import OnDARE, OnTIES

pytestmark = pytest.mark.multiprocess

STEPS = 60
METHODS = {
    "ondare": (OnDARE, {"density": 0.5}),
    "ondare low": (OnDARE, {"density": 0.05}),
    "ondare l1": (OnDARE, {"density": 0.5, "rescale": "l1", "form": "official"}),
    "ondare steps": (OnDARE, {"density": 0.5, "merge_every": 3}),
    "onties": (OnTIES, {"density": 0.3}),
    "onties official": (OnTIES, {"density": 0.3, "rescale": "l1", "form": "official"}),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    # The first weight has five rows, of which two processes hold three and two; it has more than 4096 / 0.3 elements.
    return nn.Sequential(nn.Linear(4000, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def optimizer(kind: str, net: nn.Module) -> Any:
    method, settings = METHODS[kind]
    generator = torch.Generator().manual_seed(1)
    tau = {name: torch.randn(p.shape, generator=generator) / 100 for name, p in net.named_parameters()}
    base = torch.optim.AdamW(net.named_parameters(), lr=1e-3, weight_decay=0.1)
    return method(base, tau, "zero", alpha=1e-2, **settings)


def loss(net: nn.Module, step: int, rank: int) -> Tensor:
    """Of half a batch, which its process sees."""
    x = torch.randn(8, 4000, generator=torch.Generator().manual_seed(step))
    return (net(x[4 * rank : 4 * rank + 4]) - x[4 * rank : 4 * rank + 4, :1]).square().mean()


def whole(net: nn.Module) -> list[Tensor]:
    tensors = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return [t.detach().clone() for t in tensors]


def replicas(kind: str, rank: int) -> list[Tensor]:
    net = model()
    parallel, merging = DistributedDataParallel(net), optimizer(kind, net)
    torch.manual_seed(100 + rank)  # random numbers that differ by process must not matter
    for step in range(STEPS):
        merging.zero_grad()
        torch.rand(rank + 1)
        loss(parallel, step, rank).backward()
        merging.step()
    return whole(net)


def shards(kind: str, rank: int) -> list[Tensor]:
    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)))
    fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)))
    merging = optimizer(kind, net)
    for step in range(12):
        merging.zero_grad()
        loss(net, step, rank).backward()
        merging.step()
    return whole(net)


def alone(kind: str) -> list[Tensor]:
    net = model()
    merging = optimizer(kind, net)
    for step in range(12):
        merging.zero_grad()
        ((loss(net, step, 0) + loss(net, step, 1)) / 2).backward()
        merging.step()
    return whole(net)


def refused() -> str:
    column = nn.Parameter(distribute_tensor(torch.ones(4, 4), dist.init_device_mesh("cpu", (2,)), [Shard(1)]))
    try:
        OnDARE(torch.optim.SGD([("w", column)], lr=1.0), {"w": torch.ones(4, 4)}, "zero")
    except ValueError as error:
        return str(error)
    return ""


def work(root: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    return {
        "replicas": {kind: replicas(kind, rank) for kind in METHODS},
        "shards": {kind: shards(kind, rank) for kind in METHODS},
        "refused": refused(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(2, work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", METHODS)
def test_two_replicas_are_the_same_bits_after_many_steps(kind: str, found: list[dict[str, Any]]) -> None:
    for one, other, start in zip(*(f["replicas"][kind] for f in found), model().parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)


@pytest.mark.parametrize("kind", METHODS)
def test_two_shards_equal_one_process(kind: str, found: list[dict[str, Any]]) -> None:
    for sharded, expected in zip(found[0]["shards"][kind], alone(kind), strict=True):
        assert (sharded - expected).abs().max() < 1e-6


def test_other_placements_are_refused(found: list[dict[str, Any]]) -> None:
    assert "`w` has placements" in found[0]["refused"]
    assert "fully_shard" in found[0]["refused"]
