"""The configuration files of `docs/guides/configs.md` make what they say."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_merge.callbacks import EMA, SWA, WeightMerging
from lightning_merge.rules import Mean, WindowMean
from lightning_merge.schedules import EveryNSteps

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "configs.md"
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


def block(name: str) -> dict[str, Any]:
    (text,) = re.findall(rf"^```yaml\n# {name}:.*?\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    content: dict[str, Any] = yaml.safe_load(text)
    content["trainer"] |= QUIET
    return content


def averages(trainer: Any) -> list[WeightMerging]:
    return [each for each in trainer.callbacks if isinstance(each, WeightMerging)]


def test_lightning_cli_takes_callbacks_by_their_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(block("LightningCLI")))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    more = ["--trainer.callbacks+=EMA", "--trainer.callbacks.name=slow", "--trainer.callbacks.decay=0.9999"]
    given = ["--config", str(tmp_path / "config.yaml"), *more]
    cli = LightningCLI(pl.LightningModule, args=given, run=False, save_config_callback=None)
    first, second, third, fourth = averages(cli.trainer)
    assert (type(first), first.name) == (EMA, "ema")
    assert (type(second), second.name) == (SWA, "tail")
    assert (third.name, third.rule, third.schedule) == ("window", WindowMean(5), EveryNSteps(100))
    assert (type(fourth), fourth.name) == (EMA, "slow")
    assert "decay=0.9999" in repr(fourth)


def instantiate(node: Any) -> Any:
    """As Hydra does it: the class of each ``_target_`` is called with what stands beside it."""
    if isinstance(node, list):
        return [instantiate(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: instantiate(value) for key, value in node.items()}
    module, _, name = str(made.pop("_target_", "")).rpartition(".")
    return getattr(import_module(module), name)(**made) if name else made


def test_hydra_makes_callbacks_rules_and_schedules() -> None:
    trainer = instantiate(block("Hydra"))["trainer"]
    first, second = averages(trainer)
    assert first.selection.exclude == ("head.*",)
    assert "value=0.05, unit='run'" in repr(first.rule)
    assert (second.name, second.rule, second.schedule) == ("tail", Mean(), EveryNSteps(10, start=0.75))
