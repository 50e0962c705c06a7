"""When weights are merged."""

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import SWALR

from lightning_merge.schedules import Duration, EveryNEpochs, EveryNSteps, Moment, RunLength, anneal


def at(step: int) -> Moment:
    return Moment(step, epoch=0)


def end_of(epoch: int) -> Moment:
    return Moment(10 * epoch, epoch, epoch_end=True)


STEPS = {
    "every step": (EveryNSteps(), 0, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    "every 3 steps": (EveryNSteps(3), 0, [3, 6, 9]),
    "from step 4": (EveryNSteps(start=4), 4, [5, 6, 7, 8, 9]),
    "every 2 steps from step 5": (EveryNSteps(2, start=5), 5, [7, 9]),
    "after half of a run of 10 steps": (EveryNSteps(2, start=0.5).resolve(RunLength(steps=10)), 5, [7, 9]),
}


@pytest.mark.parametrize(("schedule", "start", "due"), STEPS.values(), ids=list(STEPS))
def test_steps_are_counted_from_the_start(schedule, start, due):
    assert [step for step in range(10) if schedule.due(at(step))] == due
    assert [step for step in range(10) if schedule.started(at(step))] == list(range(start, 10))


def test_schedule_in_steps_is_not_due_at_the_end_of_an_epoch():
    assert not EveryNSteps().due(end_of(3))


EPOCHS = {
    "every epoch": (EveryNEpochs(), [1, 2, 3, 4, 5, 6, 7, 8]),
    "from epoch 1": (EveryNEpochs(start=1), [1, 2, 3, 4, 5, 6, 7, 8]),
    "from epoch 5": (EveryNEpochs(start=5), [5, 6, 7, 8]),
    "every 3 epochs from epoch 2": (EveryNEpochs(3, start=2), [2, 5, 8]),
    "the last quarter of 8 epochs": (EveryNEpochs(start=0.75).resolve(RunLength(epochs=8)), [6, 7, 8]),
}


@pytest.mark.parametrize(("schedule", "due"), EPOCHS.values(), ids=list(EPOCHS))
def test_epochs_are_collected_as_by_the_authors_of_swa(schedule, due):
    assert [epoch for epoch in range(1, 9) if schedule.due(end_of(epoch))] == due
    assert [epoch for epoch in range(1, 9) if schedule.started(end_of(epoch))] == list(range(due[0], 9))


def test_schedule_in_epochs_is_not_due_after_a_step():
    assert not EveryNEpochs().due(Moment(step=10, epoch=1))


def test_share_of_the_run_is_rounded_up_but_not_by_rounding_errors():
    assert EveryNSteps(start=0.25).resolve(RunLength(steps=10)).start == 3
    assert EveryNSteps(start=0.07).resolve(RunLength(steps=100)).start == 7  # 0.07 * 100 is 7.000000000000001
    assert EveryNEpochs(start=0.0).resolve(RunLength()).start == 0
    assert EveryNSteps(start=7).resolve(RunLength()).start == 7


@pytest.mark.parametrize("schedule", [EveryNSteps, EveryNEpochs])
def test_share_of_a_run_of_unknown_length_is_an_error_with_the_cure(schedule):
    with pytest.raises(ValueError, match=r"`start=0.5` is a share of the run.*`max_steps`.*whole number"):
        schedule(start=0.5).resolve(RunLength())


@pytest.mark.parametrize("schedule", [EveryNSteps, EveryNEpochs])
@pytest.mark.parametrize(("field", "value"), [("n", 0), ("start", -1), ("start", 1.0), ("start", 2.5)])
def test_argument_out_of_range_is_refused_by_name(schedule, field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must be .* got {value}"):
        schedule(**{field: value})


DURATIONS = {
    500: Duration(500),
    2.5: Duration(2.5),
    "500": Duration(500),
    "1 step": Duration(1),
    "500 steps": Duration(500),
    "1 epoch": Duration(1, "epochs"),
    " 2  epochs ": Duration(2, "epochs"),
    "5%": Duration(0.05, "run"),
    "100%": Duration(1, "run"),
    Duration(3): Duration(3),
}


@pytest.mark.parametrize(("text", "duration"), DURATIONS.items(), ids=str)
def test_duration_reads_as_it_is_said(text, duration):
    assert Duration.parse(text) == duration


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "2epochs", "5% epochs", "steps", "-1 steps", "150%", "nan"])
def test_text_that_is_no_duration_is_refused_with_what_it_must_read_like(text):
    with pytest.raises(ValueError, match="must read like '500 steps', '2 epochs' or '5%'"):
        Duration.parse(text)


@pytest.mark.parametrize("number", [0.05, 0.999, "0.05"])
def test_a_bare_number_below_1_is_no_share_and_says_how_to_write_one(number):
    share = r"99\.9%" if number == 0.999 else "5%"
    with pytest.raises(ValueError, match=rf"`half_life` counts optimizer steps.*write '{share}'"):
        Duration.parse(number, "half_life")
    assert Duration.parse("0.5 steps") == Duration(0.5)


@pytest.mark.parametrize("given", [[3], None, True, object()], ids=["a list", "None", "True", "an object"])
def test_what_is_neither_text_nor_number_is_no_duration(given):
    with pytest.raises(TypeError, match="`stage` must be a number of steps, or read like '500 steps'"):
        Duration.parse(given, "stage")


@pytest.mark.parametrize(
    ("value", "unit", "message"),
    [
        (0, "steps", "more than 0, got 0"),
        (-1, "epochs", "more than 0, got -1"),
        (float("inf"), "steps", "more than 0, got inf"),
        (float("nan"), "steps", "more than 0, got nan"),
        (1.5, "run", r"in \(0, 1\], got 1.5"),
        (1, "days", "`unit` must be 'steps', 'epochs' or 'run', got 'days'"),
    ],
)
def test_duration_out_of_range_is_refused(value, unit, message):
    with pytest.raises(ValueError, match=message):
        Duration(value, unit)


def test_duration_becomes_steps():
    run = RunLength(steps=1000, epochs=10, steps_per_epoch=100)
    assert Duration(7).steps(RunLength()) == 7
    assert Duration(2, "epochs").steps(run) == 200
    assert Duration(0.05, "run").steps(run) == 50


@pytest.mark.parametrize("duration", [Duration(2, "epochs"), Duration(0.5, "run")])
def test_duration_in_a_run_of_unknown_length_is_an_error_with_the_cure(duration):
    with pytest.raises(ValueError, match=r"known length: set `max_steps`.*or give the duration in steps"):
        duration.steps(RunLength())


def test_numpy_numbers_are_numbers():
    for schedule in (EveryNSteps(np.int64(3), np.int32(4)), EveryNSteps(3, torch.tensor(4))):
        assert schedule == EveryNSteps(3, 4)
        assert repr(schedule) == repr(EveryNSteps(3, 4))
    assert EveryNEpochs(start=np.float32(0.5)) == EveryNEpochs(start=0.5)


@pytest.mark.parametrize("strategy", ["linear", "cos"])
@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_annealing_equals_swalr(strategy, epochs):
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    peer = SWALR(optimizer, swa_lr=0.02, anneal_epochs=epochs, anneal_strategy=strategy)
    for epoch in range(7):
        assert anneal(0.1, 0.02, epoch, epochs, strategy) == pytest.approx(peer.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        peer.step()


def test_annealing_gives_the_published_values():
    linear = [anneal(0.1, 0.02, epoch, 4, "linear") for epoch in range(6)]
    cosine = [anneal(0.1, 0.02, epoch, 4) for epoch in range(6)]
    assert linear == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.02], rel=1e-12)
    assert cosine == pytest.approx([0.1, 0.088284, 0.06, 0.031716, 0.02, 0.02], abs=6e-7)
