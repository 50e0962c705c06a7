"""The combiners that are compared, and what a stream of each keeps."""

from collections.abc import Mapping
from typing import Any

from lightning_merge.combiners import (
    DARE,
    EMR,
    OPCM,
    TIES,
    TSVM,
    Average,
    Breadcrumbs,
    Combiner,
    Consensus,
    Daheim,
    Fisher,
    IsoC,
    MagMax,
    MaTS,
    MetaGPT,
    ModelStock,
    RegMean,
    Sum,
)
from lightning_merge.weights import Weights

Known = dict[str, dict[Any, Any]]
"""Statistics by kind and task."""

SCALED = ("sum", "TIES", "TIES, disjoint max", "Breadcrumbs", "DARE", "MagMax", "Consensus", "Daheim", "Iso-C", "TSV-M")
"""Rules whose scale is searched."""

SPECTRAL = ("OPCM", "Iso-C", "TSV-M")


def rules(known: Known, scales: Mapping[str, float]) -> dict[str, Combiner]:
    """By name, with the scales that were found."""
    fisher, gram = known["fisher"], known["gram"]
    plain: dict[str, Combiner] = {
        "mean": Average(),
        "sum": Sum(),
        "TIES": TIES(),
        "TIES, disjoint max": TIES(disjoint="max"),
        "Breadcrumbs": Breadcrumbs(),
        "MagMax": MagMax(),
        "Model Stock": ModelStock(),
        "MetaGPT": MetaGPT(),
        "OPCM": OPCM(),
        "Consensus": Consensus(),
        "Iso-C": IsoC(),
        "TSV-M": TSVM(),
        "EMR, told the task": EMR(),
        "Fisher": Fisher(fisher),
        "Fisher of Adam's moments": Fisher(known["adam"]),
        "Fisher-nodes": Fisher(fisher, per="node"),
        "Daheim": Daheim(fisher, damping=1e-6),
        "RegMean": RegMean(gram),
        "MaTS": MaTS(gram),
    }
    scaled = {name: rule.with_scale(scales[name]) if name in scales else rule for name, rule in plain.items()}
    return {**scaled, "DARE": DARE(Sum(scale=scales.get("DARE", 0.3)))}


def merged_by(name: str, rule: Combiner, vectors: list[Weights]) -> Weights:
    """What the vectors combine to; of a rule of spectra with 1x1 convolutions as matrices."""
    if name not in SPECTRAL:
        return rule.combine(vectors)
    merged = rule.combine([as_matrices(vector) for vector in vectors])
    return {each: tensor.view_as(vectors[0][each]) for each, tensor in merged.items()}


def as_matrices(vector: Weights) -> Weights:
    return {
        n: t.flatten(1) if t.ndim == 4 and t.shape[2:].numel() == 1 and t.shape[1] > 1 else t for n, t in vector.items()
    }


def copies_of(name: str, rule: Combiner, vectors: list[Weights]) -> float:
    """Numbers that a stream's state holds after all tasks, and a bit per task where it is told the task, over N."""
    own = [as_matrices(vector) for vector in vectors] if name in SPECTRAL else vectors
    state = rule.init(own[0])
    for task, vector in enumerate(own):
        rule.update(state, vector, task=task)
    numbers = sum(t.numel() for t in own[0].values())
    masks = len(own) / 32 if isinstance(rule, EMR) else 0.0
    return _held(list(state.values())) / numbers + masks


def _held(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(_held(each) for each in (value.values() if isinstance(value, dict) else value))
    return value.numel() if hasattr(value, "numel") else 0
