"""Every policy of branches, on modules that do things at other times and in other places than examples do."""

from pathlib import Path

import pytest
from branch_table import PAIRS, POLICIES, Plain, branching, differences, outcome, pair


@pytest.mark.parametrize(("policy", "situation"), PAIRS)
def test_an_awkward_module_trains_as_the_plain_one_does(policy: str, situation: str, tmp_path: Path) -> None:
    found, expected = pair(policy, situation, tmp_path)
    assert not differences(found, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policies_of_the_table_move_the_weights(policy: str, tmp_path: Path) -> None:
    callback = branching(policy)
    found = outcome(Plain(), callback, tmp_path)
    assert callback.merges == 3
    start = {f"published {name}": tensor for name, tensor in Plain().state_dict().items()}
    assert differences({name: found[name] for name in start}, start)
