"""Reasons not to merge, each with its figure; none of them takes a loss."""

from collections.abc import Callable, Mapping
from itertools import combinations

from torch import Tensor

from lightning_merge.diagnostics._examination import Finding
from lightning_merge.diagnostics._geometry import (
    cosine,
    difference,
    distance,
    matrices,
    mean,
    norm,
    sign_conflicts,
    successive_cosines,
)
from lightning_merge.diagnostics._statistics import never_measured, statistics_shift
from lightning_merge.weights import Weights, nonfinite

_SAME_DIRECTION = 0.2
"""Cosine of the weights of two models below which they have nothing in common. Independent runs: about 0; snapshots of
one run, and fine-tuned models and their base: above 0.5."""


_STALE = 1.0
"""Distance between stored and measured BatchNorm statistics that counts as stale, in standard deviations."""


_START = 0.3
"""Share of an average that may still be the weights of the start."""


def not_finite(candidates: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor] | None) -> Finding | None:
    everything = dict(candidates) | ({} if base is None else {"the base": base})
    broken = {name: min(bad) for name, weights in everything.items() if (bad := nonfinite(weights))}
    if not broken:
        return None
    where = ", ".join(f"`{tensor}` of {name}" for name, tensor in broken.items())
    return Finding(
        "not finite", len(broken), f"NaN or infinity in {where}. Leave it out: one such set spoils any mean."
    )


def of_geometry(candidates: Mapping[str, Mapping[str, Tensor]], measures: dict[str, float]) -> list[Finding]:
    if len(candidates) < 2:
        return []
    lengths = [norm(weights) for weights in candidates.values()]
    found: list[Finding] = []
    distances, cosines = {}, {}
    for (one, left), (other, right) in combinations(candidates.items(), 2):
        distances[one, other] = distance(left, right)
        cosines[one, other] = _alike(left, right)
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


def _alike(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Cosine of the matrices; 1 where there is none but of zeros, or without entries."""
    one, other = matrices(left), matrices(right)
    return cosine(one, other) if norm(one) or norm(other) else 1.0


def of_base(
    candidates: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor] | None, measures: dict[str, float]
) -> list[Finding]:
    if base is None:
        return []
    vectors = [difference(weights, base) for weights in candidates.values()]
    measures["length of the task vectors / length of the base"] = max(map(norm, vectors)) / (norm(base) or 1.0)
    if len(vectors) > 1:
        measures["sign conflicts"] = sign_conflicts(vectors)
        measures["cosine of task vectors"] = min(cosine(left, right) for left, right in combinations(vectors, 2))
    kept = {name: _alike(weights, base) for name, weights in candidates.items()}
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


def of_start(initial_shares: Mapping[str, float], measures: dict[str, float]) -> list[Finding]:
    found = []
    for name, share in initial_shares.items():
        measures[f"share of the start in {name}"] = share
        if share > _START:
            text = f"{share:.0%} of {name} is still the weights of the start. Use a shorter half-life, or a warm-up."
            found.append(Finding("start", share, text))
    return found


def of_statistics(
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
