"""Methods of continual learning by merging, by name: a combiner, and where the next task starts."""

from dataclasses import dataclass
from typing import Literal, final

from lightning_merge._checks import flag, instance, one_of, settle
from lightning_merge.combiners import (
    DARE,
    EMR,
    OPCM,
    TIES,
    Average,
    Combiner,
    ExponentialAverage,
    Fisher,
    IsoC,
    MagMax,
    RegMean,
    Sum,
)

InitFrom = Literal["base", "merged", "last"]
"""Where a task starts: the base all vectors are measured against, the merged model, or where the last task ended."""


@final
@dataclass(frozen=True)
class Preset:
    """What a method consists of.

    Args:
        combiner: Merges the task vectors.
        init_from: Where the next task starts.
        lora: Whether a task trains low-rank adapters only, whose products are the vector.
    """

    combiner: Combiner
    init_from: InitFrom
    lora: bool = False

    def __post_init__(self) -> None:
        instance("combiner", self.combiner, Combiner)
        one_of("init_from", self.init_from, InitFrom)
        settle(self, lora=flag("lora", self.lora))


PRESETS: dict[str, Preset] = {
    # Model soups of independent fine-tunes, as ITA composes them.
    "average": Preset(Average(), "base"),
    # Task arithmetic, with the constant of the continual benchmarks.
    "sum": Preset(Sum(scale=0.3), "base"),
    "ties": Preset(TIES(), "base"),
    "dare": Preset(DARE(), "base"),
    # MagMax (ECCV 2024): sequential fine-tuning is what makes the signs agree.
    "magmax": Preset(MagMax(scale=0.5), "last"),
    # CoMA (ECCV 2024).
    "ema": Preset(ExponentialAverage(alpha=0.4), "merged"),
    "opcm": Preset(OPCM(), "base"),
    # WiSE-FT (CVPR 2022): half way from the base to where sequential fine-tuning is now.
    "wise-ft": Preset(ExponentialAverage(alpha=1.0, scale=0.5), "last"),
    # Matena and Raffel (NeurIPS 2022), Jin et al. (ICLR 2023): statistics are measured at the end of each task.
    "fisher": Preset(Fisher({}), "base"),
    "regmean": Preset(RegMean({}), "base"),
    # Huang et al. (NeurIPS 2024): signs of each task are kept, so that its own model can be made again.
    "emr": Preset(EMR(), "base"),
    # Marczak et al. (ICML 2025).
    "iso-c": Preset(IsoC(), "base"),
    # Chitale et al. (2023); its last step stores samples, so it is an option: `store_samples_per_class`.
    "lora-arithmetic": Preset(Sum(scale=0.3), "base", lora=True),
}
"""The presets by the name that ``ContinualMerging`` takes."""
