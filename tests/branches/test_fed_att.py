"""FedAtt: the official numbers, and the other reading of attention."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_merge.branches import FedAtt, InTurn

BASE: dict[str, Any] = {"weight": [[0.3, -0.1, 0.2], [0.5, -0.4, 0.1]], "bias": [0.05, -0.05]}
WAYS: list[dict[str, Any]] = [
    {"weight": [[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], "bias": [0.2, -0.4]},
    {"weight": [[-0.5, -1.0, 2.0], [1.5, 1.0, -2.0]], "bias": [0.1, 0.6]},
    {"weight": [[2.0, 1.0, -0.5], [-0.5, -1.0, 0.5]], "bias": [-0.9, 0.3]},
]


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def merged(policy: FedAtt) -> tuple[InTurn, Any]:
    net = nn.Linear(3, 2, dtype=torch.float64)
    net.load_state_dict({name: tensor(each) for name, each in BASE.items()})
    branches = InTurn(net, [], count=3)
    state = policy.init(branches)
    for branch, way in enumerate(WAYS):
        for name, own in branches.weights(branch).items():
            own.copy_(tensor(BASE[name]) + tensor(way[name]))
    policy.merge(state, branches)
    return branches, state


def test_it_is_the_official_aggregation() -> None:
    # FedAtt at ab9e537, executed: step 1.2, distances by scipy.linalg.norm(ord=2).
    expected = {
        "weight": [
            [1.0171593937599155, -1.5759851428901277, 1.2828406062400843],
            [1.064948031642332, 1.680399987389246, -1.2850480284896435],
        ],
        "bias": [-0.31651901632968227, 0.2009834562116356],
    }
    branches, state = merged(FedAtt())
    for name, each in expected.items():
        for branch in range(3):
            torch.testing.assert_close(branches.weights(branch)[name], tensor(each), rtol=0, atol=1e-9)
        torch.testing.assert_close(state["anchor"][name], tensor(each), rtol=0, atol=1e-9)


def test_near_counts_the_branch_that_stayed_closest() -> None:
    branches, _ = merged(FedAtt(step=1.0, prefers="near"))
    lengths = [math.hypot(*way["bias"]) for way in WAYS]
    shares = torch.softmax(-tensor(lengths), 0)
    expected = tensor(BASE["bias"]) + sum(share * tensor(way["bias"]) for share, way in zip(shares, WAYS, strict=True))
    torch.testing.assert_close(branches.weights(0)["bias"], expected)


def test_the_next_merge_counts_from_where_the_last_one_led() -> None:
    branches, state = merged(FedAtt())
    before = {name: each.clone() for name, each in branches.weights(0).items()}
    FedAtt().merge(state, branches)
    torch.testing.assert_close(branches.weights(0), before)


@pytest.mark.parametrize(("given", "message"), [({"step": 0.0}, "`step` must be"), ({"prefers": "both"}, "`prefers`")])
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedAtt(**given)
