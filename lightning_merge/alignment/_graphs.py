"""Forward passes written down symbolically."""

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_PACKAGES = ("torch", "timm", "torchvision")


def graphs(module: nn.Module) -> list[fx.Graph]:
    """The forward pass as the module is and in the other mode, where heads may be that only training has.

    Raises:
        ValueError: If ``torch.fx`` cannot follow one of them.
    """
    modes = {part: part.training for part in module.modules()}
    try:
        found = [_Tracer().trace(module)]
        other = not module.training
        for part in modes:
            part.training = other
        return [*found, _Tracer().trace(module)]
    except Exception as error:
        raise ValueError(
            f"the forward pass of {type(module).__name__} cannot be followed symbolically: {error}. Give the part of it"
            " that has no branches on values, as `module.net`."
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its class of ``torch`` is known for: no code and no tensors of somebody else in it."""
    owner = type(layer).forward.__module__.partition(".")[0]
    watched = layer._forward_hooks or layer._forward_pre_hooks  # among them those of pruning and old spectral norms
    inner = any(True for child in layer.children() for _ in child.parameters())
    return owner in _PACKAGES and not watched and not inner and "forward" not in vars(layer)


class _Tracer(fx.Tracer):
    """Goes into every module but the layers that are known, also those of other packages that subclass them."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )
