"""Diagnostics: whether sets of weights can be merged, and what is wrong where they cannot.

Lengths and angles are those of all parameters taken as one vector, in float64; statistics of BatchNorm layers are no
part of it. Whatever takes a score takes a loss: lower is better.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import function, instance, number, real, whole
from lightning_merge._mergeable import named, several_named
from lightning_merge.weights import Weights, average_dtype, first_mismatch, is_averaged, nonfinite

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Problem = Literal["not finite", "identical", "wrong base", "barrier", "unrelated", "stale statistics", "start"]

_SAME_DIRECTION = 0.2
"""Cosine of the weights of two models below which they have nothing in common. Independent runs: about 0; snapshots of
one run, and fine-tuned models and their base: above 0.5."""

_BARRIER = 0.1
"""Rise of the loss above that of the worse end that counts as a barrier, as a share of it."""

_STALE = 1.0
"""Distance between stored and measured BatchNorm statistics that counts as stale, in standard deviations."""

MOST_POINTS = 10_000
"""Points on a line between two sets of weights: each is measured."""

_START = 0.3
"""Share of an average that may still be the weights of the start."""


# ---- lengths and angles


def parameters(weights: Mapping[str, Tensor]) -> Weights:
    """What lengths and angles are about: floating-point tensors without the statistics of BatchNorm layers."""
    named("weights", weights)
    return {name: t for name, t in weights.items() if is_averaged(t) and name.rpartition(".")[2] not in _STATISTICS}


@torch.no_grad()
def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Sum of the products of all parameters, in float64."""
    kept = parameters(_alike(left, right))
    return sum(float(torch.sum(_wide(t) * _wide(right[name]))) for name, t in kept.items())


def norm(weights: Mapping[str, Tensor]) -> float:
    """Euclidean length of all parameters.

    Example:
        >>> norm({"w": torch.tensor([3.0, 4.0]), "bn.running_mean": torch.tensor([100.0])})
        5.0
    """
    named("weights", weights)
    return math.sqrt(dot(weights, weights))


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Euclidean length of the difference of all parameters.

    Example:
        >>> distance({"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([4.0, 5.0])})
        5.0
    """
    return norm(difference(left, right))


def cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Cosine of the angle between two sets of weights; 0 if one of them is all zeros.

    Example:
        >>> cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])})
        0.7071067811865475
    """
    _alike(left, right)
    lengths = norm(left) * norm(right)
    return dot(left, right) / lengths if lengths else 0.0


@torch.no_grad()
def difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Weights:
    """``left - right`` of all parameters, in float64.

    Raises:
        TypeError: If they are not named tensors.
        ValueError: If names or shapes differ.
    """
    return {name: _wide(t) - _wide(right[name]) for name, t in parameters(_alike(left, right)).items()}


def successive_cosines(path: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Cosines of each step along a path of weights with the step before it.

    About 1: the path still goes somewhere, and an average of it lags behind. About -0.5: independent noise around one
    point, which is what averaging removes.

    Example:
        >>> successive_cosines([{"w": torch.tensor([x])} for x in (0.0, 1.0, 3.0, 2.0)])
        [1.0, -1.0]
    """
    steps = [difference(after, before) for before, after in pairwise(several_named("path", path))]
    return [cosine(before, after) for before, after in pairwise(steps)]


@torch.no_grad()
def sign_conflicts(vectors: Sequence[Mapping[str, Tensor]]) -> float:
    """Share of the entries that at least two vectors move, where not all of these move it the same way.

    Example:
        >>> sign_conflicts([{"w": torch.tensor([1.0, 1.0, 0.0])}, {"w": torch.tensor([2.0, -1.0, 5.0])}])
        0.5
    """
    vectors = several_named("vectors", vectors)
    if not vectors:
        raise ValueError("`vectors` must hold at least one vector, got none.")
    shared = opposed = 0
    for name in parameters(vectors[0]):
        signs = torch.stack([torch.sign(vector[name]) for vector in vectors])
        moved = signs.abs().sum(0)
        shared += int((moved >= 2).sum())
        opposed += int(((moved >= 2) & (signs.sum(0).abs() < moved)).sum())
    return opposed / shared if shared else 0.0


@torch.no_grad()
def between(left: Mapping[str, Tensor], right: Mapping[str, Tensor], share: float) -> Weights:
    """``(1 - share) * left + share * right``, in the precision of ``left``; integers are those of the nearer end.

    Example:
        >>> between({"w": torch.tensor(0.0)}, {"w": torch.tensor(4.0)}, 0.25)
        {'w': tensor(1.)}
    """
    _alike(left, right)
    share = number("share", share)
    nearer = left if share < 0.5 else right
    return {
        name: torch.lerp(_average(t), _average(right[name]).to(t.device), share).to(t.dtype)
        if is_averaged(t)
        else nearer[name]
        for name, t in left.items()
    }


def mean(candidates: Sequence[Mapping[str, Tensor]]) -> Weights:
    """The uniform mean, in the precision of the first; integer tensors are those of the last."""
    candidates = several_named("candidates", candidates)
    if not candidates:
        raise ValueError("`candidates` must hold at least one set of weights, got none.")
    result: Weights = dict(candidates[0])
    for count, weights in enumerate(candidates[1:], start=2):
        result = between(result, weights, 1 / count) | {n: t for n, t in weights.items() if not is_averaged(t)}
    return result


def barrier(losses: Mapping[float, float]) -> float:
    """The most that a loss on a line exceeds the straight line between its ends; negative if it lies below all along.

    A loss that is a NaN exceeds everything: so is what comes back.

    Args:
        losses: The loss at each share of the way, 0 and 1 included, and at least one between.

    Raises:
        ValueError: If an end, or every point between, is missing.

    Example:
        >>> barrier({0.0: 1.0, 0.5: 5.0, 1.0: 3.0})
        3.0

    References:
        Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, section 2.
    """
    instance("losses", losses, Mapping, "losses by share of the way")
    for share, loss in losses.items():
        number("losses", share, says="by share of the way, a number")
        real("losses", loss, "numbers by share of the way")
    if not {0.0, 1.0} < losses.keys():
        raise ValueError(f"`losses` must hold the shares 0, 1 and one between, got {sorted(losses)}.")
    rises = [loss - (1 - t) * losses[0.0] - t * losses[1.0] for t, loss in losses.items() if 0.0 < t < 1.0]
    return _worst(rises)


def _worst(losses: Sequence[float]) -> float:
    """The highest; a NaN is higher than any."""
    return max(losses, key=lambda loss: (math.isnan(loss), loss))


# ---- statistics of BatchNorm layers


def never_measured(weights: Mapping[str, Tensor]) -> list[str]:
    """BatchNorm layers whose statistics are still those of the start: mean 0 and variance 1."""
    return [
        name.removesuffix(".running_mean")
        for name, running_mean in named("weights", weights).items()
        if name.endswith("running_mean")
        and not bool(running_mean.any())
        and bool((weights[name.replace("running_mean", "running_var")] == 1).all())
    ]


def statistics_shift(stored: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> float:
    """How far stored BatchNorm statistics are from measured ones: that of the worst layer, in standard deviations.

    ``sqrt(mean over channels of ((m - m') / s')^2 + log(s / s')^2)``, for means m and standard deviations s.

    Example:
        >>> stored = {"bn.running_mean": torch.tensor([0.0]), "bn.running_var": torch.tensor([4.0])}
        >>> measured = {"bn.running_mean": torch.tensor([6.0]), "bn.running_var": torch.tensor([4.0])}
        >>> round(statistics_shift(stored, measured), 3)
        3.0
    """
    named("stored", stored)
    worst = 0.0
    for name in named("measured", measured):
        if name.endswith("running_mean") and name not in stored:
            raise ValueError(f"`stored` lacks `{name}`, which was measured.")
        if name.endswith("running_mean"):
            variance = name.replace("running_mean", "running_var")
            # A channel that is constant says nothing; 1e-5 is what BatchNorm itself adds.
            now, then = _wide(measured[variance]) + 1e-5, _wide(stored[variance]).clamp(min=0) + 1e-5
            moved = (_wide(stored[name]) - _wide(measured[name])).square() / now
            worst = max(worst, math.sqrt(float((moved + (then / now).log().div(2).square()).mean())))
    return worst


# ---- the examination


@final
@dataclass(frozen=True)
class Finding:
    """One thing that speaks against merging.

    Args:
        problem: Which kind.
        number: The figure behind it.
        text: What was found and what to do, in words.
    """

    problem: Problem
    number: float
    text: str


@final
@dataclass(frozen=True)
class Examination:
    """What was measured, and what speaks against merging; the worst first.

    Args:
        findings: Empty if nothing does.
        measures: Every figure by name.
        line: The loss on the line between the two sets that are farthest apart, by share of the way.
    """

    findings: tuple[Finding, ...]
    measures: dict[str, float]
    line: dict[float, float]

    @property
    def verdict(self) -> str:
        """``"merge"``, or the worst problem."""
        return self.findings[0].problem if self.findings else "merge"

    def report(self) -> str:
        """The verdict, what speaks against merging, and every figure."""
        lines = [f"verdict: do not merge as they are ({self.verdict})" if self.findings else "verdict: merge"]
        lines += [f"  - {finding.text}" for finding in self.findings]
        width = max(map(len, self.measures), default=0)
        lines += [f"  {name:{width}}  {value:.4g}" for name, value in self.measures.items()]
        if self.line:
            lines.append("  loss on the line: " + ", ".join(f"{share:.0%} {x:.4g}" for share, x in self.line.items()))
        return "\n".join(lines)


def examine(
    candidates: Mapping[str, Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    *,
    loss: Callable[[Weights], float] | None = None,
    measure_statistics: Callable[[Weights], Weights] | None = None,
    initial_shares: Mapping[str, float] | None = None,
    points: int = 3,
) -> Examination:
    """Looks for reasons not to merge sets of weights: two models, snapshots of a run, or its raw and merged weights.

    Args:
        candidates: Sets of weights by name, in the order they were trained where there is one; at least one.
        base: The weights that all of them were fine-tuned from, if they are to be merged as task vectors.
        loss: Measures a set of weights; without it barriers are not looked for.
        measure_statistics: BatchNorm statistics of a set of weights, from training data; empty without such layers.
            Where there is a loss, merged weights are measured with these.
        initial_shares: Share of an average that is still the weights of the start, by name.
        points: How many points between two sets the loss is measured at; at least 1.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no candidate, if two are of different models, or if ``points`` is less than 1.

    Example:
        >>> near = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([1.0, 0.1])}}
        >>> examine(near).verdict
        'merge'
        >>> examine(near | {"c": {"w": torch.tensor([0.0, float("nan")])}}).verdict
        'not finite'
    """
    instance("candidates", candidates, Mapping, "sets of weights by name")
    for weights in candidates.values():
        named("candidates", weights)
    if not candidates:
        raise ValueError("`candidates` must hold at least one set of weights, got none.")
    if base is not None:
        named("base", base)
    for argument, given in (("loss", loss), ("measure_statistics", measure_statistics)):
        if given is not None:
            function(argument, given)
    if initial_shares is not None:
        instance("initial_shares", initial_shares, Mapping, "shares by name")
    points = whole("points", points, 1, MOST_POINTS)
    first_name, first = next(iter(candidates.items()))
    for name, weights in [*candidates.items(), *([("the base", base)] if base is not None else [])]:
        if problem := first_mismatch(first, weights):
            raise ValueError(f"`{first_name}` and `{name}` are of different models: {problem}.")

    if broken := _not_finite(candidates, base):
        return Examination((broken,), {"sets with NaN or infinity": broken.number}, {})
    measures: dict[str, float] = {}
    found = [
        *_geometry(candidates, measures),
        *_base(candidates, base, measures),
        *_start(initial_shares or {}, measures),
    ]
    line: dict[float, float] = {}
    found += _statistics(candidates, measure_statistics, measures)
    if loss is not None and len(candidates) > 1:
        line, rise = _line(candidates, loss, measure_statistics, points, measures)
        found += rise
    return Examination(tuple(sorted(found, key=lambda finding: _ORDER.index(finding.problem))), measures, line)


_ORDER: tuple[Problem, ...] = (
    "not finite",
    "identical",
    "wrong base",
    "barrier",
    "unrelated",
    "stale statistics",
    "start",
)


def _not_finite(candidates: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor] | None) -> Finding | None:
    everything = dict(candidates) | ({} if base is None else {"the base": base})
    broken = {name: min(bad) for name, weights in everything.items() if (bad := nonfinite(weights))}
    if not broken:
        return None
    where = ", ".join(f"`{tensor}` of {name}" for name, tensor in broken.items())
    return Finding(
        "not finite", len(broken), f"NaN or infinity in {where}. Leave it out: one such set spoils any mean."
    )


def _geometry(candidates: Mapping[str, Mapping[str, Tensor]], measures: dict[str, float]) -> list[Finding]:
    if len(candidates) < 2:
        return []
    lengths = [norm(weights) for weights in candidates.values()]
    found: list[Finding] = []
    distances, cosines = {}, {}
    for (one, left), (other, right) in combinations(candidates.items(), 2):
        distances[one, other] = distance(left, right)
        cosines[one, other] = cosine(_matrices(left), _matrices(right)) if _matrices(left) else 1.0
    twins = [f"{one} and {other}" for (one, other), apart in distances.items() if apart == 0]
    if twins:
        text = f"{' and '.join(twins[:3])} are the same weights: nothing to merge, and in a mean they count twice."
        found.append(Finding("identical", len(twins), text))
    pair = min(cosines, key=cosines.__getitem__)
    measures["relative distance"] = max(distances.values()) / (max(lengths) or 1.0)
    measures["lowest cosine of weights"] = cosines[pair]
    measures["length of the mean / mean length"] = norm(mean(list(candidates.values()))) / (
        sum(lengths) / len(lengths) or 1.0
    )
    if len(candidates) > 2:
        turns = successive_cosines(list(candidates.values()))
        measures["cosine of successive steps"] = sum(turns) / len(turns)
    if cosines[pair] < _SAME_DIRECTION:
        shrunk = measures["length of the mean / mean length"]
        text = (
            f"{pair[0]} and {pair[1]} have nothing in common: the cosine of their weights is {cosines[pair]:.2f}, and"
            f" the mean of all is {shrunk:.2f} as long as they are. A mean of unrelated networks is noise. Merge models"
            " that share a start, or align them first."
        )
        found.append(Finding("unrelated", cosines[pair], text))
    return found


def _base(
    candidates: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor] | None, measures: dict[str, float]
) -> list[Finding]:
    if base is None:
        return []
    vectors = [difference(weights, base) for weights in candidates.values()]
    measures["length of the task vectors / length of the base"] = max(map(norm, vectors)) / (norm(base) or 1.0)
    if len(vectors) > 1:
        measures["sign conflicts"] = sign_conflicts(vectors)
        measures["cosine of task vectors"] = min(cosine(left, right) for left, right in combinations(vectors, 2))
    kept = {name: cosine(_matrices(weights), _matrices(base)) for name, weights in candidates.items()}
    name = min(kept, key=kept.__getitem__)
    measures["lowest cosine with the base"] = kept[name]
    if kept[name] >= _SAME_DIRECTION:
        return []
    text = (
        f"{name} was not fine-tuned from this base: the cosine of their weights is {kept[name]:.2f} (1 minus a little"
        " for a fine-tuned model). Its task vector would be another network. Give the checkpoint that training started"
        " from."
    )
    return [Finding("wrong base", kept[name], text)]


def _start(initial_shares: Mapping[str, float], measures: dict[str, float]) -> list[Finding]:
    found = []
    for name, share in initial_shares.items():
        measures[f"share of the start in {name}"] = share
        if share > _START:
            text = f"{share:.0%} of {name} is still the weights of the start. Use a shorter half-life, or a warm-up."
            found.append(Finding("start", share, text))
    return found


def _statistics(
    candidates: Mapping[str, Mapping[str, Tensor]],
    measure: Callable[[Weights], Weights] | None,
    measures: dict[str, float],
) -> list[Finding]:
    found = []
    cure = "Measure them again: `Selection(buffers='recompute')`, or `lightning_merge.calibration`."
    for name, weights in candidates.items():
        if initial := never_measured(weights):
            text = f"the statistics of `{initial[0]}` in {name} were never measured: mean 0, variance 1. {cure}"
            found.append(Finding("stale statistics", len(initial), text))
        elif measure is not None and (fresh := measure(dict(weights))):
            shift = measures[f"shift of BatchNorm statistics of {name}"] = statistics_shift(weights, fresh)
            if shift > _STALE:
                text = (
                    f"BatchNorm statistics of {name} are {shift:.1f} standard deviations off those of its data. {cure}"
                )
                found.append(Finding("stale statistics", shift, text))
    return found


def _line(
    candidates: Mapping[str, Mapping[str, Tensor]],
    loss: Callable[[Weights], float],
    measure: Callable[[Weights], Weights] | None,
    points: int,
    measures: dict[str, float],
) -> tuple[dict[float, float], list[Finding]]:
    """The loss between the two sets that are farthest apart, with statistics that fit each point."""

    def fitted(weights: Weights) -> float:
        return loss(weights | (measure(weights) if measure is not None else {}))

    one, other = max(combinations(candidates, 2), key=lambda pair: distance(candidates[pair[0]], candidates[pair[1]]))
    shares = [step / (points + 1) for step in range(points + 2)]
    line = {share: fitted(between(candidates[one], candidates[other], share)) for share in shares}
    worse = _worst([line[0.0], line[1.0]])
    # A loss that is not a number is higher than any.
    highest = max((share for share in shares if 0 < share < 1), key=lambda x: (math.isnan(line[x]), line[x]))
    how = ", statistics measured" if measure is not None and measure(dict(candidates[one])) else ""
    measures |= {f"loss of {one}{how}": line[0.0], f"loss of {other}{how}": line[1.0], "barrier": barrier(line)}
    rise = line[highest]
    where = f"{highest:.0%} of the way from {one} to {other}"
    if len(candidates) > 2:
        measures["loss of the mean"] = fitted(mean(list(candidates.values())))
        if not measures["loss of the mean"] <= rise and not math.isnan(rise):
            rise, where = measures["loss of the mean"], "the mean of all"
    if rise <= (1 + _BARRIER) * worse and math.isfinite(rise):
        return line, []
    text = (
        f"a barrier of {barrier(line):.3g}: the loss is {rise:.3g} at {where}, and {worse:.3g} at the worse end. They"
        " lie in different basins. Keep the better one, or merge later snapshots, or models that share more of their"
        " training."
    )
    return line, [Finding("barrier", barrier(line), text)]


# ---- tensors


def _alike(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The left ones, if the right ones have all of their parameters."""
    kept = parameters(named("left", left))
    found = {name: t for name, t in named("right", right).items() if name in kept}
    if problem := first_mismatch(kept, found):
        raise ValueError(f"`right` is of another model than `left`: {problem}.")
    return left


def _matrices(weights: Mapping[str, Tensor]) -> Weights:
    """Without biases and scales: those of any two networks are alike."""
    return {name: t for name, t in parameters(weights).items() if t.dim() > 1}


def _wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().to("cpu", torch.float64)


def _average(tensor: Tensor) -> Tensor:
    return tensor.detach().to(average_dtype(tensor))
