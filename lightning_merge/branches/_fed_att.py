"""All branches go on from where they were, moved towards each by how far it went."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import number, one_of, settle
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy, newly_branched
from lightning_merge.weights import State, Weights, average_dtype

Prefers = Literal["far", "near"]


@final
@dataclass(frozen=True)
class FedAtt(Policy):
    """``w <- w + step * sum over i of a_i * (branch i - w)``, ``a = softmax(|branch i - w|)``, tensor by tensor.

    ``w`` is where the last merge left all branches; the norm of a matrix is its spectral norm, of everything else the
    Euclidean one. In the authors' code the branch that went farthest counts most (``"far"``); attention as they
    describe it, by likeness, is ``"near"``: the softmax of the negative distance. Buffers become their mean.

    Args:
        step: More than 0.
        prefers: ``"far"`` or ``"near"``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(0.0)
        >>> policy = FedAtt(step=1.0)
        >>> state = policy.init(branches)
        >>> _ = branches.weights(1)["weight"].fill_(1.0)
        >>> policy.merge(state, branches)
        >>> round(branches.weights(0)["weight"].item(), 4)  # e / (e + 1) of the way to the one that moved
        0.7311

    References:
        Ji et al., "Learning private neural language modeling with attentive aggregation", IJCNN 2019, algorithm 1.
    """

    restarts: ClassVar[bool] = True

    step: float = 1.2
    prefers: Prefers = "far"

    def __post_init__(self) -> None:
        settle(self, step=number("step", self.step, "(0, inf)"), prefers=one_of("prefers", self.prefers, Prefers))

    def init(self, branches: Branches) -> State:
        start = branches.mean()
        return {"anchor": {name: start[name].cpu() for name in branches.parameters}}

    def look_again(self, state: State, branches: Branches) -> None:
        state["anchor"] |= {name: tensor.cpu() for name, tensor in newly_branched(state["anchor"], branches).items()}

    @torch.no_grad()
    def merge(self, state: State, branches: Branches) -> None:
        anchor: Weights = state["anchor"]
        names = [name for name in branches.parameters if name in anchor]
        distances = torch.stack(branches.gather(lambda own: _distances(own, anchor, names)))
        shares = (distances if self.prefers == "far" else -distances).softmax(0)
        turns = iter(branches.own)

        def weighed(own: Weights) -> Weights:
            share = shares[next(turns)]
            return {name: share[i] * _moved(own, anchor, name) for i, name in enumerate(names)}

        moves, new = branches.start_mean(weighed).result(), branches.mean()
        for name in names:
            # The mean over branches, whose shares together are 1.
            kept = anchor[name].to(new[name])
            new[name] = kept + self.step * branches.count * moves[name].to(kept)
            anchor[name].copy_(new[name])
        branches.assign(new)


def _moved(own: Weights, anchor: Weights, name: str) -> Tensor:
    wide = own[name].detach().to(average_dtype(own[name]))
    return wide - anchor[name].to(wide)


def _distances(own: Weights, anchor: Weights, names: list[str]) -> Tensor:
    return torch.stack([_length(_moved(own, anchor, name)).double() for name in names])


def _length(moved: Tensor) -> Tensor:
    found: Tensor = torch.linalg.matrix_norm(moved, ord=2) if moved.dim() == 2 else torch.linalg.vector_norm(moved)
    return found
