"""Recipes: YAML files that train something, and the modules, data and callbacks they name.

Importing this package loads neither torch nor Lightning, so the command line lists recipes fast.
"""

from typing import TYPE_CHECKING

if __name__ != "lightning_merge.recipes":
    raise ImportError(f"this package is imported as `lightning_merge.recipes`, not as `{__name__}`.")

if TYPE_CHECKING:
    from lightning_merge.recipes._classifier import Classifier
    from lightning_merge.recipes._digits import Digits, SmallConvNet
    from lightning_merge.recipes._report import RunReport

__all__ = ["Classifier", "Digits", "RunReport", "SmallConvNet"]

_HOMES = {"Classifier": "_classifier", "Digits": "_digits", "SmallConvNet": "_digits", "RunReport": "_report"}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
