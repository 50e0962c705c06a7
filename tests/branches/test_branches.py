"""What branches do at a merge: matrices, buffers, precision, and what is left out."""

import pytest
import torch
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge.branches import InTurn, uniform
from lightning_merge.branches._buffers import pooled
from lightning_merge.branches._one_per_rank import _common


def branches(*values: list[float], dtype: torch.dtype = torch.float64, **settings: object) -> InTurn:
    layer = nn.Linear(len(values[0]), 1, bias=False).to(dtype)
    made = InTurn(layer, [], len(values), **settings)  # type: ignore[arg-type]
    for branch, row in enumerate(values):
        made.weights(branch)["weight"].copy_(torch.tensor([row], dtype=torch.float64))
    return made


def numbers(made: InTurn, branch: int) -> list[float]:
    return [float(number) for number in made.weights(branch)["weight"][0]]


@pytest.mark.parametrize("inactive", ["device", "cpu"])
@pytest.mark.parametrize("active", [0, 2])
def test_a_pull_to_the_mean_gives_the_published_numbers(inactive: str, active: int) -> None:
    made = branches([1, 2, -1, 0.5], [0.5, -1, 2, 1], [0.9, 0.3, 0.2, -0.5], inactive=inactive)
    made.activate(active)
    made.mix([[0.995 * (i == j) + 0.005 / 3 for i in range(3)] for j in range(3)])
    assert numbers(made, 0) == pytest.approx([0.999, 1.9921666667, -0.993, 0.4991666667], abs=1e-10)
    assert numbers(made, 1) == pytest.approx([0.5015, -0.9928333333, 1.992, 0.9966666667], abs=1e-10)
    assert numbers(made, 2) == pytest.approx([0.8995, 0.3006666667, 0.201, -0.4958333333], abs=1e-10)
    assert made.mean()["weight"][0].tolist() == pytest.approx([0.8, 1.3 / 3, 0.4, 1 / 3], abs=1e-10)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_branches_stay_what_they_are_bit_for_bit(count: int) -> None:
    row = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    made = branches(*[row] * count, dtype=torch.float32)
    before = made.weights(0)["weight"].clone()
    made.mix(uniform(count))
    assert torch.equal(made.mean()["weight"], before)
    assert all(torch.equal(made.weights(branch)["weight"], before) for branch in range(count))


def test_a_branch_without_a_share_is_not_read() -> None:
    made = branches([1, 2], [float("nan"), float("inf")], [3, 6])
    assert made.diverged() == {1}
    made.revive({1})
    assert numbers(made, 1) == [2, 4]
    assert (numbers(made, 0), numbers(made, 2)) == ([1, 2], [3, 6])


def test_tensors_of_any_layout_and_size_are_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (3, 70_000), "image": (8, 4, 3, 3), "scalar": (), "empty": (0, 2), "strided": (40, 30)}
    sets: list[dict[str, Tensor]] = []
    for _ in range(3):
        each = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        each["image"] = each["image"].to(memory_format=torch.channels_last)
        each["strided"] = each["strided"].t()
        each["narrow"] = torch.randn(5, generator=generator).bfloat16()
        sets.append(each)
    rows = [[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    expected = [
        {n: sum(share * each[n].double() for share, each in zip(row, sets, strict=True)) for n in sets[0]}
        for row in rows
    ]
    kept = sets[1]["large"].clone()
    weights.mix_(sets, rows)
    for found, right in zip(sets, expected, strict=True):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, right[name].to(tensor.dtype))
    assert torch.equal(sets[1]["large"], kept)
    assert sets[0]["image"].is_contiguous(memory_format=torch.channels_last)


def test_a_mean_of_bfloat16_branches_is_rounded_once() -> None:
    made = branches([1.0], [1.0078125], [1.015625], dtype=torch.bfloat16)
    mean = made.mean()["weight"]
    assert mean.dtype is torch.float32
    assert mean.item() == pytest.approx(1.0078125, abs=1e-7)


def test_a_pooled_variance_is_that_of_all_values() -> None:
    batches = [torch.randn(50, 2, generator=torch.Generator().manual_seed(n)) * (n + 1) + n for n in range(3)]
    sets = [
        {"bn.running_mean": b.mean(0), "bn.running_var": b.var(0, unbiased=False), "bn.seen": torch.tensor(n)}
        for n, b in enumerate(batches)
    ]
    merged = pooled(sets, [1 / 3] * 3)
    together = torch.cat(batches)
    torch.testing.assert_close(merged["bn.running_mean"], together.mean(0))
    torch.testing.assert_close(merged["bn.running_var"], together.var(0, unbiased=False))
    assert merged["bn.seen"] == 2


def test_parameters_that_are_unfrozen_later_are_branched_from_there() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    made = InTurn(net, [], 2)
    assert "0.weight" not in made.live
    net[0].requires_grad_(True)
    made.refresh()
    with torch.no_grad():
        net[0].weight.fill_(5.0)
    made.activate(1)
    assert not (net[0].weight == 5.0).any()


def test_optimizer_states_average_and_reset() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adagrad([parameter], 0.1, initial_accumulator_value=0.5)
    made = InTurn(nn.ParameterList([parameter]), [optimizer], 2)
    for branch in (0, 1):
        made.activate(branch)
        for _ in range(1 + branch):
            parameter.grad = torch.full((2,), 2.0)
            optimizer.step()
    made.average_optimizers()
    for branch in (0, 1):
        made.activate(branch)
        assert optimizer.state[parameter]["sum"].tolist() == [6.5, 6.5]
        assert optimizer.state[parameter]["step"].item() == 2
    made.reset_optimizers({0, 1})
    for branch in (0, 1):
        made.activate(branch)
        assert optimizer.state[parameter]["sum"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5, 0.5]], "`matrix` must have a row for each of the 2 branches, got 1"),
        ([[0.5, 0.6], [0.0, 1.0]], r"shares must be 2 numbers of at least 0 that sum to 1.*got \[0.5, 0.6\]"),
        ([[1.5, -0.5], [0.0, 1.0]], "shares must be 2 numbers of at least 0"),
    ],
)
def test_a_matrix_of_another_kind_is_refused(matrix: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        branches([1.0], [2.0]).mix(matrix)


def test_the_common_part_of_a_matrix_is_found_where_there_is_one() -> None:
    assert _common(uniform(3)) == ([1 / 3] * 3, [0, 0, 0])
    assert _common([[0.75, 0.25], [0.5, 0.5]]) == ([0.5, 0.25], [0.25, 0.25])
    assert _common([[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]) is None
