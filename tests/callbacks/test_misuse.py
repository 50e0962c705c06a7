"""A mistake is answered before training starts, by an error that says what to do."""

from pathlib import Path
from types import ModuleType

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import Net, batches, trainer

from lightning_merge.callbacks import EMA
from lightning_merge.rules import ExponentialMean


def test_a_rule_in_the_place_of_a_callback_names_the_callback(package: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"ExponentialMean is a rule.*use EMA of lightning_merge.callbacks"):
        trainer(tmp_path, [ExponentialMean(0.9)], package=package)


def test_a_strategy_that_shards_parameters_is_refused(tmp_path: Path) -> None:
    class ModelParallelStrategy(SingleDeviceStrategy):
        """Goes by the name of Lightning's, which needs several processes."""

    run = trainer(tmp_path, [EMA()], strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"ModelParallelStrategy shards parameters.*strategy='ddp'"):
        run.fit(Net(), batches())
