"""What a fit made in processes of its own comes back to the callback that the user holds.

Under ``ddp_fork``, ``ddp_notebook`` and ``ddp_spawn`` a fit runs in copies of the Trainer, and Lightning brings the
weights of the module back, and metrics. Callbacks have no hook in the process that waits, so what they bring puts
itself in place as it is unpickled there.
"""

import io
from typing import Any
from weakref import WeakValueDictionary

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_merge.callbacks._lightning._internals import launcher_of, starts_afresh

_HERE: "WeakValueDictionary[int, Traveller]" = WeakValueDictionary()
"""The callbacks of this process by their address, which a forked process has in common with it."""


class Traveller:
    """A callback that brings home what a fit in another process made of it."""

    _home: int | None = None  # the address of the one that this was made of by pickling

    def expect(self) -> None:
        """From here on it can be brought something."""
        _HERE[id(self)] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_home": id(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.expect()

    def luggage(self) -> dict[str, Any]:
        """What is brought home: plain data, taken while all processes are there. All call this."""
        raise NotImplementedError

    def come_home(self, luggage: dict[str, Any]) -> None:
        """Takes it over, in the process that waited."""
        raise NotImplementedError


class _Parcel:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce__(self) -> Any:
        return _deliver, (self._content,)


def pack_for_home(trainer: Any) -> None:
    """Adds what the callbacks bring home to what the launcher does, if this fit is away. All must call this."""
    launcher = launcher_of(trainer)
    if launcher is None:
        return
    travellers = [callback for callback in trainer.callbacks if isinstance(callback, Traveller)]
    spawned = starts_afresh(launcher)
    packed = {(each._home if spawned else id(each)): each.luggage() for each in travellers}
    buffer = io.BytesIO()
    torch.save(tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), packed), buffer)
    parcel, original = _Parcel(buffer.getvalue()), launcher.get_extra_results
    # Not undone: the launcher asks for it after everything else, and this copy of it ends with its process.
    launcher.get_extra_results = lambda trainer: {**original(trainer), "lightning_merge": parcel}


def _deliver(content: bytes) -> None:
    for home, luggage in torch.load(io.BytesIO(content), weights_only=False).items():
        if (callback := _HERE.get(home)) is not None:
            callback.come_home(luggage)


def take_to_host(average: Any, fit: Any) -> None:
    """Brings an average to host memory at the end of its fit, which another error may have ended."""
    try:
        average.to_host()
    except Exception as error:
        if not fit.interrupted:
            raise
        # What ended the fit is what the user has to see.
        rank_zero_warn(f"{average.title}: its last update failed as well, {type(error).__name__}: {error}")
