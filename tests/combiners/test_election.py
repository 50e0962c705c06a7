"""Who is elected, bit for bit what ``torch.where`` would choose, whatever the numbers."""

import math

import pytest
import torch

from lightning_merge.combiners._election import elected, majorities

CHOICES = [0.0, 1.0, 2.0, 0.5, 3e38, 1e-40, math.inf]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("zero_sign", ["zero", "positive", "official"])
@pytest.mark.parametrize("furthest", [False, True])
def test_the_elected_are_those_that_where_chooses(furthest, zero_sign, dtype, rows):
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.tensor(CHOICES, dtype=dtype)[torch.randint(len(CHOICES), (rows, 300), generator=generator)]

    up, down = drawn(), -drawn()
    sums = {"positive": up.clone(), "negative": down.clone()} | ({"largest": up, "smallest": down} if furthest else {})
    votes = (sums["positive"] + sums["negative"]).nan_to_num(0.0)
    sums["votes"] = votes.clone()
    majority = majorities(sums)
    assert torch.equal(majority, votes.sign().sum(1, keepdim=True).sign())
    wins = {
        "zero": votes.sign(),
        "positive": torch.where(votes >= 0, 1.0, -1.0),
        "official": torch.where(votes == 0, majority, votes.sign()),
    }[zero_sign]
    if zero_sign == "official" and not furthest:
        wins = torch.where(wins > 0, 1.0, -1.0)
    expected = torch.where(wins > 0, up, torch.where(wins < 0, down, 0.0))
    found = elected(sums, zero_sign, None, majority if zero_sign == "official" else None)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(found.view(bits), expected.view(bits))
    assert torch.equal(sums["votes"], votes)
