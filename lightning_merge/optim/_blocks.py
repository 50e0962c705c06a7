"""Random masks that depend on nothing but their name: every rank, shard and resumed run draws the same.

The numbers of a tensor are counted in the order of its shape and cut into blocks of ``BLOCK``. A block is seeded by
(seed, step, tensor name, block), so a shard draws the blocks it touches and no others, and nothing has to be saved.
"""

import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, final

import torch
from torch import Tensor

from lightning_merge.weights import array

BLOCK = 2**20

PIECE = 2**17  # elements that a chain of operations takes at a time, so that they stay in the cache

_LEVELS = 2**16  # a mask compares 16 random bits, so a density is resolved to 2**-16
_GAPS_BELOW = 0.1  # under this density it costs less to draw what is kept than one number per element


def within(start: int, block: int, low: int, high: int) -> slice:
    """Where elements ``low`` to ``high`` of a block lie in a part of the tensor that begins with element ``start``."""
    return slice(block * BLOCK + low - start, block * BLOCK + high - start)


def blocks(start: int, stop: int, piece: int = BLOCK) -> Iterator[tuple[int, int, int]]:
    """The blocks that elements ``start`` to ``stop`` touch, each with where the elements begin and end in it.

    With a ``piece``, which divides ``BLOCK``, the parts of blocks of this size that they touch.

    Example:
        >>> list(blocks(10, BLOCK + 5)) == [(0, 10, BLOCK), (1, 0, 5)]
        True
    """
    for first in range(start // piece * piece, stop, piece):
        block = first // BLOCK
        yield block, max(start, first) - block * BLOCK, min(stop, first + piece) - block * BLOCK


@final
class Generators(dict[torch.device, torch.Generator]):
    """A generator per device, made when it is first asked for."""

    def __missing__(self, device: torch.device) -> torch.Generator:
        return self.setdefault(device, torch.Generator(device))


@final
class Draw:
    """The random numbers of one tensor at one step.

    Args:
        seed: The seed of the run.
        step: Which step; 0 for what is drawn once.
        name: The tensor's name.
        numel: Elements of the whole tensor, of which a shard holds some.
        device: Where to draw. The same device type draws the same numbers.
        generator: To draw with, on this device; it is seeded anew before every use. By default one of its own.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        name: str,
        numel: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        self.key = f"{seed}/{step}/{name}"
        self.numel = numel
        self.generator = torch.Generator(device) if generator is None else generator
        self._drawn: tuple[int, Tensor] | None = None  # the numbers of the block that was asked for last

    def keep(self, density: float, block: int, start: int, stop: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """Which elements ``start`` to ``stop`` of a block are kept, each with probability ``density``; 1 if kept."""
        if self._drawn is None or self._drawn[0] != block:
            generator, length = self._block(block)
            words = torch.empty(-(-length // 4), dtype=torch.int64, device=generator.device)
            self._drawn = (block, words.random_(-(2**63), None, generator=generator).view(torch.int16))
        threshold = level_of(density)
        words = self._drawn[1][start:stop]
        if dtype == torch.bool:
            return torch.as_tensor(array(words) < threshold)  # NumPy compares ten times as fast
        # Written as numbers at once: converting flags afterwards takes four times as long.
        return torch.lt(words, threshold, out=torch.empty(stop - start, dtype=dtype, device=words.device))

    def words(self, start: int, stop: int) -> Tensor:
        """The 16 random bits of elements ``start`` to ``stop`` of the tensor, of which ``keep`` compares those of a
        block."""
        if start == stop:
            return torch.empty(0, dtype=torch.int16, device=self.generator.device)
        first, last = start // BLOCK, -(-stop // BLOCK)
        end = min(last * BLOCK, self.numel)
        words = torch.empty(-(-(end - first * BLOCK) // 4), dtype=torch.int64, device=self.generator.device)
        for block, part in zip(range(first, last), torch.split(words, BLOCK // 4), strict=True):
            part.random_(-(2**63), None, generator=self._block(block)[0])
        return words.view(torch.int16)[start - first * BLOCK : stop - first * BLOCK]

    def kept(self, density: float, start: int, stop: int) -> Tensor:
        """Indices, counted from ``start``, of the kept elements among ``start`` to ``stop`` of the tensor; sorted."""
        parts = [self._kept(density, block, lo, hi) + (block * BLOCK - start) for block, lo, hi in blocks(start, stop)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.generator.device)

    def sample(self, size: int) -> Tensor:
        """One random index of the tensor out of each of ``size`` equal parts; sorted."""
        return spread_out(self.uniform(size), self.numel)

    def uniform(self, size: int) -> Tensor:
        """Numbers in [0, 1), for ``sample``."""
        generator = self._seeded("sample")
        return torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)

    def _kept(self, density: float, block: int, start: int, stop: int) -> Tensor:
        """In a block, by the gaps between kept elements, which are geometrically distributed."""
        if density >= _GAPS_BELOW:
            return self.keep(density, block, start, stop).nonzero().view(-1) + start
        generator, length = self._block(block)
        expected = length * density
        size = math.ceil(expected + 6 * math.sqrt(expected)) + 8
        rate = -math.log1p(-density)
        last, found = -1, []
        while last < length - 1:
            gaps = torch.empty(size, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
            found.append(gaps.div_(rate).long().add_(1).cumsum_(0).add_(last))
            last = int(found[-1][-1])
        places = torch.cat(found)
        low, high = torch.searchsorted(places, torch.tensor([start, stop], device=places.device)).tolist()
        return places[low:high]

    def _block(self, block: int) -> tuple[torch.Generator, int]:
        return self._seeded(str(block)), min(BLOCK, self.numel - block * BLOCK)

    def _seeded(self, part: str) -> torch.Generator:
        digest = blake2b(f"{self.key}/{part}".encode(), digest_size=8).digest()
        return self.generator.manual_seed(int.from_bytes(digest, "little") >> 1)


def level_of(density: Any) -> Any:
    """Below which of the 2**16 values of a word an element is kept; of a number, or of a tensor of them in float64."""
    if isinstance(density, Tensor):
        return (density * _LEVELS).round().clamp(max=_LEVELS - 1) - _LEVELS // 2
    return min(round(density * _LEVELS), _LEVELS - 1) - _LEVELS // 2


def spread_out(within: Tensor, numel: int) -> Tensor:
    """Indices of a tensor of so many elements: in each of equal parts, how far into it; in the last dimension."""
    parts = torch.arange(within.shape[-1], device=within.device, dtype=within.dtype)
    return within.add_(parts).mul_(numel / within.shape[-1]).long().clamp_(max=numel - 1)
