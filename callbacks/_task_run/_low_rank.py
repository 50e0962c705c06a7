"""Low-rank adapters for the length of a fit."""

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import nn

from lightning_merge.weights import Weights, canonical, submodules


@final
class LowRank:
    """Trains products of two thin matrices (LoRA) instead of weights; what a task adds is their product.

    A sum over tasks is one of products, never a product of sums: ``mean(B) mean(A)`` is not ``mean(B A)``.

    Args:
        rank: Inner dimension; at least 1.

    Raises:
        ValueError: If ``rank`` is less than 1.
        ImportError: If ``peft`` is not installed.

    References:
        Chitale et al., "Task arithmetic with LoRA for continual learning", 2023, section 3.
    """

    def __init__(self, rank: int) -> None:
        if rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, got {rank}.")
        try:
            import peft
        except ImportError as error:
            raise ImportError('LoRA needs peft: pip install "lightning-merge[continual]"') from error
        self.rank = rank
        self._peft: Any = peft
        self._layers: dict[str, str] = {}  # name of a weight -> path of its layer

    @property
    def is_attached(self) -> bool:
        """Whether a module has adapters at the moment."""
        return bool(self._layers)

    @staticmethod
    def targets(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
        """Which of the weights can have adapters, those of linear and plain convolution layers, and their layers."""
        wanted = set(names)
        found = {}
        for path, layer in submodules(module):
            weight = f"{canonical(path)}.weight"
            plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
            if plain and weight in wanted:
                found[weight] = path
        return found

    def attach(self, module: nn.Module, names: Iterable[str]) -> None:
        """Adds fresh adapters, whose product is zero, and freezes everything else."""
        layers = self.targets(module, names)
        config = self._peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(layers.values()))
        self._peft.inject_adapter_in_model(config, module, "task")
        self._layers = layers

    @torch.no_grad()
    def detach(self, module: nn.Module) -> Weights:
        """Takes the adapters off and returns the product of each, under the name of the weight it would add to."""
        products: Weights = {}
        for weight, path in self._layers.items():
            layer: Any = module.get_submodule(path)
            products[weight] = layer.get_delta_weight("task").float()
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, layer.get_base_layer())
        self._layers = {}
        return products
