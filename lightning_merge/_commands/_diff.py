"""``lightning-merge diff``: how far apart two sets of weights are, and where."""

from lightning_merge.diagnostics import cosine, distance, norm, parameters, sign_conflicts
from lightning_merge.files._layouts import open_set
from lightning_merge.files._refusals import refuse_no_plain
from lightning_merge.files._sets import match
from lightning_merge.weights import Weights, nonfinite

_MOST = 10  # tensors that are listed


def diff(first: str, second: str | None) -> str:
    """A report on two sets, given as ``FILE`` or ``FILE:SET``, or on the two sets of one file.

    Raises:
        ValueError: If a file cannot be read, holds no such set, or the two are of different models.
    """
    if second is None:
        file, chosen = open_set(first)
        others = [name for name in file.sets if name != chosen]
        if not others:
            raise ValueError(f"{first} holds one set of weights only ({chosen}): give a second FILE, or FILE:SET.")
        one, other = (file, chosen), (file, others[0])
    else:
        one, other = open_set(first), open_set(second)
    left, right = (file.choose(name).weights for file, name in (one, other))
    refuse_no_plain(one[0].path, left)
    refuse_no_plain(other[0].path, right)
    match(one[0], left, other[0], right)
    lines = [f"a: {one[0].path}, {one[1]}", f"b: {other[0].path}, {other[1]}"]
    return "\n".join([*lines, *_report(left, right)])


def _report(left: Weights, right: Weights) -> list[str]:
    broken = sorted(nonfinite(left) | nonfinite(right))
    if broken:
        return [f"  NaN or infinity in {len(broken)} tensors, first `{broken[0]}`: nothing else can be compared."]
    equal = [name for name, tensor in left.items() if tensor.equal(right[name].to(tensor.dtype))]
    if len(equal) == len(left):
        return [f"  the same weights: all {len(left)} tensors are equal bit for bit."]
    apart = {name: distance({name: left[name]}, {name: right[name]}) for name in parameters(left)}
    whole = distance(left, right)
    lines = [
        f"  {len(equal)} of {len(left)} tensors are equal bit for bit",
        f"  length of a {norm(left):.4g}, of b {norm(right):.4g}; distance {whole:.4g}"
        f" ({whole / (norm(left) or 1):.2%} of a); cosine {cosine(left, right):.6f}",
        f"  entries of opposite sign: {sign_conflicts([left, right]):.2%}",
        "  farthest apart, as a share of the tensor's length in a:",
    ]
    shares = {name: far / (norm({name: left[name]}) or 1) for name, far in apart.items()}
    worst = sorted(shares, key=shares.__getitem__, reverse=True)[:_MOST]
    width = max(map(len, worst), default=0)
    lines += [f"    {name:{width}}  {shares[name]:9.2%}  {tuple(left[name].shape)}" for name in worst]
    rest = [name for name in left if name not in apart and name not in equal]
    if rest:
        lines.append(f"  buffers that differ: {', '.join(rest[:_MOST])}{' ...' if len(rest) > _MOST else ''}")
    return lines
