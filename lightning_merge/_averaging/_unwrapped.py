"""The module and the optimizer inside of what frameworks wrap around them."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_merge._checks import instance

_AROUND_MODULES = {"DistributedDataParallel", "DataParallel", "_FabricModule"}
_REFUSED = {
    "FullyShardedDataParallel": "flattens parameters into one (FSDP1), so that names and shapes are lost",
    "DeepSpeedEngine": "keeps weights of its own",
}


def plain_module(model: Any, argument: str = "model") -> nn.Module:
    """The module that DDP, DataParallel or Fabric are around; ``module.`` is then no part of any name.

    Raises:
        TypeError: If it is no module.
        ValueError: If its parameters are not those of the module inside.
    """
    module: Any = instance(argument, model, nn.Module, "a module")
    while _AROUND_MODULES & _names(module):
        module = module.module
    for name, each in module.named_modules():
        for refused in _REFUSED.keys() & _names(each):
            raise ValueError(
                f"`{argument}` is sharded by {refused}{f' at `{name}`' if name else ''}, which {_REFUSED[refused]}. Use"
                " DDP, or FSDP2 (`torch.distributed.fsdp.fully_shard`)."
            )
    return module  # type: ignore[no-any-return]


def plain_optimizer(optimizer: Any, argument: str = "optimizer") -> Optimizer:
    """The optimizer of torch whose ``step`` is called in the end: Fabric and accelerate wrap it.

    Raises:
        TypeError: If it is no optimizer of torch, as of several at once.
    """
    says = "one optimizer of torch, the one whose applied steps are counted"
    found: Any = instance(argument, optimizer, Optimizer, says)
    # One that is called through hooks of its own may do more after the step of the one inside.
    while not getattr(type(found).step, "hooked", False):
        if not isinstance(inner := getattr(found, "optimizer", None), Optimizer):
            break
        found = inner
    return found  # type: ignore[no-any-return]


def _names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}
