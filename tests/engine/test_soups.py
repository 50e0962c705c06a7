"""Soups by given weights, and WARP's rounds."""

from typing import Any

import pytest
import torch

from lightning_merge.combiners import SLERP, TIES, Average
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


def lora(a: float, b: float, names: tuple[str, str] = ("q.lora_A.weight", "q.lora_B.weight")) -> dict[str, Any]:
    return {names[0]: torch.full((1, 2), float(a)), names[1]: torch.full((2, 1), float(b)), "norm": torch.ones(1)}


FACTORS = {
    "peft": ("q.lora_A.default.weight", "q.lora_B.default.weight"),
    "embeddings of peft": ("e.lora_embedding_A.default", "e.lora_embedding_B.default"),
    "loralib": ("q.lora_a", "q.lora_b"),
    "kohya": ("unet_q.lora_down.weight", "unet_q.lora_up.weight"),
}


@pytest.mark.parametrize("names", FACTORS.values(), ids=list(FACTORS))
def test_both_factors_of_a_lora_layer_are_no_soup(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"`{names[0]}` and `{names[1]}` are factors.*merge_and_unload"):
        soup([lora(1, 2, names), lora(3, 4, names)])
    with pytest.raises(ValueError, match="are factors of a LoRA layer"):
        WARP().merge(lora(0, 0, names), [lora(1, 2, names), lora(3, 4, names)])


def test_a_soup_of_lora_layers_is_right_where_one_factor_is_shared_or_one_model_counts() -> None:
    mixed = soup([lora(1, 2), lora(1, 4)])
    product = mixed["q.lora_B.weight"] @ mixed["q.lora_A.weight"]
    assert torch.equal(product, torch.full((2, 2), 3.0))
    assert torch.equal(soup([lora(1, 2), lora(3, 4)], [0.0, 1.0])["q.lora_A.weight"], torch.full((1, 2), 3.0))


def packed(*values: float) -> torch.Tensor:
    return torch.tensor(values).to(torch.float8_e4m3fn)


class Labelled(torch.Tensor):
    """A class of its own."""


@pytest.mark.parametrize("make", [packed, lambda *v: torch.tensor(v).as_subclass(Labelled)], ids=["8-bit", "class"])
def test_what_only_looks_like_numbers_is_carried_along_where_it_is_the_same_and_else_refused(make: Any) -> None:
    same = soup([{"w": make(1.0, 2.0), "v": torch.zeros(1)}, {"w": make(1.0, 2.0), "v": torch.ones(1)}])
    assert same["w"].dtype == make(1.0).dtype
    assert same["v"].item() == 0.5
    with pytest.raises(ValueError, match=r"`w` is .* only where it is the same in all models"):
        soup([{"w": make(1.0, 2.0)}, {"w": make(1.0, 3.0)}])
    with pytest.raises(ValueError, match=r"`w` is .* only where it is the same in all models"):
        WARP().merge({"w": make(1.0, 2.0)}, [{"w": make(1.0, 2.0)}, {"w": make(1.0, 3.0)}])


def test_complex_numbers_are_averaged_and_results_own_their_memory() -> None:
    models = [{"w": torch.tensor([1 + 2j]), "n": torch.tensor(1)}, {"w": torch.tensor([3 - 2j]), "n": torch.tensor(2)}]
    mixed = soup(models)
    assert mixed["w"].tolist() == [2 + 0j]
    mixed["n"].fill_(7)
    assert models[1]["n"].item() == 2


def test_a_nan_is_refused_by_tensor_and_model_unless_it_does_not_count() -> None:
    bad = {"w": torch.tensor([float("nan")])}
    good = {"w": torch.tensor([1.0])}
    with pytest.raises(ValueError, match="`w` of model 2 of `models` holds a NaN"):
        soup([good, bad])
    assert soup([good, bad], [1.0, 0.0])["w"].item() == 1.0
    with pytest.raises(ValueError, match="`w` of policy 1 of `policies` holds a NaN"):
        WARP().merge(good, [bad, good])
    with pytest.raises(ValueError, match=r"`w` is too large for torch.float32 with these `weights`"):
        soup([{"w": torch.tensor([3e38])}, {"w": torch.tensor([-3e38])}], [2.0, -1.0])


@pytest.mark.parametrize(
    ("tensor", "cure"),
    [(torch.ones(2, 2, device="meta"), "load them first"), (torch.eye(2).to_sparse(), "to_dense")],
    ids=["meta", "sparse"],
)
@pytest.mark.parametrize(
    "merge",
    [soup, lambda models: WARP().merge(models[0], models), Average().combine, TIES().combine, SLERP().combine],
    ids=["soup", "WARP", "Average", "TIES", "SLERP"],
)
def test_tensors_without_values_or_laid_out_otherwise_are_refused_by_name(merge: Any, tensor: Any, cure: str) -> None:
    with pytest.raises(ValueError, match=rf"`w` .*{cure}"):
        merge([{"w": tensor}, {"w": tensor.clone()}])
