"""A mistake is answered before training starts, by an error that says what to do."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import Net, batches, trainer

from lightning_merge.callbacks import EMA, Anchor, ContinualMerging, ImportanceStatistics, Lookaround, OnlineMerging
from lightning_merge.callbacks._lightning._strategies import refuse_unsupported
from lightning_merge.rules import ExponentialMean


def test_a_rule_in_the_place_of_a_callback_names_the_callback(package: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"ExponentialMean is a rule.*use EMA of lightning_merge.callbacks"):
        trainer(tmp_path, [ExponentialMean(0.9)], package=package)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "HomeMadeStrategy"])
def test_a_strategy_under_which_averages_do_not_work_names_those_under_which_they_do(name: str, tmp_path: Path) -> None:
    # Goes by the name of Lightning's, which needs devices or packages that are not here.
    strategy = type(name, () if name == "HomeMadeStrategy" else (SingleDeviceStrategy,), {})
    with pytest.raises(
        ValueError, match=rf"{name} .*Use a single device, `strategy='ddp'`, or `ModelParallelStrategy`"
    ):
        refuse_unsupported(strategy.__new__(strategy))
    if name != "HomeMadeStrategy":
        run = trainer(tmp_path, [EMA()], strategy=strategy())
        with pytest.raises(ValueError, match=name):
            run.fit(Net(), batches())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
@pytest.mark.parametrize("kind", [Lookaround, OnlineMerging, ContinualMerging, Anchor, ImportanceStatistics])
def test_what_needs_whole_parameters_is_refused_under_a_strategy_that_shards(
    kind: type, name: str, tmp_path: Path
) -> None:
    arguments: dict[str, dict[str, Any]] = {
        "ContinualMerging": {"preset": "average", "bank": tmp_path / "bank"},
        "Anchor": {"strength": 1.0},
        "OnlineMerging": {"pretrained": "zero"},
    }
    callback = kind(**arguments.get(kind.__name__, {}))
    run = trainer(tmp_path, [callback], strategy=type(name, (SingleDeviceStrategy,), {})())
    with pytest.raises(ValueError, match=rf"{kind.__name__}.* needs whole .*{name} shards.*Use .*`strategy='ddp'`"):
        run.fit(Net(), batches())
    assert not (tmp_path / "bank").exists()
