"""The table of policies and awkward modules with a branch in each of two processes, which are forked once."""

from pathlib import Path
from typing import Any

import pytest
from branch_table import PAIRS, differences, pair
from processes import launch

from lightning_merge.callbacks import BranchStrategy

pytestmark = pytest.mark.multiprocess


def every_pair(root: Path) -> dict[Any, Any]:
    """In each process: what differs between the awkward and the plain module, and what is published."""
    found: dict[Any, Any] = {}
    for policy, situation in PAIRS:
        settings = {"devices": 2, "use_distributed_sampler": False}
        try:
            awkward, plain = pair(
                policy, situation, root, make=lambda: BranchStrategy(process_group_backend="gloo"), **settings
            )
        except Exception as error:
            found[policy, situation] = [f"{type(error).__name__}: {error}"], {}
            continue
        published = {name: tensor.clone() for name, tensor in awkward.items() if name.startswith("published")}
        found[policy, situation] = differences(awkward, plain), published
    return found


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return launch(2, every_pair, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("chosen", PAIRS, ids="-".join)
def test_an_awkward_module_trains_as_the_plain_one_does(chosen: Any, in_processes: list[dict[Any, Any]]) -> None:
    (differs, first), (differs_too, second) = (each[chosen] for each in in_processes)
    assert not differs
    assert not differs_too
    assert not differences(first, second, 0.0)  # the processes publish one model
