"""Low-rank adapters for the length of a fit."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_merge.weights import Inventory, Weights, canonical, submodules


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
        self._adapters: list[nn.Parameter] = []
        self._fast_path = True

    @property
    def is_attached(self) -> bool:
        """Whether a module has adapters at the moment."""
        return bool(self._layers)

    @staticmethod
    def targets(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
        """Which of the weights can have adapters, those of linear and plain convolution layers, and their layers.

        Attention of torch reads the weight of its projection past the layer, so that an adapter would do nothing.
        """
        wanted = set(names)
        found = {}
        for path, layer in submodules(module):
            weight = f"{canonical(path)}.weight"
            if isinstance(module.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
                continue
            plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
            if plain and weight in wanted:
                found[weight] = path
        return found

    def attach(self, module: nn.Module, names: Iterable[str]) -> None:
        """Adds fresh adapters, whose product is zero, and freezes everything else.

        Raises:
            ValueError: If a weight is used elsewhere too, where no adapter would be.
        """
        layers = self.targets(module, names)
        inventory = Inventory(module)
        if tied := next((weight for weight in layers if len(inventory.names_of(weight)) > 1), None):
            raise ValueError(
                f"`{tied}` is `{inventory.names_of(tied)[1]}` too, where its adapter would do nothing: leave it out, as"
                f" by `selection=Selection(exclude=[{tied!r}], trainable=True, buffers='recompute')`."
            )
        # A text is matched against whole names; those of a list are matched by their ends.
        exactly = "|".join(map(re.escape, layers.values()))
        config = self._peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=exactly)
        self._peft.inject_adapter_in_model(config, module, "task")
        self._layers = layers
        self._adapters = [parameter for name, parameter in module.named_parameters() if ".lora_" in name]
        # In eval mode, transformer layers of torch hand their weights to one operation, past all adapters.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def refuse_untrained(self, optimizers: Sequence[Optimizer]) -> None:
        """Checks that an optimizer has adapters, once all are made.

        Raises:
            ValueError: If none has, as one that was made before the adapters.
        """
        known = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
        if optimizers and self._layers and not any(id(parameter) in known for parameter in self._adapters):
            raise ValueError(
                "no optimizer has the adapters that are trained: `configure_optimizers` must take `self.parameters()`"
                " when it is called, after the adapters were put on; got an optimizer that was made before, or one of"
                " other parameters."
            )

    def refuse_unused(self, used: Iterable[str]) -> None:
        """Checks that adapters are in effect, once a loss was looked at.

        Args:
            used: Names of the parameters that the loss depends on.

        Raises:
            ValueError: If the weight of a layer is used and its adapter is not.
        """
        known = set(used)
        for weight, path in self._layers.items():
            inner = canonical(path)
            if f"{inner}.base_layer.weight" in known and not any(n.startswith(f"{inner}.lora_") for n in known):
                raise ValueError(
                    f"the adapter of `{weight}` does nothing: the module reads that weight and does not call its layer."
                    f" Leave it out, as by `selection=Selection(exclude=[{weight!r}], trainable=True,"
                    " buffers='recompute')`."
                )

    @torch.no_grad()
    def detach(self, module: nn.Module) -> Weights:
        """Takes the adapters off and returns the product of each, under the name of the weight it would add to."""
        products: Weights = {}
        for weight, path in self._layers.items():
            layer: Any = module.get_submodule(path)
            products[weight] = layer.get_delta_weight("task").float()
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, layer.get_base_layer())
        if self._layers:
            torch.backends.mha.set_fastpath_enabled(self._fast_path)
        self._layers, self._adapters = {}, []
        return products
