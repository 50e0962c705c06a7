"""Rules: how the weights of one run are merged."""

from lightning_merge.rules._annealed_mean import AnnealedMean
from lightning_merge.rules._base import Rule
from lightning_merge.rules._best_mean import BestMean
from lightning_merge.rules._bias_corrected_mean import BiasCorrectedMean
from lightning_merge.rules._decay_warmups import DecayWarmup, DiffusersWarmup, EmaPytorchWarmup, TimmWarmup
from lightning_merge.rules._exponential_mean import ExponentialMean
from lightning_merge.rules._gated_mean import GatedMean
from lightning_merge.rules._interpolation import Interpolation
from lightning_merge.rules._mean import Mean
from lightning_merge.rules._power_means import PowerMeans
from lightning_merge.rules._selected_mean import SelectedMean
from lightning_merge.rules._sliding_annealed_mean import SlidingAnnealedMean
from lightning_merge.rules._valley_mean import ValleyMean
from lightning_merge.rules._window_mean import WindowMean

__all__ = [
    "AnnealedMean",
    "BestMean",
    "BiasCorrectedMean",
    "DecayWarmup",
    "DiffusersWarmup",
    "EmaPytorchWarmup",
    "ExponentialMean",
    "GatedMean",
    "Interpolation",
    "Mean",
    "PowerMeans",
    "Rule",
    "SelectedMean",
    "SlidingAnnealedMean",
    "TimmWarmup",
    "ValleyMean",
    "WindowMean",
]
