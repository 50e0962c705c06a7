"""Branches: several sets of weights, buffers and optimizer state of one module, which train apart and mix.

``Branches`` says what a set of branches can do. ``InTurn`` places them one after the other in one module on one device,
``OnePerRank`` side by side in the processes of a distributed run.
A **policy** says how they mix. To add a method, write a frozen dataclass with ``merge(state, branches)``:

    @final
    @dataclass(frozen=True)
    class PullToMean(Policy):
        pull: float = 0.01

        def merge(self, state: State, branches: Branches) -> None:
            k = branches.count
            branches.mix([[(1 - self.pull) * (i == j) + self.pull / k for i in range(k)] for j in range(k)])

and a callback that chooses it: ``Branching(PullToMean(), EveryNSteps(10), branches=3, name="pull")``. A policy that is
no matrix uses ``branches.mean(shares)``, ``branches.assign(weights)`` and ``branches.gather(choose)``, which work the
same in both placements; what it must remember it puts into ``state``, which is saved with the run.
"""

from lightning_merge.branches._average import Average
from lightning_merge.branches._base import Branches
from lightning_merge.branches._best_mix import BestMix
from lightning_merge.branches._combine import Combine
from lightning_merge.branches._fed_att import FedAtt
from lightning_merge.branches._fed_fisher import FedFisher
from lightning_merge.branches._in_turn import InTurn
from lightning_merge.branches._matrix import Matrix, uniform
from lightning_merge.branches._nova import Nova
from lightning_merge.branches._one_per_rank import OnePerRank, Placement
from lightning_merge.branches._outer_step import OuterStep
from lightning_merge.branches._pairs import Pairs
from lightning_merge.branches._policy import Policy
from lightning_merge.branches._pull_to_mean import PullToMean
from lightning_merge.branches._shuffle import Shuffle
from lightning_merge.branches._softmax_of_scores import SoftmaxOfScores
from lightning_merge.branches._streaming_outer_step import StreamingOuterStep
from lightning_merge.branches._weighted_average import WeightedAverage

__all__ = [
    "Average",
    "BestMix",
    "Branches",
    "Combine",
    "FedAtt",
    "FedFisher",
    "InTurn",
    "Matrix",
    "Nova",
    "OnePerRank",
    "OuterStep",
    "Pairs",
    "Placement",
    "Policy",
    "PullToMean",
    "Shuffle",
    "SoftmaxOfScores",
    "StreamingOuterStep",
    "WeightedAverage",
    "uniform",
]
