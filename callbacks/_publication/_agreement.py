"""By which metrics all processes decide."""

from collections.abc import Mapping
from typing import final

from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._ranks import agreed, gathered


@final
class Agreement:
    """Makes processes decide by the same metrics, and says once what a part of them does not log."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, found: Mapping[str, float]) -> dict[str, float]:
        """Of each metric that of the first process that logs it. All must call this."""
        everyone = gathered(list(found))
        for key in dict.fromkeys(key for keys in everyone for key in keys):
            having = [rank for rank, keys in enumerate(everyone) if key in keys]
            if len(having) < len(everyone) and key not in self._said:
                self._said.add(key)
                rank_zero_info(
                    f"`{key}` is logged by process {', '.join(map(str, having))} alone, of {len(everyone)}: all decide"
                    f" by that of process {having[0]}. Log it in every process, with `sync_dist=True`, to decide by"
                    " all of the data."
                )
        return agreed(found)
