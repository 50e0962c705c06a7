"""All branches go on from a step of an outer optimizer."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge._checks import number, settle
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy, newly_branched
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class OuterStep(Policy):
    """The way of the branches since the last merge is the gradient of an outer SGD with Nesterov momentum.

    ``g = anchor - mean``, ``v <- momentum * v + g``, ``anchor <- anchor - lr * (g + momentum * v)``, and every branch
    goes on from the anchor. With ``lr=1`` and ``momentum=0`` that is the mean. The anchor and the momentum are float32
    (wider if the weights are) and in host memory. Buffers become their mean.

    Args:
        lr: Outer learning rate; more than 0.
        momentum: Outer momentum, in [0, 1).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=1)
        >>> _ = branches.weights(0)["weight"].fill_(1.0)
        >>> policy = OuterStep(lr=0.5, momentum=0.5)
        >>> state = policy.init(branches)
        >>> _ = branches.weights(0)["weight"].fill_(0.0)
        >>> policy.merge(state, branches)
        >>> branches.weights(0)
        {'weight': tensor([[0.2500]])}

    References:
        Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023, algorithm 1.
    """

    restarts: ClassVar[bool] = True

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        settle(self, lr=number("lr", self.lr, "(0, inf)"), momentum=number("momentum", self.momentum, "[0, 1)"))

    def init(self, branches: Branches) -> State:
        live = {name: t for name, t in branches.live.items() if isinstance(t, torch.nn.Parameter)}
        start = branches.mean()
        anchor = {name: start[name].cpu() for name in live}
        return {"anchor": anchor, "momentum": weights.zeros(anchor)}

    def look_again(self, state: State, branches: Branches) -> None:
        new = {name: tensor.cpu() for name, tensor in newly_branched(state["anchor"], branches).items()}
        state["anchor"] |= new
        state["momentum"] |= weights.zeros(new)

    @torch.no_grad()
    def merge(self, state: State, branches: Branches) -> None:
        new = branches.mean()
        for name, kept in state["anchor"].items():
            anchor, velocity = kept.to(new[name]), state["momentum"][name].to(new[name])
            new[name], velocity = stepped(anchor, velocity, anchor - new[name], self.lr, self.momentum)
            kept.copy_(new[name])
            state["momentum"][name].copy_(velocity)
        branches.assign(new)


def stepped(anchor: Tensor, velocity: Tensor, gradient: Tensor, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    """The anchor and the velocity after a Nesterov step."""
    velocity = momentum * velocity + gradient
    return anchor - lr * (gradient + momentum * velocity), velocity
