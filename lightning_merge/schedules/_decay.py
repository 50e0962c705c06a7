"""How a learning rate falls to 0: shapes over the progress of a decay."""

import math
from typing import Literal

Decay = Literal["linear", "cosine", "1-sqrt", "exponential"]
"""Shapes of a decay; those that Megatron-LM has for the end of a constant rate."""


def decay(shape: Decay, progress: float) -> float:
    """The factor on a learning rate at this progress of its decay, in [0, 1]; 1 at the start and 0 at the end.

    ``linear``: ``1 - s``; ``cosine``: ``(1 + cos(pi s)) / 2``; ``1-sqrt``: ``1 - sqrt(s)``; ``exponential``:
    ``2 * 0.5 ** s - 1``.
    """
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(progress)
    return 2.0 * math.pow(0.5, progress) - 1.0
