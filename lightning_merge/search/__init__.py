"""Search: merge coefficients against a score."""

from lightning_merge.search._adam import Adam
from lightning_merge.search._bayesian import Bayesian
from lightning_merge.search._cma import CMAES
from lightning_merge.search._concrete import concrete_mask
from lightning_merge.search._evolutionary import Evolutionary
from lightning_merge.search._found import Evaluation, Found
from lightning_merge.search._gradient import Gradient
from lightning_merge.search._greedy import Greedy
from lightning_merge.search._grid import Grid
from lightning_merge.search._groups import by_tensor
from lightning_merge.search._line import Line
from lightning_merge.search._lorahub import compose_adapters, penalty
from lightning_merge.search._map import MAP, pareto_set
from lightning_merge.search._measured import Measured, Objective
from lightning_merge.search._method import Answer, Method, Proposals
from lightning_merge.search._objectives import CrossEntropy, Entropy
from lightning_merge.search._run import Score
from lightning_merge.search._search import search
from lightning_merge.search._spaces import Coefficients, Free, Negative, Simplex, Space

__all__ = [
    "CMAES",
    "MAP",
    "Adam",
    "Answer",
    "Bayesian",
    "Coefficients",
    "CrossEntropy",
    "Entropy",
    "Evaluation",
    "Evolutionary",
    "Found",
    "Free",
    "Gradient",
    "Greedy",
    "Grid",
    "Line",
    "Measured",
    "Method",
    "Negative",
    "Objective",
    "Proposals",
    "Score",
    "Simplex",
    "Space",
    "by_tensor",
    "compose_adapters",
    "concrete_mask",
    "pareto_set",
    "penalty",
    "search",
]
