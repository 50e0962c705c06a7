"""Recipes: YAML files that train something, and the modules, data and callbacks they name.

Importing this package loads neither torch nor Lightning, so the command line lists recipes fast.
"""

from typing import TYPE_CHECKING

if __name__ != "lightning_merge.recipes":
    raise ImportError(f"this package is imported as `lightning_merge.recipes`, not as `{__name__}`.")

if TYPE_CHECKING:
    from lightning_merge.recipes._augmentations import Augmented
    from lightning_merge.recipes._auxiliary import AuxiliaryClassifier
    from lightning_merge.recipes._classifier import Classifier
    from lightning_merge.recipes._digits import Digits, SmallConvNet
    from lightning_merge.recipes._dpo import DPO, PreferenceAccuracy, RewardMargin
    from lightning_merge.recipes._images import CIFAR, ImageNet
    from lightning_merge.recipes._language_model import LanguageModel
    from lightning_merge.recipes._preference_data import Preferences
    from lightning_merge.recipes._report import RunReport
    from lightning_merge.recipes._resnet import SmallResNet
    from lightning_merge.recipes._rloo import RLOO, RewardModel
    from lightning_merge.recipes._stream import TaskData, jointly, split_by_class, split_by_domain
    from lightning_merge.recipes._threads import CPUThreads
    from lightning_merge.recipes._warmup_cosine import WarmupCosine

__all__ = [
    "CIFAR",
    "DPO",
    "RLOO",
    "Augmented",
    "AuxiliaryClassifier",
    "CPUThreads",
    "Classifier",
    "Digits",
    "ImageNet",
    "LanguageModel",
    "PreferenceAccuracy",
    "Preferences",
    "RewardMargin",
    "RewardModel",
    "RunReport",
    "SmallConvNet",
    "SmallResNet",
    "TaskData",
    "WarmupCosine",
    "jointly",
    "split_by_class",
    "split_by_domain",
]

_HOMES = {
    "Augmented": "_augmentations",
    "AuxiliaryClassifier": "_auxiliary",
    "CIFAR": "_images",
    "CPUThreads": "_threads",
    "Classifier": "_classifier",
    "DPO": "_dpo",
    "Digits": "_digits",
    "ImageNet": "_images",
    "LanguageModel": "_language_model",
    "PreferenceAccuracy": "_dpo",
    "Preferences": "_preference_data",
    "RLOO": "_rloo",
    "RewardMargin": "_dpo",
    "RewardModel": "_rloo",
    "RunReport": "_report",
    "SmallConvNet": "_digits",
    "SmallResNet": "_resnet",
    "TaskData": "_stream",
    "WarmupCosine": "_warmup_cosine",
    "jointly": "_stream",
    "split_by_class": "_stream",
    "split_by_domain": "_stream",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
