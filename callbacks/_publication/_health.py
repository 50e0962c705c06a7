"""How each average stands beside the weights that train, logged at the Trainer's interval."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import final

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._averaging._standing import squared_distance
from lightning_merge._ranks import gathered
from lightning_merge.callbacks._lightning._metrics import logged_step, logger_connector, logs_now, sent_to_loggers
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._exchange import Exchange


class HealthReader(ABC):
    """A callback that is told how averages stand whenever loggers are, and where there is no logger."""

    @abstractmethod
    def take_health(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """Called on the first process.

        Args:
            step: As loggers count.
            found: ``updates``, ``distance``, ``start_share`` and ``decay``, as far as they are known, by average.
        """


@final
class Health:
    """Takes the place of what hands the metrics of a training step to loggers, and adds its own after it.

    Between the steps at which that is due it does nothing, and then it reads the device once. The distances need no
    communication, but of sharded parameters one number per average is summed over processes.
    """

    def __init__(self, publisher: Exchange) -> None:
        self._publisher = publisher
        self._watched: list[Average] = []
        self._last: dict[str, torch.Tensor] = {}  # what loggers were last given from here
        self._theirs: set[str] = set()  # keys that the module logs itself

    def wrap(self, patches: Patches) -> None:
        """Installs itself, if anybody is there to be told. All processes call this."""
        trainer = self._publisher.trainer
        logs = bool(trainer.loggers) and not trainer.fast_dev_run
        own = [each.name for each in self._publisher.averages if self._readers or (logs and each.log_health)]
        # Where parameters are sharded all take part in a sum, wherever the logger is.
        everyone = {name for names in gathered(own) for name in names}
        self._watched = [each for each in self._publisher.averages if each.name in everyone]
        if self._watched:
            patches.replace(logger_connector(trainer), "update_train_step_metrics", self._after)

    @property
    def _readers(self) -> list[HealthReader]:
        return [each for each in self._publisher.trainer.callbacks if isinstance(each, HealthReader)]

    def _after(self, original: Callable[[], None]) -> None:
        original()
        trainer = self._publisher.trainer
        if not logs_now(trainer):
            return
        found = self._found(trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        for reader in self._readers:
            reader.take_health(logged_step(trainer), found)
        if trainer.loggers:
            self._log(
                {
                    f"{each.name}/{key}": value
                    for each in self._watched
                    if each.log_health
                    for key, value in found.get(each.name, {}).items()
                }
            )

    def _log(self, metrics: dict[str, float]) -> None:
        trainer = self._publisher.trainer
        sent = sent_to_loggers(trainer)
        for key in metrics.keys() & sent.keys() - self._theirs:
            if sent[key] is not self._last.get(key):
                self._theirs.add(key)
                rank_zero_info(f"`{key}` is logged by the module, so what lightning-merge logs under it is left out.")
        wide = torch.float64  # counts are whole in it; tensors, as all that is in `logged_metrics`
        self._last = {key: torch.tensor(value, dtype=wide) for key, value in metrics.items() if key not in self._theirs}
        logger_connector(trainer).log_metrics(self._last)

    def _found(self, is_told: bool) -> dict[str, dict[str, float]]:
        """How the averages stand, in the first process; in others what they are needed for."""
        is_sharded = any(each.is_sharded for each in self._watched)
        if not (is_told or is_sharded):
            return {}
        found = {each.name: health for each in self._watched if (health := dict(each.health()))}
        measured = {
            each.name: squared_distance(each.at_hand(), each.tensors, each.captured, is_sharded)
            for each in self._watched
        }
        squares = {name: square for name, square in measured.items() if square is not None}
        if squares:
            device = next(iter(squares.values())).device
            together = torch.stack([square.to(device) for square in squares.values()])
            if is_sharded:
                dist.all_reduce(together)
            for name, distance in zip(squares, together.sqrt().tolist() if is_told else (), strict=is_told):
                found.setdefault(name, {})["distance"] = distance
        return found
