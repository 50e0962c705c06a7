"""Part: FSDP2, one process: the hook of an update, and how many collectives it takes."""

import os
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from _device._averages import DECAY
from _device._models import Batches, InFit, stack, trainer
from _device._session import Session
from lightning_merge import callbacks as ours


class _Sharded(pl.LightningModule):
    def __init__(self, session: Session, width: int, layers: int) -> None:
        super().__init__()
        self.net = stack(session, width, layers)

    def configure_model(self) -> None:
        if any(hasattr(p, "to_local") for p in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def sharded(session: Session) -> None:
    """The update by the optimizer's hooks."""
    width, layers = (16, 2) if session.tiny else (1024, 16)

    @torch.no_grad()
    def measure(run: Any, module: Any) -> None:
        (optimizer,) = run.optimizers
        numbers = sum(p.to_local().numel() for p in module.parameters())
        flat = torch.randn(2, numbers, device=session.device)

        def hooks() -> None:
            for hook in list(optimizer._optimizer_step_post_hooks.values()):
                hook(optimizer, (), {})

        work = {"limit: a flat lerp_": lambda: flat[0].lerp_(flat[1], 1 - DECAY), "hooks of the step": hooks}
        with CommDebugMode() as collectives:
            hooks()
        found = session.timed(work, 20, 4.0)
        session.say(
            "FSDP2, one update",
            numbers=numbers,
            backend=dist.get_backend(),
            collectives=collectives.get_total_counts(),
            table=found,
        )

    try:
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
        settings: dict[str, Any] = {"strategy": strategy, "use_distributed_sampler": False, "max_epochs": 1}
        batch = torch.randn(4, width, device=session.device)
        average = ours.EMA(decay=DECAY, final_checkpoint=False)
        run = trainer(session, [InFit(session, "FSDP2, one update", measure), average], **settings)
        run.fit(_Sharded(session, width, layers), Batches(batch, 3))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
            os.environ.pop(name, None)
