"""Numbers in a few bits: blocks of whole numbers with a scale each."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_merge._checks import whole
from lightning_merge.weights import Weights, is_averaged

Bits = Literal[32, 8, 4]

BLOCK = 256
"""Numbers that share a scale: its four bytes are 1.6 % of a block of bytes."""

_SCALE = torch.float32


def checked_bits(value: object) -> Bits:
    """Bits of a number that travels.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is another one than 32, 8 and 4.
    """
    found = whole("bits", value)
    if found not in get_args(Bits):
        raise ValueError(f"`bits` must be 32, 8 or 4, got {found}.")
    return 32 if found == 32 else 8 if found == 8 else 4


def blocks(tensors: Mapping[str, Tensor]) -> Tensor:
    """All numbers as rows of ``BLOCK``. Every tensor begins a row of its own, and zeros fill its last one.

    Raises:
        ValueError: If one holds integers.
    """
    if name := next((name for name, tensor in tensors.items() if not is_averaged(tensor)), None):
        raise ValueError(f"`bits` rounds fractions, and `{name}` holds {tensors[name].dtype}: send it with 32 bits.")
    flat = [_real(tensor).reshape(-1) for tensor in tensors.values()]
    return torch.cat([torch.nn.functional.pad(each, (0, -len(each) % BLOCK)) for each in flat]).view(-1, BLOCK)


def unblocked(rows: Tensor, reference: Mapping[str, Tensor]) -> Weights:
    """The tensors that ``blocks`` took, in the shapes of ``reference`` and the precision of the rows."""
    found, start = {}, 0
    for name, tensor in reference.items():
        like = _real(tensor)
        stop = start - (-like.numel() // BLOCK)
        numbers = rows[start:stop].reshape(-1)[: like.numel()].view(like.shape)
        found[name] = torch.view_as_complex(numbers) if tensor.is_complex() else numbers
        start = stop
    return found


def row_bytes(bits: Bits) -> int:
    """Bytes of a row of ``quantised``."""
    return BLOCK * bits // 8 + _SCALE.itemsize


def quantised(rows: Tensor, bits: Bits) -> Tensor:
    """``round(row / scale)``, ``scale = max |row| / (2^(bits - 1) - 1)``: the codes of a row as bytes, then its scale.

    A NaN or an infinity in a row makes all of the row NaN when it is read again.

    Args:
        rows: Of shape (rows, ``BLOCK``).
        bits: 8, or 4: two codes a byte.
    """
    most = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(1, keepdim=True) / most).to(_SCALE)
    scale = torch.where(scale == 0, torch.finfo(_SCALE).tiny, scale)
    codes = (rows / scale).round().clamp(-most, most).to(torch.int8)
    if bits == 4:
        codes = (codes[:, ::2] << 4) | (codes[:, 1::2] & 15)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], 1)


def dequantised(sent: Tensor, bits: Bits, dtype: torch.dtype) -> Tensor:
    """The rows again, each number off by half a scale at most."""
    codes = sent[:, : -_SCALE.itemsize].view(torch.int8)
    if bits == 4:
        codes = torch.stack([codes >> 4, ((codes & 15) ^ 8) - 8], 2).flatten(1)  # the sign of four bits
    return codes.to(dtype) * sent[:, -_SCALE.itemsize :].contiguous().view(_SCALE)


def mean_of(sent: Sequence[Tensor], bits: Bits, dtype: torch.dtype) -> Tensor:
    """The mean of several sets of quantised rows, taken in ``dtype`` in their order and quantised again."""
    total = dequantised(sent[0], bits, dtype)
    for each in sent[1:]:
        total += dequantised(each, bits, dtype)
    return quantised(total / len(sent), bits)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
