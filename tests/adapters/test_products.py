"""Adapters by their products: values beside LoraHub's case and the opposite of PEM, and what a rank leaves out."""

import math

import pytest
import torch

from lightning_merge.adapters import Adapter, combine_adapters, factored, negated, products
from lightning_merge.combiners import TIES, Average, Sum, add_vector, negate

CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "tiny"}


def tensors(**values):
    return {name.replace("__", "."): torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


ONE = tensors(q__lora_A__weight=[[1.0, 2.0]], q__lora_B__weight=[[1.0], [0.0]])
TWO = tensors(q__lora_A__weight=[[0.0, 1.0]], q__lora_B__weight=[[1.0], [2.0]])


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def random_adapter(seed, rank=2, **config):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {
        "base.q.lora_A.weight": draw(rank, 5),
        "base.q.lora_B.weight": draw(4, rank),
        "base.conv.lora_A.weight": draw(rank, 3, 3, 3),
        "base.conv.lora_B.weight": draw(6, rank, 1, 1),
    }
    return Adapter(weights, {**CONFIG, "r": rank, "lora_alpha": 2 * rank, **config}, f"adapter {seed}")


def test_a_combiner_adds_products_where_sums_of_factors_have_cross_terms():
    vectors = [products(ONE, 0.5), products(TWO, -1.0)]
    close(Sum(1.0).combine(vectors)["q.weight"], [[0.5, 0.0], [0.0, -2.0]])  # of factors: [[-0.25, 0], [-1, 0]]


@pytest.mark.parametrize("name", ["q.lora_A.default.weight", "q.lora_down.weight", "q.lora_embedding_A"])
def test_a_product_has_the_name_of_its_weight(name):
    partner = name.replace("_A", "_B").replace("down", "up")
    (found,) = products({name: torch.ones(1, 2), partner: torch.ones(3, 1), "q.bias": torch.ones(3)}).items()
    assert found[0] == "q.weight"
    assert found[1].shape == (3, 2)


def test_factors_of_the_rank_are_exact_and_of_a_lower_one_the_nearest():
    adapter = random_adapter(0, rank=3)
    vector = adapter.vector()
    again, lost = factored(vector, adapter.weights)
    assert lost < 1e-12
    for name, each in products(again).items():
        close(each, vector[name])
    lower, lost = factored(vector, adapter.weights, rank=1, scale=4.0)
    off = size = 0.0
    for name, each in products(lower, 4.0).items():
        u, s, v = torch.linalg.svd(vector[name].flatten(1), full_matrices=False)
        close(each.flatten(1), s[0] * torch.outer(u[:, 0], v[0]))
        off, size = off + float((each - vector[name]).square().sum()), size + float(vector[name].square().sum())
    assert lost == pytest.approx(math.sqrt(off / size), abs=1e-9)
    wide, lost = factored(vector, adapter.weights, rank=9)
    assert lost < 1e-12
    assert {len(wide[f"base.{layer}.lora_A.weight"]) for layer in ("q", "conv")} == {9}
    close(products(wide)["base.q.weight"], vector["base.q.weight"])


@pytest.mark.parametrize("combiner", [Average(), Sum(0.4), TIES(density=0.5)])
def test_combined_adapters_have_the_products_that_the_combiner_makes(combiner):
    several = [random_adapter(seed) for seed in range(3)]
    expected = combiner.combine([each.vector() for each in several])
    merged, lost = combine_adapters(combiner, several, rank=6)
    assert lost < 1e-12
    assert (merged.config["r"], merged.config["lora_alpha"], merged.scale) == (6, 6, 1.0)
    for name, each in merged.vector().items():
        close(each, expected[name])
    low, lost = combine_adapters(combiner, several)
    assert low.rank == 2
    off = sum(float((each - expected[name]).square().sum()) for name, each in low.vector().items())
    assert lost == pytest.approx(
        math.sqrt(off / sum(float(each.square().sum()) for each in expected.values())), abs=1e-9
    )
    assert lost > 0.05


def test_one_adapter_alone_and_equal_ones_are_themselves():
    adapter = random_adapter(0, use_rslora=True)
    assert adapter.scale == pytest.approx(4 / math.sqrt(2))
    merged, lost = combine_adapters(Average(), [adapter] * 3)
    assert lost < 1e-12
    for name, each in merged.vector().items():
        close(each, adapter.vector()[name])


def test_the_opposite_of_lora_changes_one_factor_and_that_of_ia3_is_two_minus_it():
    opposite = negated(ONE)
    assert torch.equal(opposite["q.lora_A.weight"], ONE["q.lora_A.weight"])
    close(products(opposite)["q.weight"], negate(products(ONE))["q.weight"])
    scaling = {"k.ia3_l": torch.tensor([[1.25], [0.5]], dtype=torch.float64)}
    close(negated(scaling)["k.ia3_l"], [[0.75], [1.5]])
    adapter = Adapter({"k.ia3_l": torch.tensor([[1.25], [0.5]])}, {"peft_type": "IA3"})
    ones = {"k.ia3_l": torch.ones(2, 1)}
    for scale in (1.0, 0.5):
        expected = add_vector(ones, negate(adapter.vector(), scale))["k.ia3_l"]
        torch.testing.assert_close(negated(adapter.weights, scale)["k.ia3_l"], expected)


def test_scalings_of_ia3_are_merged_as_what_they_add_to_one():
    def adapter(value):
        return Adapter({"k.ia3_l": torch.tensor([[value]])}, {"peft_type": "IA3"})

    merged, lost = combine_adapters(Sum(1.0), [adapter(1.5), adapter(0.75)])
    assert (merged.weights["k.ia3_l"].item(), lost) == (1.25, 0.0)


def other(**config):
    return random_adapter(1, **config)


@pytest.mark.parametrize(
    ("second", "part"),
    [
        (lambda: other(rank=3), "its rank is 3, not 2; name the rank"),
        (lambda: other(base_model_name_or_path="large"), "its base is large, not tiny"),
        (lambda: Adapter({"k.ia3_l": torch.ones(1)}, {"peft_type": "IA3"}), "it is of kind IA3, not LORA"),
        (lambda: Adapter(ONE, {**CONFIG, "r": 2}), "it is of other layers"),
        (
            lambda: Adapter({**other().weights, "head.weight": torch.ones(1)}, other().config),
            "beside the layers differs",
        ),
    ],
)
def test_what_cannot_be_merged_is_named(second, part):
    with pytest.raises(ValueError, match=part):
        combine_adapters(Average(), [random_adapter(0), second()])


def test_a_head_that_was_trained_beside_has_to_be_the_same():
    def adapter(value):
        return Adapter({**ONE, "head.weight": torch.tensor([value])}, CONFIG)

    assert combine_adapters(Average(), [adapter(1.0), adapter(1.0)])[0].weights["head.weight"].item() == 1.0
    with pytest.raises(ValueError, match=r"`head.weight`, which was trained beside the layers, differs"):
        combine_adapters(Average(), [adapter(1.0), adapter(2.0)])
    with pytest.raises(ValueError, match=r"`head.weight` is neither a factor of LoRA"):
        negated(adapter(1.0).weights)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"use_dora": True}, "has `use_dora`"),
        ({"rank_pattern": {"q": 4}}, "has `rank_pattern`"),
        ({"alpha_pattern": {"q": 4}}, "has `alpha_pattern`"),
        ({"init_lora_weights": "pissa_niter_4"}, "has `init_lora_weights` pissa"),
        ({"peft_type": "PREFIX_TUNING"}, "of kind PREFIX_TUNING"),
    ],
)
def test_settings_under_which_products_are_not_all_are_named(config, part):
    with pytest.raises(ValueError, match=part):
        Adapter(ONE, {**CONFIG, **config})


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: products({"w": torch.ones(1)}), "must hold factors"),
        (
            lambda: products({**ONE, "q.lora_A.b.weight": torch.ones(1, 2), "q.lora_B.b.weight": torch.ones(2, 1)}),
            "twice",
        ),
        (lambda: products({**ONE, "q.lora_magnitude_vector": torch.ones(2)}), "is a magnitude of DoRA"),
        (lambda: products({**ONE, "q.lora_B.weight": torch.ones(2, 3)}), "are no factors"),
        (lambda: products({**ONE, "q.lora_B.weight": torch.full((2, 1), math.nan)}), "holds a NaN"),
        (lambda: factored({"k.weight": torch.ones(2, 2)}, ONE), "`k.weight` is in one of them only"),
        (lambda: factored({"q.weight": torch.ones(3, 2)}, ONE), r"is \(3, 2\), not \(2, 2\)"),
        (lambda: factored(products(ONE), ONE, rank=0), "`rank` must be"),
        (lambda: factored(products(ONE), ONE, scale=0.0), "`scale` must not be 0"),
        (lambda: Adapter(ONE, {**CONFIG, "r": 2}).vector(), "has rank 1, and its settings say 2"),
        (lambda: combine_adapters(Average(), []), "must be at least one adapter"),
    ],
)
def test_mistakes_are_named(call, part):
    with pytest.raises(ValueError, match=part):
        call()
