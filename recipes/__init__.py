"""Recipes: YAML files that train something, and the modules, data and callbacks they name.

Importing this package loads neither torch nor Lightning, so the command line lists recipes fast.
"""

from typing import TYPE_CHECKING

if __name__ != "lightning_merge.recipes":
    raise ImportError(f"this package is imported as `lightning_merge.recipes`, not as `{__name__}`.")

if TYPE_CHECKING:
    from lightning_merge.recipes._threads import CPUThreads
    from lightning_merge.recipes._warmup_cosine import WarmupCosine
    from lightning_merge.recipes.preference._data import Preferences
    from lightning_merge.recipes.preference._dpo import DPO, PreferenceAccuracy, RewardMargin
    from lightning_merge.recipes.preference._language_model import LanguageModel
    from lightning_merge.recipes.preference._reward_model import RewardModel
    from lightning_merge.recipes.preference._rloo import RLOO
    from lightning_merge.recipes.report._run_report import RunReport
    from lightning_merge.recipes.streams._tasks import TaskData, jointly, split_by_class, split_by_domain
    from lightning_merge.recipes.vision._augmentations import Augmented
    from lightning_merge.recipes.vision._auxiliary import AuxiliaryClassifier
    from lightning_merge.recipes.vision._cifar import CIFAR
    from lightning_merge.recipes.vision._cifar_resnet18 import CifarResNet18
    from lightning_merge.recipes.vision._classifier import Classifier
    from lightning_merge.recipes.vision._digits import Digits, SmallConvNet
    from lightning_merge.recipes.vision._imagenet import ImageNet
    from lightning_merge.recipes.vision._resnet import SmallResNet
    from lightning_merge.recipes.vision._wide_resnet import WideResNet

__all__ = [
    "CIFAR",
    "DPO",
    "RLOO",
    "Augmented",
    "AuxiliaryClassifier",
    "CPUThreads",
    "CifarResNet18",
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
    "WideResNet",
    "jointly",
    "split_by_class",
    "split_by_domain",
]

_HOMES = {
    "Augmented": "vision._augmentations",
    "AuxiliaryClassifier": "vision._auxiliary",
    "CIFAR": "vision._cifar",
    "CPUThreads": "_threads",
    "CifarResNet18": "vision._cifar_resnet18",
    "Classifier": "vision._classifier",
    "DPO": "preference._dpo",
    "Digits": "vision._digits",
    "ImageNet": "vision._imagenet",
    "LanguageModel": "preference._language_model",
    "PreferenceAccuracy": "preference._dpo",
    "Preferences": "preference._data",
    "RLOO": "preference._rloo",
    "RewardMargin": "preference._dpo",
    "RewardModel": "preference._reward_model",
    "RunReport": "report._run_report",
    "SmallConvNet": "vision._digits",
    "SmallResNet": "vision._resnet",
    "TaskData": "streams._tasks",
    "WarmupCosine": "_warmup_cosine",
    "WideResNet": "vision._wide_resnet",
    "jointly": "streams._tasks",
    "split_by_class": "streams._tasks",
    "split_by_domain": "streams._tasks",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
