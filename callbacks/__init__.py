"""Callbacks that merge weights while a Trainer runs. Import them from ``lightning_merge.callbacks``."""

if __name__ != "lightning_merge.callbacks":
    # A second import under the folder's own name would make a second, unequal set of classes.
    raise ImportError(f"import `lightning_merge.callbacks`, not `{__name__}`.")

from lightning_merge.callbacks._accept_if_better import AcceptIfBetter
from lightning_merge.callbacks._anchor import Anchor
from lightning_merge.callbacks._anneal import Anneal
from lightning_merge.callbacks._aswa import ASWA
from lightning_merge.callbacks._bema import BEMA
from lightning_merge.callbacks._best_k import BestK
from lightning_merge.callbacks._branch_strategy import BranchStrategy
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._continual_merging import ContinualMerging
from lightning_merge.callbacks._dart import DART
from lightning_merge.callbacks._diloco import DiLoCo
from lightning_merge.callbacks._doctor import Doctor
from lightning_merge.callbacks._ema import EMA
from lightning_merge.callbacks._evaluation_weights import EvaluationWeights
from lightning_merge.callbacks._forkmerge import ForkMerge
from lightning_merge.callbacks._importance_statistics import ImportanceStatistics
from lightning_merge.callbacks._interpolate import Extrapolate, Interpolate
from lightning_merge.callbacks._lawa import LAWA
from lightning_merge.callbacks._league import League
from lightning_merge.callbacks._league_run._standing import Standing
from lightning_merge.callbacks._linearize import Linearize
from lightning_merge.callbacks._local_sgd import LocalSGD
from lightning_merge.callbacks._lookaround import Lookaround
from lightning_merge.callbacks._online_merging import OnlineMerging
from lightning_merge.callbacks._papa import PAPA
from lightning_merge.callbacks._post_hoc_ema import PostHocEMA
from lightning_merge.callbacks._publication._callback import Published
from lightning_merge.callbacks._random_state import RandomState
from lightning_merge.callbacks._replay import Replayed, replay
from lightning_merge.callbacks._report import Report
from lightning_merge.callbacks._sma import SMA
from lightning_merge.callbacks._swa import SWA
from lightning_merge.callbacks._swad import SWAD
from lightning_merge.callbacks._teacher import teacher
from lightning_merge.callbacks._twa import TWA
from lightning_merge.callbacks._warp import WARP
from lightning_merge.callbacks._wash import WASH
from lightning_merge.callbacks._weight_merging import WeightMerging

__all__ = [
    "ASWA",
    "BEMA",
    "DART",
    "EMA",
    "LAWA",
    "PAPA",
    "SMA",
    "SWA",
    "SWAD",
    "TWA",
    "WARP",
    "WASH",
    "AcceptIfBetter",
    "Anchor",
    "Anneal",
    "BestK",
    "BranchStrategy",
    "Branching",
    "ContinualMerging",
    "DiLoCo",
    "Doctor",
    "EvaluationWeights",
    "Extrapolate",
    "ForkMerge",
    "ImportanceStatistics",
    "Interpolate",
    "League",
    "Linearize",
    "LocalSGD",
    "Lookaround",
    "OnlineMerging",
    "PostHocEMA",
    "Published",
    "RandomState",
    "Replayed",
    "Report",
    "Standing",
    "WeightMerging",
    "replay",
    "teacher",
]
