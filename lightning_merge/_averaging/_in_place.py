"""Other weights in the place of the live ones of a module, for the length of a block, whatever happens in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge._eval_mode import written_in_eval
from lightning_merge.weights import Inventory, Weights


@contextmanager
def in_place(
    module: nn.Module, inventory: Inventory, tensors: Mapping[str, Tensor], before: Weights, outermost: bool = True
) -> Iterator[None]:
    """Inside, tensors are in the place of the live ones of their names.

    Args:
        module: What the tensors are of.
        inventory: Of it.
        tensors: What takes the place, in the live dtypes.
        before: Is filled with what was there before, as the exchange goes on.
        outermost: Whether it is within no other such block.
    """
    live, ties = inventory.tensors, inventory.ties
    weights.reshard(module)
    try:
        weights.exchange(live, tensors, before, ties)
        yield
    except BaseException:
        weights.reshard(module, interrupted=True)
        raise
    finally:
        weights.reshard(module)
        if outermost:
            inventory.put_objects_back()
        weights.put_back(live, before, ties)


def publishable(
    module: nn.Module, tensors: Mapping[str, Tensor], live: Mapping[str, Tensor], buffers: set[str]
) -> tuple[Weights, Weights]:
    """Merged tensors as they may take the place of live ones: parameters, and buffers that are still apart.

    Args:
        module: What the tensors are of.
        tensors: Merged ones, in any precision.
        live: Those in whose place they are to be.
        buffers: Which of them are buffers.
    """
    published = weights.like({name: t for name, t in tensors.items() if name in live}, live)
    # Parameters that a forward pass writes to are handed out as copies.
    published |= weights.copies({name: published[name] for name in written_in_eval(module) & published.keys()})
    # So are buffers: a DDP forward broadcasts into them, and they are small.
    copied = weights.copies({name: published[name] for name in buffers if name in published})
    return published, copied


@contextmanager
def writes_refused(
    live: Mapping[str, Tensor], published: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> Iterator[None]:
    """Raises at the end if parameters were written to that are the average's own tensors.

    Args:
        live: Parameters, in whose place the published tensors are.
        published: What is there.
        stored: The average's own.

    Raises:
        RuntimeError: With the first such name.
    """
    own = [name for name in live if name in published and published[name] is stored.get(name)]
    before = [live[name]._version for name in own]
    yield
    for name, version in zip(own, before, strict=True):
        if live[name]._version != version:
            raise RuntimeError(
                f"`{name}` was written to inside of `merged()`, where it is the average itself, which has changed with"
                " it. Load weights, initialise and step optimizers after the block, or give a copy of the module to"
                " what writes: `copy.deepcopy(model)`."
            )
