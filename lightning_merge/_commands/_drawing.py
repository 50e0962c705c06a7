"""Random numbers of a measurement: the same each time, and nobody else's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """What draws within, by torch, numpy or Python, draws the same each time; afterwards nothing was drawn.

    A search that goes on measures its first candidate where one that was never stopped has measured several.
    """
    import numpy as np
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    with isolate_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
