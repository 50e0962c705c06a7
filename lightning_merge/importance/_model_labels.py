"""Labels that a model draws, in the place of those of the data."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ModelLabels(TorchFunctionMode):
    """Inside, the targets of losses of classes are drawn from what the model gives them.

    Those are ``cross_entropy``, ``nll_loss`` and ``binary_cross_entropy_with_logits`` of ``torch.nn.functional``, which
    the losses of ``torch.nn`` call. Targets that are ignored stay so.

    Attributes:
        drawn: How many losses have got such targets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls it, with other targets if it is such a loss."""
        draw = _DRAWN.get(function)
        if draw is None:
            return function(*args, **(kwargs or {}))
        given = {**dict(zip(("input", "target"), args, strict=False)), **(kwargs or {})}
        ignored = given.get("ignore_index", args[4] if len(args) > 4 else -100)
        given["target"] = draw(given["input"].detach().float(), given["target"], ignored)
        self.drawn += 1
        rest = args[2:]
        return function(given.pop("input"), given.pop("target"), *rest, **given)


def _classes(logits: Tensor, target: Tensor, ignored: int) -> Tensor:
    """One class for each target, by the softmax of the logits along the dimension of classes."""
    shares = logits.softmax(1 if logits.ndim > 1 else 0).movedim(1 if logits.ndim > 1 else 0, -1)
    drawn = torch.multinomial(shares.reshape(-1, shares.shape[-1]), 1).view(shares.shape[:-1])
    return drawn if target.is_floating_point() else torch.where(target == ignored, target, drawn)


def _flags(logits: Tensor, target: Tensor, ignored: int) -> Tensor:
    return logits.sigmoid().bernoulli().to(target)


_DRAWN: dict[Any, Callable[[Tensor, Tensor, int], Tensor]] = {
    functional.cross_entropy: _classes,
    functional.nll_loss: _classes,
    functional.binary_cross_entropy_with_logits: _flags,
}
