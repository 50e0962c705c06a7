"""Lightning's averaging callbacks under their names and arguments, and the weights in other libraries' files.

Change ``from lightning.pytorch.callbacks import ...`` to ``from lightning_merge.compat import ...``. What changes in
the numbers is in ``docs/migrating.md``.
"""

import os

from lightning_merge._checks import path as checked_path
from lightning_merge._checks import text
from lightning_merge.compat._stochastic import StochasticWeightAveraging
from lightning_merge.compat._weight_averaging import EMAWeightAveraging, WeightAveraging
from lightning_merge.files._layouts import open_file
from lightning_merge.weights import Weights

__all__ = ["EMAWeightAveraging", "StochasticWeightAveraging", "WeightAveraging", "read_weights"]


def read_weights(path: str | os.PathLike[str], name: str | None = None) -> Weights:
    """One set of weights of a checkpoint, under the names that a plain module's ``load_state_dict`` takes.

    What modules keep beside their tensors (``_extra_state``) is among them. All of the file is read once, to hold it
    against its checksums.

    Args:
        path: A path, or a URL as ``s3://bucket/run/ema-final.ckpt``, of a file of lightning-merge, Lightning (also with
            one of its averaging callbacks), timm, ema-pytorch, NeMo (either file of a pair), MMEngine, torch's
            ``AveragedModel`` or safetensors.
        name: ``"average"``, ``"raw"``, or the name of an average of ours; by default the set that the file's score was
            measured on. ``lightning-merge inspect`` lists them.

    Raises:
        TypeError: If ``path`` is no path, or ``name`` no text.
        ValueError: If the file cannot be read, is damaged or holds no such set; the message lists those it holds.
        OSError: If the system refuses to read it.
    """
    if name is not None:
        text("name", name, "the name of a set of weights")
    checked_path("path", path)
    try:
        opened = open_file(path)
    except ValueError as error:
        raise ValueError(f"`path`: {error}") from error
    try:
        return opened.choose(name).state_dict
    except ValueError as error:
        raise ValueError(f"`name`: {error}") from error
