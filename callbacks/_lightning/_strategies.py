"""Under which strategies weights can be merged, and what to use instead of the others."""

from typing import Any

_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}
_REFUSED = {
    "FSDPStrategy": "flattens parameters into one (FSDP1), so that names and shapes are lost",
    "DeepSpeedStrategy": "keeps weights of its own and writes checkpoints around Lightning, and nobody has tested it",
    "XLAStrategy": "has not been tested",
    "SingleDeviceXLAStrategy": "has not been tested",
}
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def refuse_unsupported(strategy: Any) -> None:
    """For averages, which work on parts of tensors.

    Raises:
        ValueError: If averages do not work under the strategy, or nobody knows whether they do.
    """
    names = _names(strategy)
    reason = next((_REFUSED[name] for name in names if name in _REFUSED), "is not known to averages")
    if _REFUSED.keys() & set(names) or not _SUPPORTED & set(names):
        raise ValueError(
            f"{names[0]} {reason}. Use a single device, `strategy='ddp'`, or `ModelParallelStrategy` with FSDP2"
            " (`torch.distributed.fsdp.fully_shard` in `configure_model`), which shards weights, gradients and"
            " optimizer states as FSDP1 and DeepSpeed do; see docs/strategies.md."
        )


def refuse_sharding(strategy: Any, title: str, instead: str = "Use a single device or `strategy='ddp'`.") -> None:
    """For what needs whole parameters in every process.

    Raises:
        ValueError: If the strategy shards parameters, or keeps them itself.
    """
    names = _names(strategy)
    if _SHARDING & set(names):
        raise ValueError(f"{title} needs whole parameters, and {names[0]} shards them. {instead}")


def _names(strategy: Any) -> list[str]:
    # By name: the classes of two packages, some of which need what is not installed.
    return [cls.__name__ for cls in type(strategy).__mro__]
