"""Modules, data and fits for tests that run in several gloo processes."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tiny import NetParts, batches, of, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_merge.shards import as_sharded


class WideParts(NetParts):
    """Seven hidden units, which neither two nor four processes can share evenly."""

    def __init__(self, norm: bool = False, lr: float = 0.1) -> None:
        super().__init__(norm, lr)
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7) if norm else nn.Tanh(), nn.Linear(7, 1))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)


class ShardedParts(WideParts):
    """Sharded as the mesh says. With FSDP2 the last layer belongs to the root, and one process has all of it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.device_mesh is None or any(hasattr(p, "to_local") for p in self.parameters()):
            return  # another strategy, or a second fit
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if tensor.size() > 1:
            parallelize_module(self.net, tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if data.size() > 1 or tensor.size() == 1:
            fully_shard(self.net[0], mesh=data)
            fully_shard(self.net, mesh=data)


class EvenParts(ShardedParts):
    """Eight hidden units: tensor parallelism needs its layers to be shared evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)


Wide, Sharded, Even = of(WideParts), of(ShardedParts), of(EvenParts)


def loaders(shares: int = 1, share: int = 0) -> tuple[Any, Any]:
    """Four steps of eight samples, and what is validated on; of either one share."""
    loaders = batches(4, size=8), batches(2, size=8, seed=2)
    samplers = [DistributedSampler(each.dataset, shares, share, shuffle=False) for each in loaders]
    train, validation = (
        DataLoader(each.dataset, 8 // shares, sampler=sampler) for each, sampler in zip(loaders, samplers, strict=True)
    )
    return train, validation


def fsdp2(data: int | None = None, tensor: int = 1, whole_files: bool = False) -> ModelParallelStrategy:
    """The strategy for so many processes; by default all are for data."""
    data = int(os.environ["WORLD_SIZE"]) // tensor if data is None else data
    return ModelParallelStrategy(
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        save_distributed_checkpoint=not whole_files,
        process_group_backend="gloo",
        timeout=timedelta(seconds=60),
    )


def ddp() -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))


def fit(root: Path, callbacks: Any, module: Any, strategy: Any, ckpt_path: Any = None, **settings: Any) -> Any:
    """A fit in this process and its peers; the Trainer."""
    devices = int(os.environ["WORLD_SIZE"])
    run = trainer(root, callbacks, strategy=strategy, devices=devices, use_distributed_sampler=False, **settings)
    shares = getattr(strategy, "_data_parallel_size", devices)
    run.fit(module, *loaders(shares, int(os.environ["RANK"]) * shares // devices), ckpt_path=ckpt_path)
    return run


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors put together from all processes. All must call this."""
    state = module.state_dict()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in state.items()}


def together(average: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the processes hold of the tensors of an average put together. All must call this."""
    live = average.captured
    return {
        name: as_sharded(t, live[name]).full_tensor().clone() if hasattr(live[name], "to_local") else t.clone()
        for name, t in tensors.items()
    }
