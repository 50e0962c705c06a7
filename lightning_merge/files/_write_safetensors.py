"""Writing a safetensors file whole or not at all."""

import os
from typing import Any

from lightning_merge.files._write import replacing
from lightning_merge.weights import Weights


def write_safetensors(target: str | os.PathLike[str], weights: Weights, about: dict[str, Any]) -> None:
    """Writes tensors, each in memory of its own, with a few words about them.

    Raises:
        ImportError: If safetensors is not installed.
        OSError: If the system refuses.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError('writing it needs safetensors: pip install "lightning-merge[export]"') from error
    with replacing(target) as unfinished:
        save_file(weights, unfinished, {"format": "pt"} | {key: str(value) for key, value in about.items() if value})
