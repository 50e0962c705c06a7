"""Soups by given weights, and WARP's rounds."""

from typing import Any

import pytest
import torch

from lightning_merge.soups import WARP, cocktail_weights, pareto_front, soup


def vector(*values: float) -> dict[str, Any]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


A, B, START = vector(1, 2, -1, 0.5), vector(0.5, -1, 2, 1), vector(0.2, 0.1, -0.3, 0.4)


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        (1.0, vector(1.4173504950, 0.9853458145, 1.4706916291, 1.1746775877)),
        (0.3, vector(0.5652051485, 0.3656037444, 0.2312074887, 0.6324032763)),
    ],
)
def test_warp_goes_to_the_slerp_of_the_changes(eta: float, expected: dict[str, Any]) -> None:
    assert torch.allclose(WARP(eta).merge(START, [A, B])["w"], expected["w"], rtol=0, atol=6e-11)


def test_warp_keeps_the_length_of_changes_that_are_at_right_angles() -> None:
    ends = [{"w": torch.eye(3)[i]} for i in range(3)]
    merged = WARP(1.0).merge({"w": torch.zeros(3)}, ends)["w"]
    assert merged.norm().item() == pytest.approx(1.0)
    assert (merged > 0.4).all()


def test_cocktail_weights_are_those_of_the_published_code() -> None:
    found = cocktail_weights([2.0, 1.0, 3.0])
    # Of single precision: the three published numbers add up to 1 - 2e-10.
    assert found == pytest.approx([0.3289329223, 0.4017595783, 0.2693074992], abs=3e-10)
    assert cocktail_weights([1e5, 1e5]) == [0.5, 0.5]


def test_soup_averages_floats_and_takes_the_last_count() -> None:
    models = [{"w": torch.tensor([1.0]), "n": torch.tensor(i)} for i in (3, 5)]
    models[1]["w"] = torch.tensor([5.0], dtype=torch.bfloat16)
    mixed = soup(models, [0.75, 0.25])
    assert (mixed["w"].item(), mixed["n"].item()) == (2.0, 5)
    assert mixed["w"].dtype == torch.float32
    assert torch.equal(soup([A, B])["w"], (A["w"] + B["w"]) / 2)


def test_the_front_keeps_equal_points_and_drops_beaten_ones() -> None:
    assert pareto_front([(1, 1), (1, 1), (1, 0), (2, 0)]) == [0, 1, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soup([]), "`models` must hold at least one model"),
        (lambda: soup([A, B], [0.5, 0.6]), "`weights` must be 2 numbers that together are 1"),
        (lambda: soup([A, B], [1.0]), "`weights` must be 2 numbers"),
        (lambda: soup([A, vector(1)]), r"model 2 of `models` .* has shape \(1,\) instead of \(4,\)"),
        (lambda: cocktail_weights([]), "`losses` must be finite numbers"),
        (lambda: cocktail_weights([1.0, float("nan")]), "`losses` must be finite numbers"),
        (lambda: cocktail_weights([1.0], 0.0), "`temperature` must be above 0"),
        (lambda: WARP(0.0), r"`eta` must be in \(0, 1\], got 0.0"),
        (lambda: WARP().merge(START, [A]), "`policies` must be at least 2 models, got 1"),
        (lambda: WARP().merge(START, [A, {}]), "policy 2 is another model"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
