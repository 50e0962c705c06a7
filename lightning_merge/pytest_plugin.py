"""A fixture for pytest: is your module resumable bit for bit?

pytest loads this file wherever lightning-merge is installed, so it imports nothing before the fixture is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def assert_resumable(tmp_path: Path) -> Callable[..., None]:
    """Fails unless a training goes on from its file as if it had not been stopped.

    ``assert_resumable(make, epoch=0, batch=None)``: ``make`` seeds, and gives a Trainer, a module and, if the module
    has none of its own, data. The file is written after that epoch, or after that batch of it, counted from 0. See
    ``lightning_merge.callbacks.replay``.

    Example::

        def test_my_module_resumes(assert_resumable):
            def make():
                seed_everything(0)
                return Trainer(max_epochs=2, callbacks=[RandomState()]), MyModule(), MyData()

            assert_resumable(make)
    """

    def check(make: Callable[[], tuple[Any, ...]], epoch: int = 0, batch: int | None = None) -> None:
        from lightning_merge.callbacks import replay

        found = replay(make, tmp_path, epoch=epoch, batch=batch)
        if found.difference is not None:
            pytest.fail(str(found), pytrace=False)

    return check
