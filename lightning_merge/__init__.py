"""PyTorch Lightning plugins that merge model weights during training.

Importing this package loads nothing else, so the command line starts fast:

- ``lightning_merge.callbacks``: callbacks for an existing Trainer (``EMA``, ``SWA``, ``WeightMerging``).
- ``lightning_merge.rules``: how weights are merged, in plain torch.
- ``lightning_merge.schedules``, ``lightning_merge.selections``: when, and which tensors.
- ``lightning_merge.Averager``: an average in a training loop of your own, loaded when it is asked for.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge._averager import Averager as Averager

try:
    __version__ = version("lightning-merge")
except PackageNotFoundError:  # a plain checkout on PYTHONPATH
    __version__ = "0+unknown"

__all__ = ["Averager", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Averager":
        return import_module("lightning_merge._averager").Averager
    raise AttributeError(f"module 'lightning_merge' has no attribute {name!r}")
