"""Writing a safetensors file whole or not at all."""

import json
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
        _put_words_in_order(unfinished)


def _put_words_in_order(path: str | os.PathLike[str]) -> None:
    """Has equal contents make equal files: the library writes the words of a header in an order of chance."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the rest is spaces, as the format allows
            file.seek(8)
            file.write(text.ljust(length))
