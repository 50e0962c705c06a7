"""Copies of tensors, made when something is about to be written to them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode


class CopiesBeforeWriting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies the memory of tensors when something is about to write to it, and puts the copies back at the end."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = {key: storage for t in tensors if (storage := _storage(t)) for key in (storage._cdata,)}
        self._copies: dict[int, Any] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(operation, "_schema", None)
        if schema is not None and schema.is_mutable:
            for number, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(args[number] if number < len(args) else kwargs.get(argument.name))
        return operation(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for key, kept in self._copies.items():
            self._watched[key].copy_(kept)

    def _keep(self, written: Any) -> None:
        for tensor in written if isinstance(written, list | tuple) else [written]:
            storage = _storage(tensor) if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata in self._watched and storage._cdata not in self._copies:
                self._copies[storage._cdata] = storage.clone()


def _storage(tensor: Any) -> Any:
    """The memory of a tensor, or of the part of a sharded one that is here; ``None`` where there is no such thing."""
    try:
        return getattr(tensor, "_local_tensor", tensor).untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, or not there yet
        return None


def has_values(tensor: Tensor) -> bool:
    return not is_lazy(tensor)  # of a lazy layer that has not run
