"""What a preset of ``ContinualMerging`` stands for."""

from lightning_merge._checks import one_of
from lightning_merge.combiners import Combiner
from lightning_merge.continual import PRESETS, Preset


def chosen_preset(preset: str | Combiner) -> Preset:
    """The preset of a name, or one that starts every task from the base for a combiner.

    Raises:
        ValueError: If there is none of the name.
    """
    if isinstance(preset, Combiner):
        return Preset(preset, "base")
    return PRESETS[one_of("preset", preset, tuple(PRESETS), f"a combiner or one of {', '.join(map(repr, PRESETS))}")]
