"""PyTorch Lightning plugins that merge model weights during training.

Importing this package loads nothing else, so the command line starts fast:

- ``lightning_merge.callbacks``: callbacks for an existing Trainer (``EMA``, ``SWA``, ``WeightMerging``).
- ``lightning_merge.rules``: how weights are merged, in plain torch.
- ``lightning_merge.schedules``, ``lightning_merge.selections``: when, and which tensors.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lightning-merge")
except PackageNotFoundError:  # a plain checkout on PYTHONPATH
    __version__ = "0+unknown"

__all__ = ["__version__"]
