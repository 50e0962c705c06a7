"""Batches of one sample, cut out of a batch of several."""

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, final

import numpy as np
from torch import Tensor


@final
class Samples:
    """Tells the samples of a batch apart.

    Tensors and arrays as long as the batch hold a sample in each row; lists as long, of whatever is not itself as long
    as the batch, one in each entry, as detectors take images and targets. All else belongs to every sample: numbers,
    texts, scalars, tensors of another length.

    Args:
        batch: Tensors in dicts, lists and tuples; or a list of samples.

    Raises:
        ValueError: If one cannot tell how many samples there are.

    Example:
        >>> import torch
        >>> samples = Samples({"x": torch.tensor([[1.0], [2.0]]), "scale": torch.tensor([3.0]), "task": 1})
        >>> samples.count, samples[1]
        (2, {'x': tensor([[2.]]), 'scale': tensor([3.]), 'task': 1})
    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self._is_list = False  # whether the batch is a list of samples
        self.count = self._counted()

    def __getitem__(self, index: int) -> Any:
        """A batch of the one sample."""
        if self._is_list:
            return type(self._batch)([self._batch[index]])
        return self._cut(self._batch, index, is_top=True)

    def _counted(self) -> int:
        batch = self._batch
        arrays = list(_arrays(batch, within_lists=False))
        lists = list(_lists(batch))
        lengths = Counter(len(array) for array in arrays)
        if lengths:
            several = Counter({length: n for length, n in lengths.items() if length != 1}) or lengths
            best = [length for length, n in several.items() if n == max(several.values())]
            if len(best) > 1:
                best = [length for length in best if length in map(len, lists)] or best
            if len(best) == 1:
                return best[0]
            raise ValueError(f"{_TAKEN}, got tensors of lengths {sorted(lengths)}, which could each be the batch's")
        everywhere = {len(array) for array in _arrays(batch, within_lists=True)}
        inner = [each for each in lists if each is not batch]
        are_alike = all(map(_is_alike, inner))
        if len(everywhere) == 1 and are_alike and not any(isinstance(each, Mapping) for one in lists for each in one):
            return everywhere.pop()
        fields = {len(each) for each in inner}
        if len(fields) == 1 and are_alike:
            return fields.pop()
        if isinstance(batch, list | tuple) and batch and everywhere:
            self._is_list = True
            return len(batch)
        raise ValueError(f"{_TAKEN}, got none in {type(batch).__name__}")

    def _cut(self, value: Any, index: int, is_top: bool = False) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            return value[index : index + 1] if value.ndim and len(value) == self.count else value
        if isinstance(value, Mapping):
            new: Any = copy(value)
            for key, item in value.items():
                new[key] = self._cut(item, index)
            return new
        if not isinstance(value, list | tuple):
            return value
        if not is_top and len(value) == self.count and not self._holds_rows(value):
            parts = [value[index]]
        else:
            parts = [self._cut(item, index) for item in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)

    def _holds_rows(self, value: Any) -> bool:
        """Whether a list holds tensors as long as the batch, such as two views of it, and so is no list of samples."""
        lengths = {len(array) for array in _arrays(value, within_lists=True)}
        return lengths == {self.count} and not any(isinstance(each, Mapping) for each in value)


_TAKEN = (
    "single samples are taken from batches of tensors in dicts, lists and tuples, with one entry for each sample along"
    " the first dimension"
)


def _arrays(value: Any, within_lists: bool, is_top: bool = True) -> Iterator[Any]:
    """Tensors and arrays with dimensions, those in inner lists if they are wanted."""
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _arrays(item, within_lists, is_top=False)
    elif isinstance(value, list | tuple) and (is_top or within_lists):
        is_list_of_samples = is_top and not within_lists and value and all(isinstance(i, Mapping) for i in value)
        for item in () if is_list_of_samples else value:
            yield from _arrays(item, within_lists, is_top=False)


def _lists(value: Any) -> Iterator[Any]:
    """Lists in the batch, itself too, and not those in lists in it."""
    if isinstance(value, list | tuple):
        yield value
        yield from (item for item in value if isinstance(item, list | tuple))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from (item,) if isinstance(item, list | tuple) else _lists(item) if isinstance(item, Mapping) else ()


def _is_alike(values: Any) -> bool:
    """Whether the entries are of one kind, as those of one field of several samples are."""
    return len({(type(value), getattr(value, "ndim", None)) for value in values}) == 1
