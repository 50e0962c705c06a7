"""The second moments that an optimizer of Adam's kind has of its gradients."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_merge.weights import Weights, average_dtype

_KEY = "exp_avg_sq"


def keeps_moments(optimizer: Optimizer) -> bool:
    """Whether it may keep second moments: it has the two decays of Adam's kind."""
    betas = [group.get("betas") for group in optimizer.param_groups]
    return any(isinstance(each, tuple | list) and len(each) >= 2 for each in betas)


@torch.no_grad()
def second_moments(parameters: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> tuple[Weights, dict[str, str]]:
    """``exp_avg_sq / (1 - beta_2^steps)`` of each parameter, and why others have none.

    Args:
        parameters: By name.
        optimizers: All of the run.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    left_out = dict.fromkeys(parameters, "in no optimizer")
    found: Weights = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (name := names.get(id(parameter))) is None:
                    continue
                state = optimizer.state.get(parameter, {})
                moments = state.get(_KEY)
                if not isinstance(moments, Tensor) or moments.shape != parameter.shape:
                    had = "has not stepped it" if not state and keeps_moments(optimizer) else f"keeps no `{_KEY}` of it"
                    left_out[name] = f"{type(optimizer).__name__} {had}"
                    continue
                seen = 1 - float(group["betas"][1]) ** float(state["step"])
                found[name] = moments.detach().to(average_dtype(moments)) / seen
                left_out.pop(name, None)
    return found, left_out
