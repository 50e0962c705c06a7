"""Combiners refuse by name what they cannot merge, as a list and as a stream, and hand out memory of its own."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from test_combiner_conformance import bits, every_combiner, updated, vectors

from lightning_merge.combiners import (
    DARE,
    OPCM,
    SLERP,
    TIES,
    Average,
    Breadcrumbs,
    Combiner,
    ExponentialAverage,
    MagMax,
    ModelStock,
    Sum,
    add_vector,
    slerp,
    task_vector,
)

FORMS = {"list": list, "stream": iter}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


class Labelled(torch.Tensor):
    """A class of its own."""


ODD = {
    "a class of its own": (torch.ones(2).as_subclass(Labelled), "`w` .*Labelled, a class of its own.*as_subclass"),
    "8-bit floats": (torch.ones(2).to(torch.float8_e5m2), "`w` .*float8_e5m2, whose scale is in another tensor"),
    "complex numbers": (torch.ones(2, dtype=torch.complex64), "`w` .*complex"),
}
every_odd = pytest.mark.parametrize(("odd", "message"), ODD.values(), ids=list(ODD))


@every_combiner
@every_form
@every_odd
def test_a_tensor_that_only_looks_like_numbers_is_refused_by_name(
    combiner: Combiner, form: Callable[..., Any], odd: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        combiner.combine(form([{"w": torch.ones(2)}, {"w": odd}]))
    with pytest.raises(ValueError, match=message):
        combiner.combine(form([{"w": odd}, {"w": odd}]))


@every_odd
@pytest.mark.parametrize("place", ["weights", "base"])
def test_task_vectors_leave_out_whole_numbers_only(odd: torch.Tensor, message: str, place: str) -> None:
    plain = {"w": torch.ones(2), "steps": torch.tensor(3)}
    assert list(task_vector(plain, plain)) == ["w"]
    given = {"weights": plain, "base": plain} | {place: {**plain, "w": odd}}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        task_vector(**given)


@every_combiner
def test_results_own_their_memory(combiner: Combiner) -> None:
    stream = vectors(2)
    for seen in (stream[:1], stream):
        state = updated(combiner, seen)
        before = bits(deepcopy(state))
        for tensor in (combiner.result(state) or {}).values():
            tensor.fill_(7)
        assert bits(state) == before
    for given in (stream[:1], stream):
        before = bits(deepcopy(given))
        for form in FORMS.values():
            for tensor in combiner.combine(form(given)).values():
                tensor.fill_(7)
            assert bits(given) == before


HUGE = 3e38
"""Twice this is no float32."""

LARGE = {
    "mean": (Average(), [HUGE, HUGE, HUGE], HUGE),
    "mean of opposite signs": (Average(), [HUGE, -HUGE], 0.0),
    "scaled sum": (Sum(0.3), [HUGE, HUGE], 0.6 * HUGE),
    "moving average": (ExponentialAverage(0.5), [HUGE, -HUGE], 0.0),
    "largest magnitude": (MagMax(1.0), [HUGE / 2, -HUGE], -HUGE),
    "thinned mean": (DARE(Average(), density=1.0), [HUGE, HUGE], HUGE),
}


@every_form
@pytest.mark.parametrize(("combiner", "values", "expected"), LARGE.values(), ids=list(LARGE))
def test_a_sum_may_be_too_large_where_what_follows_from_it_is_not(
    combiner: Combiner, values: list[float], expected: float, form: Callable[..., Any]
) -> None:
    found = combiner.combine(form([{"w": torch.tensor([value, 1.0])} for value in values]))["w"]
    assert found.dtype == torch.float32
    assert found[0].item() == pytest.approx(expected, rel=1e-6)


@every_form
@pytest.mark.parametrize(
    "combiner", [Sum(10.0), Breadcrumbs(1.0, 0.0, 10.0), TIES(1.0, divisor=None), SLERP(scale=10.0)], ids=repr
)
def test_what_is_too_large_for_its_type_is_refused_by_name(combiner: Combiner, form: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"`w` .*too large"):
        combiner.combine(form([{"w": torch.tensor([HUGE, 1.0])}, {"w": torch.tensor([HUGE, 2.0])}]))


def test_a_vector_that_is_too_large_leaves_the_state_as_it_was() -> None:
    combiner, vector = TIES(), {"w": torch.full((4,), HUGE)}
    state = updated(combiner, [vector])
    before = bits(deepcopy(state))
    with pytest.raises(ValueError, match="`w` in the vector of task 1 is too large to be merged"):
        combiner.update(state, vector, task=1)
    assert bits(state) == before


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("combiner", [SLERP(), ModelStock(), OPCM()], ids=repr)
def test_angles_do_not_depend_on_lengths(combiner: Combiner, size: float) -> None:
    rows = [torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.5, 1.0, 0.0])]
    unit = combiner.combine([{"w": row} for row in rows])["w"]
    found = combiner.combine([{"w": row * size} for row in rows])["w"]
    torch.testing.assert_close(found / size, unit, rtol=1e-5, atol=1e-6)


def test_a_line_through_zero_is_gone_along_without_overflow() -> None:
    a = torch.tensor([HUGE, HUGE])
    assert slerp(a, -a, 0.25).tolist() == pytest.approx([HUGE / 2, HUGE / 2])


def test_a_vector_that_leaves_the_type_of_the_base_is_refused_by_name() -> None:
    base = {"w": torch.full((2,), 6e4, dtype=torch.float16)}
    with pytest.raises(ValueError, match=r"`w` is too large for torch.float16, the base's type"):
        add_vector(base, {"w": torch.full((2,), 6e4)})
    masked = {"w": torch.tensor([1.0, float("inf")])}
    assert add_vector(masked, {"w": torch.zeros(2)})["w"].tolist() == [1.0, float("inf")]


def test_a_label_of_numpy_draws_what_its_number_draws() -> None:
    row = [{"w": torch.ones(64)}]
    assert torch.equal(DARE().combine(row, [np.int64(3)])["w"], DARE().combine(row, [3])["w"])
    assert torch.equal(DARE().combine(iter(row), np.array([3]))["w"], DARE().combine(row, [3])["w"])


@every_form
@pytest.mark.parametrize("tasks", [[], ["a"], ["a", "b", "c"], 3, "ab", [None, None], [True, False]], ids=repr)
def test_labels_that_are_not_one_for_each_vector_are_refused(tasks: Any, form: Callable[..., Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="`tasks`"):
        Sum().combine(form([{"w": torch.ones(2)}] * 2), tasks)
