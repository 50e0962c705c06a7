"""Fixtures for the tests of the callbacks."""

from collections.abc import Iterator
from functools import cache
from types import ModuleType

import lightning.fabric.utilities.registry
import lightning.pytorch
import lightning_fabric.utilities.registry
import pytest
import pytorch_lightning
import torch


@pytest.fixture(params=[lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the two packages a user's Trainer may come from."""
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _plugins_looked_up_once() -> Iterator[None]:
    """Each Trainer asks every installed package for its callbacks, which takes a tenth of a tiny fit."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (lightning.fabric.utilities.registry, lightning_fabric.utilities.registry):
            patch.setattr(registry, "entry_points", cache(registry.entry_points))
        yield


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    """Tiny tensors gain nothing from threads, and a forked child must not inherit a pool of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
