"""What a score is about, as a hash: the batches it is measured on, and everything that is merged."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def subject_of(kind: str, named: Iterable[Mapping[str, Any]], batches: Iterable[Iterable[Tensor]]) -> str:
    """A hash of names, types, shapes and every bit.

    Args:
        kind: What is made of them.
        named: Tensors by name, as weights; what else is among them is left out.
        batches: The tensors of each batch.
    """
    digest = hashlib.sha256(kind.encode())
    for tensors in named:
        digest.update(b"weights")
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                digest.update(name.encode())
                _add(digest, tensor)
    for batch in batches:
        for tensor in batch:
            _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
