"""The names of an optimizer's parameters."""

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
