"""What online merging refuses to wrap or to merge."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_merge._mergeable import why_not
from lightning_merge.branches._optimizer_states import refuse_divided


def check_optimizer(optimizer: Optimizer, chunk_size: int | None) -> None:
    """Refuses what cannot be wrapped."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`base_optimizer` must be a torch optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, LBFGS):
        raise ValueError("`base_optimizer` must update once per step, got LBFGS, which searches along a line.")
    refuse_divided("OnDARE and OnTIES", optimizer)
    clips = any(settings.get("max_grad_norm") for settings in (optimizer.defaults, *optimizer.param_groups))
    if clips and chunk_size is not None:
        raise ValueError(
            f"`chunk_size` must be None, got {chunk_size}: {type(optimizer).__name__} limits the norm of all gradients"
            " together (`max_grad_norm`), and would see those of a few tensors at a time. Or switch that off, and clip"
            " by the Trainer's `gradient_clip_val`."
        )


def refuse_unmergeable(groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str], exempt: Sequence[str]) -> None:
    """What trains and cannot be merged has to be left out in so many words."""
    for group in groups:
        for parameter in group["params"] if group["merge"] else ():
            name = names[parameter]
            reason = "holds complex numbers" if parameter.is_complex() else why_not(parameter)
            if reason and not any(fnmatchcase(name, pattern) for pattern in exempt):
                raise ValueError(
                    f"`{name}` {reason}; signs and masks are of real numbers. Leave it out: `exempt=[{name!r}]`, or"
                    " a parameter group with `merge` False."
                )
