"""Sums in low precision that lose nothing over many steps."""

import torch
from torch import Tensor

from lightning_merge.optim._turn import Moment

# The last place of a number is the power of two in it times this.
_EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
_GOLDEN = (5**0.5 - 1) / 2


def dither_of(merge: int) -> float:
    """What the merge of this number adds before cutting off; see ``add_``."""
    return (merge + 0.5) * _GOLDEN % 1.0


def add_(increment: Tensor, before: Tensor, turn: Moment) -> None:
    """``increment <- before + increment``, rounded so that steps below the resolution add up over merges.

    Rounding to nearest would lose every increment under half a last place of the weight. Here increments are counted in
    last places and cut off after adding ``turn.dither``, which moves from merge to merge along a golden-ratio sequence
    that fills [0, 1) evenly: after n merges the sum of what was added is within about two last places of exact.
    """
    if turn.decay:
        increment.mul_(1.0 - turn.decay).add_(before, alpha=-turn.decay)
    if not turn.reference or turn.dtype not in _EPSILON:
        torch.add(before, increment, out=increment)
        return
    # The power of two in a weight is its exponent bits; beside weights below 2**-60 no increment is lost.
    place = before.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    place.clamp_(min=2.0**-60).mul_(_EPSILON[turn.dtype])
    increment.addcmul_(increment.sign(), place, value=turn.dither)
    increment.div_(place, rounding_mode="trunc")
    torch.addcmul(before, increment, place, out=increment)
