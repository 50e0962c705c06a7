"""Fixtures for the tests of the callbacks."""

from types import ModuleType

import lightning.pytorch
import pytest
import pytorch_lightning
import torch


@pytest.fixture(params=[lightning.pytorch, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the two packages a user's Trainer may come from."""
    return request.param


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    """Tiny tensors gain nothing from threads, and a forked child must not inherit a pool of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
