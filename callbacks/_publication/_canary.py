"""A check at the first exchange of weights: the outputs change, and the raw weights come back bit for bit."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_merge import weights
from lightning_merge.weights import Weights, canonical

if TYPE_CHECKING:
    from lightning_merge.callbacks._publication._callback import Published
    from lightning_merge.callbacks._publication._session import Publisher

_CLEARLY_DIFFERENT = 1e-3
"""Relative distance of merged and raw weights from which outputs must differ; right after the start they are closer."""


class Canary:
    """Catches what no type check sees: a compiled graph that froze the weights, a wrapper that kept its own copies."""

    def __init__(self) -> None:
        self._sang = False

    @contextmanager
    def watch(self, publisher: "Publisher", average: "Published", merged: Weights) -> Iterator[None]:
        """Watches one validation run under merged weights, until one has shown that the exchange works."""
        if self._sang:
            yield
            return
        # Merged buffers are copies, and may be written to.
        merged_parameters = {name: t for name, t in merged.items() if name not in average.buffer_names}
        before = _fingerprint(average.tensors), _fingerprint(merged_parameters)
        handles = [
            child.register_forward_hook(self._compare(publisher, average, name), with_kwargs=True)
            for name, child in publisher.module.named_children()
            # A hook would become part of a graph that is compiled in place, and a child of a sharded module does not
            # run by itself.
            if child._compiled_call_impl is None and not average.is_sharded
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        after = _fingerprint(average.tensors), _fingerprint(merged_parameters)
        for kind, left, right in zip(("raw", "merged"), before, after, strict=True):
            if not torch.equal(left, right):
                raise RuntimeError(
                    f"{average.title}: the {kind} weights after validation are not those before it. Something in"
                    " validation writes to parameters; remove that, or validate with `validate='raw'`."
                )

    def _compare(self, publisher: "Publisher", average: "Published", name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: Any, kwargs: Any, merged_output: Any) -> None:
            names = [n for n in average.tensors if n.startswith(canonical(f"{name}."))]
            if self._sang or child.training or not names:
                return
            with publisher.raw_in_place(average), isolate_rng():
                raw_output = child.forward(*args, **kwargs)
            self._sang = not _same(merged_output, raw_output)
            if self._sang:
                return
            # The live tensors are the merged ones here.
            distance = _relative_distance({n: average.tensors[n] for n in names}, publisher.raw(average))
            if distance > _CLEARLY_DIFFERENT:
                raise RuntimeError(
                    f"{average.title}: merged and raw weights of `{name}` differ by {distance:.1%}, but its output"
                    " is the same under both, so validation would measure the raw weights. A compiler that froze them"
                    " does that: turn `torch._inductor.config.freezing` off, or use `validate='raw'`."
                )

        return hook


def _fingerprint(tensors: Mapping[str, Tensor]) -> Tensor:
    """A sum per tensor, as bits, so that a NaN equals itself."""
    with torch.inference_mode(False), torch.no_grad():
        sums = [
            t.sum(dtype=torch.float64).cpu() for t in tensors.values() if weights.is_averaged(t) and not t.is_complex()
        ]
        return torch.stack(sums).view(torch.int64)


def _same(left: Any, right: Any) -> bool:
    pairs = zip(tree_leaves(left), tree_leaves(right), strict=False)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _relative_distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    floats = [(t.detach().double(), right[name].double()) for name, t in left.items() if weights.is_averaged(t)]
    difference = sum(float((a - b).square().sum()) for a, b in floats)
    size = sum(float(b.square().sum()) for _, b in floats)
    return math.sqrt(difference / max(size, 1e-30))
