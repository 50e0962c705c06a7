"""What ``lightning-merge run NAME --league`` trains: a recipe with a league in the place of its own averages."""

from importlib import import_module
from typing import Any

import yaml

from lightning_merge.callbacks import Published
from lightning_merge.callbacks._publication._session import Judge

_STANDARD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("EMA", {"name": "ema-0.02", "half_life": "2%"}),
    ("EMA", {"name": "ema-0.05", "half_life": "5%"}),
    ("EMA", {"name": "ema-0.1", "half_life": "10%"}),
    ("SWA", {}),
    ("LAWA", {}),
    ("SWAD", {"monitor": "val/loss", "stop": False}),
    ("PostHocEMA", {}),
)
"""Contestants that suit any run: EMA at three widths, as shares of the run, and the others with their defaults."""


def with_league(name: str, text: str) -> str:
    """The text of a recipe with a ``League`` for its own averages and what judges them.

    It is decided by the metric that the recipe's ``ModelCheckpoint`` watches. Contestants are measured at the end only,
    and the winner alone is saved, beside what ``ModelCheckpoint`` saves of the raw weights.

    Raises:
        ValueError: If the recipe watches no metric, as that of a stream of tasks.
    """
    config = yaml.safe_load(text)
    callbacks = config.get("trainer", {}).get("callbacks") or []
    savers = [each["init_args"] for each in callbacks if each["class_path"].endswith(".ModelCheckpoint")]
    watched = next((each for each in savers if "monitor" in each), None)
    if watched is None:
        raise ValueError(f"`--league` needs a recipe that watches a validation metric, and {name} does not.")
    kept = [each for each in callbacks if not _gives_way(each["class_path"])]
    contestants = [
        {
            "class_path": f"lightning_merge.callbacks.{kind}",
            "init_args": {**settings, "validate": "raw", "final_checkpoint": False},
        }
        for kind, settings in _STANDARD
    ]
    league = {"contestants": contestants, "monitor": watched["monitor"], "mode": watched["mode"]}
    config["trainer"]["callbacks"] = [*kept, {"class_path": "lightning_merge.callbacks.League", "init_args": league}]
    return str(yaml.safe_dump(config, sort_keys=False))


def _gives_way(path: str) -> bool:
    module, _, name = path.rpartition(".")
    return issubclass(getattr(import_module(module), name), (Published, Judge)) or name == "RunReport"
