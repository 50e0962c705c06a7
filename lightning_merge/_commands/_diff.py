"""``lightning-merge diff``: how far apart two sets of weights are, and where."""

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_merge.diagnostics import distance, dot, parameters
from lightning_merge.diagnostics._geometry import conflicts
from lightning_merge.files._opened import open_lazily
from lightning_merge.files._sets import match
from lightning_merge.weights import nonfinite

_MOST = 10  # tensors that are listed


def diff(first: str, second: str | None) -> str:
    """A report on two sets, given as ``FILE`` or ``FILE:SET``, or on the two sets of one file.

    Raises:
        ValueError: If a file cannot be read, holds no such set, or the two are of different models.
    """
    one = open_lazily(first)
    if second is None:
        others = [name for name in one.file.sets if name != one.chosen]
        if not others:
            raise ValueError(f"{first} holds one set of weights only ({one.chosen}): give a second FILE, or FILE:SET.")
        other = one.of(others[0])
    else:
        other = open_lazily(second)
    match(one.file, one.like, other.file, other.like)
    lines = [f"a: {one.file.path}, {one.chosen}", f"b: {other.file.path}, {other.chosen}"]
    return "\n".join([*lines, *_report(one.tensors(), other.tensors())])


def _report(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """What is said of two sets; in memory there is one tensor of each at a time, where they are read so."""
    broken, equal, rest = list[str](), list[str](), list[str]()
    of_a, of_b, both, apart = dict[str, float](), list[float](), list[float](), dict[str, float]()
    shapes: dict[str, tuple[int, ...]] = {}
    opposed = moved = 0
    for name in left:
        a, b = {name: left[name]}, {name: right[name]}
        broken += nonfinite(a) | nonfinite(b)
        is_equal = a[name].equal(b[name].to(a[name].dtype))
        equal += [name] * is_equal
        if not parameters(a):
            rest += [name] * (not is_equal)
            continue
        shapes[name], apart[name] = tuple(a[name].shape), distance(a, b)
        of_a[name] = dot(a, a)
        of_b.append(dot(b, b))
        both.append(dot(a, b))
        against = conflicts([a, b], name)
        opposed, moved = opposed + against[0], moved + against[1]
    if broken:
        return [f"  NaN or infinity in {len(broken)} tensors, first `{min(broken)}`: nothing else can be compared."]
    if len(equal) == len(left):
        return [f"  the same weights: all {len(left)} tensors are equal bit for bit."]
    long_a, long_b = math.sqrt(sum(of_a.values())), math.sqrt(sum(of_b))
    whole = math.hypot(*apart.values())
    angle = sum(both) / (long_a * long_b) if long_a * long_b else 0.0
    lines = [
        f"  {len(equal)} of {len(left)} tensors are equal bit for bit",
        f"  length of a {long_a:.4g}, of b {long_b:.4g}; distance {whole:.4g}"
        f" ({whole / (long_a or 1):.2%} of a); cosine {angle:.6f}",
        f"  entries of opposite sign: {opposed / moved if moved else 0.0:.2%}",
        "  farthest apart, as a share of the tensor's length in a:",
    ]
    shares = {name: far / (math.sqrt(of_a[name]) or 1) for name, far in apart.items()}
    worst = sorted(shares, key=shares.__getitem__, reverse=True)[:_MOST]
    width = max(map(len, worst), default=0)
    lines += [f"    {name:{width}}  {shares[name]:9.2%}  {shapes[name]}" for name in worst]
    if rest:
        lines.append(f"  buffers that differ: {', '.join(rest[:_MOST])}{' ...' if len(rest) > _MOST else ''}")
    return lines
