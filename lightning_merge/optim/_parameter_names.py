"""The names of an optimizer's parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge.optim._task_vector import Source
from lightning_merge.weights import Inventory


def names_of(optimizer: Optimizer, module: nn.Module | None, reference: Source | None) -> dict[Tensor, str]:
    """The name of every parameter of an optimizer: from a module that holds it, or from the optimizer's groups."""
    source = module if module is not None else reference if isinstance(reference, nn.Module) else None
    known: dict[Tensor, str] = {}
    if source is not None:
        found = Inventory(source)
        known = {parameter: name for name, parameter in found.parameters.items()}
        known |= {other: name for name, others in found.ties.items() for other in others}
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter not in known and "param_names" in group:
                known[parameter] = group["param_names"][i]
            if parameter not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has no name: give `module`, the model that"
                    f" {type(optimizer).__name__} updates, or build it from `model.named_parameters()`."
                )
    return known


@dataclass(frozen=True)
class LateSource:
    """What the task vector of parameters that come later is made of, as it was given for those there were.

    Attributes:
        reference: Of ``OnDARE`` and ``OnTIES``, like the next three.
        pretrained: See there.
        module: See there.
        tau: See there; empty if ``reference`` was given.
        dtype: How it is stored.
    """

    reference: Source | None
    pretrained: Source | Literal["zero"] | None
    module: nn.Module | None
    tau: Mapping[str, Mapping[str, Any]]
    dtype: torch.dtype | None

    def names(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> dict[Tensor, str]:
        """The names of parameters that came later.

        Raises:
            ValueError: If one has none.
        """
        try:
            known = names_of(optimizer, self.module, self.reference)
        except ValueError:
            known = {}
        for parameter in parameters:
            if parameter not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} was added after construction and has no name, so no"
                    " task vector: give `module`; or, to a group that is not merged, give it `merge` False."
                )
        return {parameter: known[parameter] for parameter in parameters}
