"""What a checkpoint folder of a Trainer holds beside the merged weights: the raw ones and the average."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.files._folders import AVERAGE
from lightning_merge.files._label import as_written
from lightning_merge.weights import copy_


def write(folder: str, average: dict[str, Any] | None, raw: Mapping[str, Tensor]) -> None:
    """Writes the file.

    Args:
        folder: Of the checkpoint; made if it is not there.
        average: The state of the average; ``None`` if the run is not to go on from here.
        raw: Raw weights, where the folder holds others; empty if it does not.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    content = {"average": average, "raw": {name: tensor.detach() for name, tensor in raw.items()}}
    torch.save(content, Path(folder) / AVERAGE)


def read(folder: str, live: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    """The state of the average, once the raw weights are in place; ``None`` if the folder is of a run without one.

    Args:
        folder: Of the checkpoint.
        live: The tensors of the model, which hold what the folder has for others: merged weights.

    Raises:
        ValueError: If the folder holds merged weights alone, or the file is of another model.
    """
    path = Path(folder) / AVERAGE
    if not path.is_file():
        return None
    with as_written(str(path)):
        content = torch.load(path, map_location="cpu", weights_only=True)
        average: Mapping[str, Any] | None = content["average"]
        raw = dict(content["raw"])
    if average is None:
        raise ValueError(
            f"{folder} holds merged weights alone, since it was saved with `save_only_model=True`, and training cannot"
            " go on from those. Resume from a checkpoint that was saved without, or start a new run from this model."
        )
    for name, tensor in raw.items():
        if name not in live or live[name].shape != tensor.shape:
            raise ValueError(
                f"{path} is of another model: it has `{name}` of shape {tuple(tensor.shape)}, the model"
                f" {'has no such tensor' if name not in live else tuple(live[name].shape)}."
            )
    copy_({name: live[name] for name in raw}, raw)
    return average
