"""The figures of a stream, against values worked out by the official functions of other libraries."""

import math

import pytest
import torch
from torch import Tensor

from lightning_merge.continual import (
    AccuracyMatrix,
    AverageIncremental,
    BackwardTransfer,
    FinalAverage,
    Forgetting,
    ForwardTransfer,
    OfMatrix,
    Plasticity,
    Stability,
    continual_metrics,
)

FULL = [[90, 20, 10, 5], [80, 85, 30, 10], [70, 75, 95, 20], [60, 65, 85, 80]]
IMPROVING = [[90, 0, 0, 0], [80, 85, 0, 0], [95, 75, 95, 0], [92, 95, 97, 80]]
ONE = torch.zeros(1)
SIZES = torch.tensor([10, 10, 10, 70])


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def lower(rows: list[list[float]]) -> Tensor:
    """As after a stream in which only the tasks seen were measured."""
    return matrix(rows).masked_fill(torch.ones(4, 4).triu(1).bool(), math.nan)


VALUES: list[tuple[OfMatrix, Tensor, float]] = [
    (FinalAverage(), lower(FULL), 72.5),
    (AverageIncremental(), lower(FULL), 81.25),
    (FinalAverage("micro", SIZES), lower(FULL), 77.0),
    (AverageIncremental("micro", SIZES), lower(FULL), 82.375),
    (Plasticity(), lower(FULL), 87.5),
    (Stability(), lower(FULL), 70.0),
    (BackwardTransfer(), lower(FULL), -20.0),
    (Forgetting("chaudhry"), lower(FULL), 20.0),
    (Forgetting("max_all"), lower(FULL), 20.0),
    (Forgetting("initial"), lower(FULL), 20.0),
    (ForwardTransfer(torch.full((4,), 25.0)), matrix(FULL), -5 / 3),
    (BackwardTransfer(), lower(IMPROVING), 14 / 3),
    (Forgetting("max_all"), lower(IMPROVING), 1.0),
    (Forgetting("chaudhry"), lower(IMPROVING), -3.0),
    (Forgetting("initial"), lower(IMPROVING), -14 / 3),
]


@pytest.mark.parametrize(("metric", "rows", "expected"), VALUES, ids=lambda value: type(value).__name__)
def test_figure_is_that_of_the_official_functions(metric: OfMatrix, rows: Tensor, expected: float) -> None:
    before = rows.clone()
    assert metric(rows).item() == pytest.approx(expected, abs=1e-12)
    assert rows.equal(before) or rows.nan_to_num().equal(before.nan_to_num())


@pytest.mark.parametrize("convention", ["chaudhry", "max_all", "initial"])
def test_the_full_matrix_gives_the_forgetting_of_its_lower_part(convention: str) -> None:
    assert Forgetting(convention)(matrix(FULL)) == Forgetting(convention)(lower(FULL))  # type: ignore[arg-type]


def test_figures_count_the_tasks_trained_so_far() -> None:
    begun = lower(FULL)
    begun[2:] = math.nan
    assert FinalAverage()(begun).item() == pytest.approx(82.5)
    assert AverageIncremental()(begun).item() == pytest.approx(86.25)
    assert BackwardTransfer()(begun).item() == pytest.approx(-10.0)


def test_what_is_not_defined_is_nan_rather_than_zero() -> None:
    one = torch.tensor([[0.9]])
    for metric in (BackwardTransfer(), Forgetting(), Stability(), ForwardTransfer(torch.zeros(1))):
        assert math.isnan(metric(one).item())
    assert math.isnan(ForwardTransfer(torch.zeros(4))(lower(FULL)).item())  # nothing above the diagonal
    assert math.isnan(FinalAverage()(torch.full((2, 2), math.nan)).item())


HOLES = {
    "nothing": [[math.nan] * 3] * 3,
    "the last row alone": [[math.nan] * 3, [math.nan] * 3, [70, 75, 95]],
    "one task never before the last": [[90, math.nan, math.nan], [math.nan] * 3, [70, 75, 95]],
    "one task": [[90, math.nan, math.nan], [math.nan] * 3, [math.nan] * 3],
}


@pytest.mark.parametrize("rows", HOLES.values(), ids=HOLES.keys())
def test_a_matrix_with_holes_gives_a_number_or_nan_and_no_infinity(rows: list[list[float]]) -> None:
    for name, value in continual_metrics(torch.zeros(3))(matrix(rows)).items():
        assert not value.isinf(), name
    for convention in ("chaudhry", "initial"):
        assert math.isnan(Forgetting(convention)(matrix(rows)).item())  # type: ignore[arg-type]


def test_figures_are_nan_before_a_matrix_and_after_a_reset() -> None:
    figures = continual_metrics(torch.zeros(3))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(math.isnan(value.item()) for value in figures.compute().values())
    figures(matrix(FULL)[:3, :3])
    figures.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(math.isnan(value.item()) for value in figures.clone().compute().values())


def test_what_is_given_per_task_moves_and_is_cloned_with_the_metric_and_may_be_longer() -> None:
    for metric, name in ((FinalAverage("micro", SIZES), "sizes"), (ForwardTransfer(SIZES), "baseline")):
        assert getattr(metric.clone().to("meta"), name).is_meta
        assert not getattr(metric, name).is_meta
        assert name not in metric.state_dict()
        assert not metric(matrix(FULL)[:2, :2]).isnan()


def test_matrix_counts_over_batches_from_classes_or_logits() -> None:
    metric = AccuracyMatrix(tasks=2)
    metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), after=1, task=0)
    metric.update(torch.tensor([[0.1, 0.9]]), torch.tensor([1]), after=1, task=0)
    found = metric.compute()
    assert found[1, 0].item() == 0.75
    assert found.isnan().sum() == 3
    assert metric.sizes().tolist() == [4, 0]


def test_collection_has_every_figure_and_forward_transfer_with_a_baseline() -> None:
    found = continual_metrics(torch.full((4,), 25.0))(matrix(FULL))
    assert found["final_average"].item() == pytest.approx(72.5)
    assert found["forward_transfer"].item() == pytest.approx(-5 / 3)
    assert "forward_transfer" not in continual_metrics()(matrix(FULL))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AccuracyMatrix(tasks=0), r"`tasks` must be at least 1, got 0"),
        (
            lambda: AccuracyMatrix(2).update(torch.zeros(1), torch.zeros(1), after=2, task=0),
            r"`after` must be in \[0, 2",
        ),
        (
            lambda: AccuracyMatrix(2).update(torch.zeros(1), torch.zeros(1), after=0, task=-1),
            r"`task` must be in \[0, 2",
        ),
        (lambda: FinalAverage("median"), r"`average` must be 'macro' or 'micro', got 'median'"),
        (lambda: FinalAverage("micro"), r"`sizes` must be given for `average='micro'` only"),
        (lambda: AverageIncremental("macro", SIZES), r"`sizes` must be given"),
        (
            lambda: FinalAverage("micro", SIZES[:3])(matrix(FULL)),
            r"`sizes` must have an entry for each of the 4.*got 3",
        ),
        (lambda: AverageIncremental("micro", SIZES[:1])(matrix(FULL)), r"`sizes` must have an entry.*got 1"),
        (lambda: FinalAverage("micro", torch.ones(2, 2)), r"`sizes` must hold one .*got shape \(2, 2\)"),
        (lambda: FinalAverage("micro", torch.tensor([1, -1])), r"`sizes` must be at least 0 and finite, got \[1, -1"),
        (lambda: ForwardTransfer(torch.tensor(0.1)), r"`baseline` must hold one .*got shape \(\)"),
        (lambda: ForwardTransfer(ONE)(matrix(FULL)), r"`baseline` must have an entry for each of the 4.*got 1"),
        (
            lambda: AccuracyMatrix(2).update(torch.zeros(3, 1, 1), torch.zeros(3), after=0, task=0),
            r"`predictions` must be of shape \(N,\) or \(N, C\)",
        ),
        (
            lambda: AccuracyMatrix(2).update(torch.zeros(1), torch.zeros(3), after=0, task=0),
            r"`labels` of shape \(N,\)",
        ),
        (lambda: Forgetting("mean"), r"`convention` must be 'chaudhry'"),
        (lambda: FinalAverage()(torch.zeros(2, 3)), r"`matrix` must be of shape \(tasks, tasks\), got \(2, 3\)"),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
