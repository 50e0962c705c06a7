"""Where two recorded fits part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from lightning_merge.callbacks._replay_run._digests import Digests

_MOST = 6
"""Names that are shown of each kind."""

_KINDS = ("batch", "random state", "weight", "buffer", "optimizer", "schedule", "average")
_UNSAVED = ("attribute", "unsaved buffer")
"""What no file holds. That it differs does no harm until something is computed from it."""

_CURES = {
    "batch": "For the order of samples and augmentations add `lightning_merge.callbacks.RandomState()` to the"
    " callbacks; from mid-epoch the loader must remember its position too (torchdata's StatefulDataLoader).",
    "random state": "Add `lightning_merge.callbacks.RandomState()` to the callbacks: it saves and restores them.",
    "attribute": "Lightning saves no plain attributes: register a buffer, or save it in `on_save_checkpoint`.",
    "unsaved buffer": "A buffer with `persistent=False` is in no file: make it persistent, or compute it anew.",
}


@final
@dataclass(frozen=True)
class Difference:
    """The first point at which a resumed run is not the uninterrupted one.

    Args:
        at: Which, as ``"before batch 0 of epoch 2"``, counted from 0.
        names: All that differs there, as ``"weight net.0.bias"`` or ``"random state torch"``.
        of: How many tensors and values were compared there.
        unsaved: What no file holds and differed then or before, as ``"attribute hidden"``: the likely cause.
    """

    at: str
    names: tuple[str, ...]
    of: int
    unsaved: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = f", in {len(self.names)} of {self.of} tensors and values:" if self.names else "."
        lines = [f"first difference {self.at}{of}"]
        for kind in (*_KINDS, *_UNSAVED):
            named = [name for name in (*self.names, *self.unsaved) if _is(name, kind)]
            more = f", and {len(named) - _MOST} more" if len(named) > _MOST else ""
            note = " (in no file, and different already when the run went on)" if kind in _UNSAVED else ""
            lines += [f"  {', '.join(named[:_MOST])}{more}{note}"] if named else []
        cures = [cure for kind, cure in _CURES.items() if any(_is(name, kind) for name in (*self.names, *self.unsaved))]
        return "\n".join([*lines, *cures[:1]])


def first_difference(whole: Mapping[str, Digests], resumed: Mapping[str, Digests]) -> Difference | None:
    """The first point of the resumed run that is not that of the uninterrupted one."""
    if not resumed:
        return Difference("at the start: the resumed run trained no batch", (), 0)
    points, first = list(whole), next(iter(resumed))
    if first not in whole:
        return Difference(f"at the start: the resumed run went on {first}, where the other never was", (), 0)
    rest = points[points.index(first) :]
    unsaved: dict[str, None] = {}
    for point, expected in zip(resumed, rest, strict=False):
        if point != expected:
            return Difference(f"{expected}: the resumed run is {point}", (), 0)
        left, right = whole[point], resumed[point]
        names = [name for name in {**left, **right} if left.get(name) != right.get(name)]
        unsaved |= dict.fromkeys(name for name in names if any(_is(name, kind) for kind in _UNSAVED))
        if harm := tuple(name for name in names if name not in unsaved):
            return Difference(point, harm, len({**left, **right}), tuple(unsaved))
    if len(rest) != len(resumed):
        return Difference(f"at the end: {len(rest)} points were left to train, and {len(resumed)} were trained", (), 0)
    return None


def _is(name: str, kind: str) -> bool:
    return name == kind or name.startswith(f"{kind} ")
