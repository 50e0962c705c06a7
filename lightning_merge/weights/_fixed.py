"""A set of tensors that stay the same objects, of which more is known than of any set."""

from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import Tensor

from lightning_merge.weights._precision import is_averaged
from lightning_merge.weights._sizes import Norms


class Fixed(dict[str, Tensor]):
    """A set of tensors that is not written to: a module with others gets a new set.

    What is asked of it at each step is worked out once, and again if a tensor has got another dtype or device, as by
    ``module.half()``.

    Attributes:
        at_once: Those of which an average means something, except those of ``on_a_device``.
        norms: Of these.
        on_a_device: Those on CUDA devices, in groups of one dtype on one.
    """

    at_once: dict[str, Tensor]
    norms: Norms
    on_a_device: list[dict[str, Tensor]]
    _kinds: list[torch.dtype | bool] | None = None

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> "Fixed":
        """The set itself if it is one, with what is true of it now."""
        fixed = weights if isinstance(weights, Fixed) else cls(weights)
        kinds = [*map(_dtype, fixed.values()), *map(_is_on_cpu, fixed.values())]
        if fixed._kinds != kinds:
            fixed._kinds = kinds
            fixed._work_out()
        return fixed

    def _work_out(self) -> None:
        groups: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        averaged = averaged_in(self)
        self.at_once = {name: t for name, t in averaged.items() if t.device.type != "cuda"}
        for name, tensor in averaged.items():
            if name not in self.at_once:
                groups.setdefault((tensor.dtype, tensor.device), {})[name] = tensor
        self.norms = Norms(self.at_once.values())
        self.on_a_device = list(groups.values())


def averaged_in(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that an average means something of, and that are not empty."""
    return {name: t for name, t in weights.items() if is_averaged(t) and t.numel()}


_dtype, _is_on_cpu = attrgetter("dtype"), attrgetter("is_cpu")
