"""LoRA adapters are added up as products; the published sum of factors (df73afe of its repository) is another form."""

import math

import pytest
import torch

from lightning_merge.search import CMAES, Free, compose_adapters, penalty, search

ONE = {"A": [[1.0, 2.0]], "B": [[1.0], [0.0]]}
TWO = {"A": [[0.0, 1.0]], "B": [[1.0], [2.0]]}


def adapter(factors, **more):
    named = {f"layer.lora_{key}.weight": torch.tensor(value, dtype=torch.float64) for key, value in factors.items()}
    return {**named, **more}


def product(weights):
    a, b = weights["layer.lora_A.weight"], weights["layer.lora_B.weight"]
    return b.flatten(1) @ a.flatten(1)


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_published_form_adds_the_factors():
    merged = compose_adapters([adapter(ONE), adapter(TWO)], [0.5, -1.0], "factors")
    close(merged["layer.lora_A.weight"], [[0.5, 0.0]])
    close(merged["layer.lora_B.weight"], [[-0.5], [-2.0]])
    close(product(merged), [[-0.25, 0.0], [-1.0, 0.0]])


@pytest.mark.parametrize("rank", [None, 2, 5])
def test_products_are_added_exactly(rank):
    merged = compose_adapters([adapter(ONE), adapter(TWO)], [0.5, -1.0], rank=rank)
    assert merged["layer.lora_A.weight"].shape == (2, 2)
    close(product(merged), [[0.5, 0.0], [0.0, -2.0]])


def test_a_lower_rank_keeps_the_largest_singular_values():
    torch.manual_seed(0)
    many = [adapter({"A": torch.randn(2, 3, 3, 3).tolist(), "B": torch.randn(6, 2, 1, 1).tolist()}) for _ in range(3)]
    exact = compose_adapters(many, [0.5, -1.0, 0.2])
    assert exact["layer.lora_A.weight"].shape == (6, 3, 3, 3)
    merged = compose_adapters(many, [0.5, -1.0, 0.2], rank=2)
    assert merged["layer.lora_A.weight"].shape == (2, 3, 3, 3)
    assert merged["layer.lora_B.weight"].shape == (6, 2, 1, 1)
    u, s, v = torch.linalg.svd(product(exact), full_matrices=False)
    close(product(merged), u[:, :2] * s[:2] @ v[:2])


def test_one_adapter_alone_is_itself():
    for form in ("products", "factors"):
        close(product(compose_adapters([adapter(ONE), adapter(TWO)], [1.0, 0.0], form)), product(adapter(ONE)))


def test_coefficients_are_found_by_evolution_with_the_published_penalty():
    assert penalty([0.5, -1.0]) == pytest.approx(0.0375, abs=1e-12)
    wanted = torch.tensor([[0.8, 1.4], [-0.6, -0.8]], dtype=torch.float64)  # 0.8 of one, -0.3 of two, nearly

    def score(a):
        return float((product(compose_adapters([adapter(ONE), adapter(TWO)], a)) - wanted).square().sum()) + penalty(a)

    space = Free(-1.5, 1.5)
    found = search(score, 2, CMAES(start=0.0), space=space, mode="min", budget=200)
    assert found.history[0].score != found.score
    grid = min(score((0.8 + i / 200, -0.3 + j / 200)) for i in range(-40, 40, 2) for j in range(-40, 40, 2))
    assert found.score <= grid + 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": []}, "at least one adapter"),
        ({"coefficients": [1.0]}, "`coefficients` must be 2 numbers, got 1"),
        ({"form": "sum"}, "`form` must be 'products' or 'factors'"),
        ({"form": "factors", "rank": 1}, "`rank` must be left out"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"adapters": [{"w": torch.ones(2)}] * 2}, "must hold factors of LoRA layers"),
        ({"adapters": [adapter(ONE), adapter({**TWO, "A": [[1.0]]})]}, "adapter 2 of `adapters` is another one"),
        ({"adapters": [adapter(ONE, b=torch.ones(1)), adapter(TWO, b=torch.zeros(1))]}, "`b` is no factor"),
        (
            {"adapters": [adapter(ONE), adapter({**TWO, "A": [[math.nan, 0.0]]})]},
            "of adapter 2 of `adapters` holds a NaN",
        ),
        ({"adapters": [adapter(ONE, q=torch.ones(1).to(torch.float8_e5m2))] * 2, "rank": 1}, ""),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"adapters": [adapter(ONE), adapter(TWO)], "coefficients": [0.5, 0.5]} | change
    if not message:  # what is the same in all goes along
        assert compose_adapters(**given)["q"].dtype == torch.float8_e5m2
        return
    with pytest.raises(ValueError, match=message):
        compose_adapters(**given)


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 6), (6, 2), (2, 2), (6, 6)])
def test_layers_narrower_than_their_rank_keep_their_shapes(inputs, outputs):
    torch.manual_seed(0)
    shapes = {"lora_A.weight": (4, inputs), "lora_B.weight": (outputs, 4)}
    adapters = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    exact = compose_adapters(adapters, [0.5, 0.3])
    for rank in (4, "same"):
        merged = compose_adapters(adapters, [0.5, 0.3], rank=rank)
        assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == shapes
        if min(inputs, outputs) <= 4:
            torch.testing.assert_close(
                merged["lora_B.weight"] @ merged["lora_A.weight"], exact["lora_B.weight"] @ exact["lora_A.weight"]
            )


def test_each_layer_keeps_a_rank_of_its_own():
    ranks = {"one": 1, "two": 3}
    one = {f"{n}.lora_A.weight": torch.ones(r, 5) for n, r in ranks.items()}
    one |= {f"{n}.lora_B.weight": torch.ones(5, r) for n, r in ranks.items()}
    merged = compose_adapters([one, one], [0.5, 0.3], rank="same")
    assert all(merged[name].shape == tensor.shape for name, tensor in one.items())


def test_quantised_factors_are_refused():
    one = {"lora_A.weight": torch.ones(2, 3, dtype=torch.int8), "lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=r"`lora_A.weight` of adapter 1 of `adapters` holds int8"):
        compose_adapters([one, one], [0.5, 0.3])
