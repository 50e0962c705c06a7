"""A check at the first exchange of weights: the outputs change, and the raw weights come back bit for bit."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_merge import weights
from lightning_merge._eval_mode import extends_train, written_in_eval
from lightning_merge._isolation import untouched
from lightning_merge.callbacks._lightning._internals import is_compiled_whole
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._lightning._user_step import muted
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._exchange import Exchange
from lightning_merge.weights import Weights, canonical

_CLEARLY_DIFFERENT = 1e-3
"""Relative distance of merged and raw weights from which outputs must differ; right after the start they are closer."""


@dataclass
class _Sighting:
    """A part of the module whose output is the same under merged and under raw weights, and how far these differ."""

    part: str
    distance: float


class Canary:
    """Catches what no type check sees: a compiled graph that froze the weights, a wrapper that kept its own copies.

    A part of the module may well not use its weights in eval mode, so one whose output is the same proves nothing. It
    stops a run only if on two batches, beside such a part, all that validation logs and returns is the same.
    Where it cannot tell (no numbers come out, or running the part again is not safe) it is silent.
    """

    def __init__(self) -> None:
        self._sang = False
        self._same_on: int = 0  # batches of which everything was the same
        self._sightings: list[_Sighting] = []  # of the batch that is being validated

    @contextmanager
    def watch(self, publisher: Exchange, average: Average, merged: Weights) -> Iterator[None]:
        """Watches one validation run under merged weights, until one has shown that the exchange works."""
        if self._sang or average.validate == "raw":  # then it is measured at the end of the fit, if at all
            yield
            return
        # Merged buffers are copies, and may be written to; so are these parameters.
        writable = average.buffer_names | written_in_eval(publisher.module)
        kept = {name: t for name, t in merged.items() if name not in writable}
        raw = {name: t for name, t in average.tensors.items() if name not in average.buffer_names}
        everything = {**{("raw", name): t for name, t in raw.items()}, **{("merged", n): t for n, t in kept.items()}}
        before = _fingerprints(everything)
        with ExitStack() as stack:
            for name, child in _comparable_children(publisher, average):
                handle = child.register_forward_hook(self._compare(publisher, average, name), with_kwargs=True)
                stack.callback(handle.remove)
            if not is_param_in_hook_signature(publisher.module.validation_step, "dataloader_iter", explicit=True):
                patches = Patches()
                stack.callback(patches.undo)
                patches.replace(publisher.module, "validation_step", self._compare_step(publisher, average))
            yield
        if changed := _changed(before, _fingerprints(everything)):
            kind, name = changed[0]
            raise RuntimeError(
                f"{average.title}: the {kind} weights after validation are not those before it. Something in"
                f" validation writes to parameters (`{name}`); remove that (`max_norm` of an embedding does"
                " it too), or validate with `validate='raw'`."
            )

    def _compare(self, publisher: Exchange, average: Average, name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: Any, kwargs: Any, merged_output: Any) -> None:
            if self._sang or child.training:
                return
            with _again_under_raw(publisher, average, child):
                raw_output = _or_nothing(child.forward, args, kwargs)
            same = _same(merged_output, raw_output)
            self._sang = same is False
            if not same:
                return
            # The live tensors are the merged ones here. Statistics that were measured again may go unused in eval mode.
            parameters = {key: t for key, t in _below(name, average).items() if key not in average.buffer_names}
            distance = _relative_distance(parameters, publisher.raw(average))
            if distance > _CLEARLY_DIFFERENT:
                self._sightings.append(_Sighting(name, distance))

        return hook

    def _compare_step(self, publisher: Exchange, average: Average) -> Callable[..., Any]:
        """Stands around ``validation_step``: runs it again under raw weights where a part gave the same output."""

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._sightings.clear()
            with _logged(publisher.module, through=True) as merged_logs:
                output = original(*args, **kwargs)
            if self._sang or not self._sightings:
                return output
            sighting = self._sightings[0]
            self._sang = True  # what runs again is not to be looked at
            with (
                _again_under_raw(publisher, average, publisher.module),
                muted(publisher.trainer, publisher.module),
                _logged(publisher.module, through=False) as raw_logs,
            ):
                raw_output = _or_nothing(original, args, kwargs)
            same = _same([merged_logs, output], [raw_logs, raw_output])
            self._sang = same is False
            self._same_on += same is True
            if self._same_on > 1:
                raise RuntimeError(
                    f"{average.title}: merged and raw weights of `{sighting.part}` differ by {sighting.distance:.1%},"
                    " but its output is the same under both, and so is all that validation logs: it would measure the"
                    " raw weights. A compiler that froze them does that: turn `torch._inductor.config.freezing` off,"
                    " or use `validate='raw'`."
                )
            return output

        return step


def _comparable_children(publisher: Exchange, average: Average) -> Iterator[tuple[str, nn.Module]]:
    """Children that hold weights of the average, take a hook, and may be run a second time without harm."""
    written = written_in_eval(publisher.module)
    if average.is_sharded:  # a child of a sharded module does not run by itself
        return
    for name, child in publisher.module.named_children():
        parts = list(child.modules())
        # A hook would become part of a graph that is compiled in place; a scripted module takes none.
        hookable = child._compiled_call_impl is None and not isinstance(child, torch.jit.ScriptModule)
        lazy = any(map(is_lazy, (*child.parameters(), *child.buffers())))
        own = _below(name, average)
        # What one keeps in eval mode until `train()`, another set of weights must not meet.
        if hookable and own and not lazy and not own.keys() & written and not any(map(extends_train, parts)):
            yield name, child


def _below(name: str, average: Average) -> dict[str, Tensor]:
    prefix = canonical(f"{name}.")
    return {n: tensor for n, tensor in average.tensors.items() if n.startswith(prefix)}


@contextmanager
def _again_under_raw(publisher: Exchange, average: Average, module: nn.Module) -> Iterator[None]:
    """Raw weights in place for something that ran under merged ones and runs again; it leaves no trace."""
    # To be able to put everything back one has to see each operation, and a compiled graph would not run then.
    compiled = any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in module.modules())
    compiled = compiled or is_compiled_whole(module)
    with publisher.raw_in_place(average), isolate_rng(), nullcontext() if compiled else untouched(module):
        yield


def _or_nothing(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What it returns, or ``None`` if it cannot run a second time."""
    try:
        return function(*args, **kwargs)
    except Exception:  # of the user's own module: nothing can be told then, and the first time it ran
        return None


@contextmanager
def _logged(module: nn.Module, *, through: bool) -> Iterator[dict[str, Any]]:
    """What ``log`` and ``log_dict`` are called with meanwhile, ``through`` to Lightning or not."""
    seen: dict[str, Any] = {}

    def log(original: Callable[..., Any], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        seen[name] = torch.as_tensor(value).detach().clone() if isinstance(value, Tensor | float) else None
        if through:
            original(name, value, *args, **kwargs)

    def log_dict(original: Callable[..., Any], values: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            log(lambda *_, **__: None, name, value)
        if through:
            original(values, *args, **kwargs)

    patches = Patches()
    patches.replace(module, "log", log)
    patches.replace(module, "log_dict", log_dict)
    try:
        yield seen
    finally:
        patches.undo()


def _fingerprints(tensors: Mapping[Any, Tensor]) -> dict[torch.device, tuple[list[Any], Tensor]]:
    """A sum per tensor, as bits, so that a NaN equals itself: names and sums of each device, not waited for."""
    sums: dict[torch.device, tuple[list[Any], list[Tensor]]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in tensors.items():
            if weights.is_averaged(tensor) and not tensor.is_complex():
                names, found = sums.setdefault(tensor.device, ([], []))
                names.append(name)
                found.append(tensor.sum(dtype=torch.float64))
        return {device: (names, torch.stack(found).view(torch.int64)) for device, (names, found) in sums.items()}


def _changed(before: Mapping[torch.device, Any], after: Mapping[torch.device, Any]) -> list[Any]:
    """The names whose sums differ; one read for each device."""
    return [
        name
        for device, (names, sums) in before.items()
        for name, differs in zip(names, (sums != after[device][1]).tolist(), strict=True)
        if differs
    ]


def _same(left: Any, right: Any) -> bool | None:
    """Whether two outputs hold the same numbers; ``None`` if they hold none that one can tell by.

    Whole numbers and flags tell only if they differ: a class that is predicted is often the same.
    """
    left, right = tree_leaves(left), tree_leaves(right)
    if right == [None]:
        return None
    pairs = list(zip(left, right, strict=False))
    found = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if any(a.shape != b.shape or not torch.equal(a, b) for a, b in found):
        return False
    return True if any(a.numel() and (a.is_floating_point() or a.is_complex()) for a, _ in found) else None


def _relative_distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    floats = [(t.detach().double(), right[name].double()) for name, t in left.items() if weights.is_averaged(t)]
    if not floats:
        return 0.0
    device = floats[0][0].device
    squares = [torch.stack([(a - b).abs().square().sum(), b.abs().square().sum()]).to(device) for a, b in floats]
    difference, size = torch.stack(squares).sum(0).tolist()  # one read
    return math.sqrt(difference / max(size, 1e-30))
