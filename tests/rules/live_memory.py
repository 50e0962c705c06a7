"""How many bytes of tensors are alive, measured while code runs."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages that are made inside the block and still referenced.

    Attributes:
        peak: The most bytes that were alive after any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._alive.values()}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._alive[id(tensor)] = tensor
        self.peak = max(self.peak, self.now)
        return result
