"""Coefficients by a gradient: AdaMerging and aTLAS agree with their official code, resume, and refuse by name.

AdaMerging: cea1165 of its repository, its entropy on the linear features below, in float64 with torch's Adam. aTLAS:
557d7fb of its repository, the blockwise composition.
"""

import math

import pytest
import torch
from torch import nn

from lightning_merge.search import Adam, CrossEntropy, Entropy, Free, Measured, Objective, by_tensor, search

BASE = {"0.weight": [[0.3, -0.1, 0.2], [0.5, -0.4, 0.1]], "0.bias": [0.05, -0.05]}
VECTORS = [
    {"0.weight": [[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], "0.bias": [0.2, -0.4]},
    {"0.weight": [[-0.5, -1.0, 2.0], [1.5, 1.0, -2.0]], "0.bias": [0.1, 0.6]},
    {"0.weight": [[2.0, 1.0, -0.5], [-0.5, -1.0, 0.5]], "0.bias": [-0.9, 0.3]},
]
INPUTS = [[[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]], [[0.15, 0.4, -0.5], [0.5, -0.25, 0.1]]]
HEADS = [[[1.0, 0.2], [-0.5, 0.7], [0.1, -1.0]], [[0.3, -0.4], [0.8, 0.5], [-0.2, 0.9]]]
CLAMPED = Free(0.0, 1.0)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def named(weights):
    return {name: double(values) for name, values in weights.items()}


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, bias=False)).double()


def objective(kind=Entropy, per="model", vectors=2, data=None, heads=True, module=None, limit=64):
    given = [[double(batch)] for batch in INPUTS] if data is None else data
    return kind(
        module or network(),
        {**named(BASE), "1.weight": double(HEADS[0])},
        [named(each) for each in VECTORS[:vectors]],
        given,
        heads=[{"1.weight": double(head)} for head in HEADS] if heads else (),
        per=per,
        limit=limit,
    )


def found(score, per="model", budget=4, **options):
    given = {"space": CLAMPED, "mode": "min", "per": per, "tensors": score.tensors, **options}
    return search(score, 2, given.pop("method", Adam()), budget=budget, **given)


@pytest.mark.parametrize(
    ("per", "losses", "coefficients"),
    [
        (
            "model",
            [1.5076723265452123, 1.5052966976242401, 1.502927768599719],
            [0.30299975920905065, 0.30299971244827273],
        ),
        (
            "tensor",
            [1.5076723265452123, 1.505082671703366, 1.5025009864726933],
            [0.3029997288417324, 0.29700027624230524, 0.30299965990749966, 0.302999876634951],
        ),
    ],
)
def test_adamerging_is_the_official_code_step_by_step(per, losses, coefficients):
    result = found(objective(per=per), per)
    assert [each.score for each in result.history[:3]] == pytest.approx(losses, abs=1e-9)
    assert result.coefficients == pytest.approx(coefficients, abs=1e-9)


@pytest.mark.parametrize(
    ("per", "gradient"),
    [
        ("model", [-1.0814841914214, -1.2974127369833417]),
        ("tensor", [-1.1888071693362785, 0.10732297791487848, -1.1210785160414596, -0.1763342209418821]),
    ],
)
def test_gradients_are_those_of_the_official_code(per, gradient):
    assert objective(per=per).measure((0.3,) * len(gradient), 0).gradient == pytest.approx(gradient, abs=1e-9)


def test_atlas_composes_every_tensor_and_biases_too():
    score = objective(per="tensor", vectors=3)
    coefficients = (0.5, 0.1, -0.2, 0.4, 0.1, 0.0)
    assert by_tensor(coefficients, score.tensors, "tensor") == {"0.weight": (0.5, -0.2, 0.1), "0.bias": (0.1, 0.4, 0.0)}
    weights = score.weights(coefficients)
    torch.testing.assert_close(
        weights["0.weight"],
        double([[1.1, -0.8, 0.0], [0.15, 0.8, 0.05]]),  # the official blockwise form
        atol=1e-9,
        rtol=0,
    )
    torch.testing.assert_close(weights["0.bias"], double([0.05 + 0.06, -0.05 + 0.2]))  # official: 0.05, -0.05


def test_atlas_starts_at_the_base_and_lowers_the_loss_of_few_examples():
    labels = torch.tensor([0, 2])
    score = objective(CrossEntropy, "tensor", data=[[(double(INPUTS[0]), labels)]], heads=False)
    result = found(score, "tensor", 40, method=Adam(0.1, start=0.0), space=Free(-10.0, 10.0))
    logits = (
        nn.functional.linear(double(INPUTS[0]), double(BASE["0.weight"]), double(BASE["0.bias"])) @ double(HEADS[0]).T
    )
    assert result.history[0].score == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-12)
    assert result.score < 0.6 * result.history[0].score


@pytest.mark.parametrize("kind", [Entropy, CrossEntropy])
def test_gradients_are_differences_of_the_score(kind):
    data = [[(double(INPUTS[0]), torch.tensor([0, 1]))], [(double(INPUTS[1]), torch.tensor([2, 1]))]]
    score, at, small = objective(kind, "tensor", data=data), (0.3, -0.2, 0.5, 0.1), 1e-6
    for index, slope in enumerate(score.measure(at, 0).gradient):
        moved = [score.measure(tuple(a + s * small * (i == index) for i, a in enumerate(at)), 0).value for s in (1, -1)]
        assert slope == pytest.approx((moved[0] - moved[1]) / (2 * small), abs=1e-8)


class Moving(Objective):
    """The squared distance to a point beyond the bound, and later to one within."""

    subject = "moving"

    def measure(self, coefficients, number):
        far = coefficients[0] - (2.0 if number < 60 else 0.5)
        return Measured(far**2, (2 * far,))


def test_a_coefficient_at_its_bound_comes_back():
    """A clamp in the forward pass, as the official one, has no gradient beyond the bound: it would stay there."""
    result = search(Moving(), 1, Adam(0.05), space=CLAMPED, mode="min", budget=400)
    assert [each.coefficients for each in result.history[40:60]] == [(1.0,)] * 20
    assert result.coefficients[0] == pytest.approx(0.5, abs=0.05)


def test_each_evaluation_has_the_next_batch_and_a_continued_search_too(tmp_path):
    torch.manual_seed(0)
    batches = [[torch.randn(4, 3, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    score = objective(data=batches)
    assert score.measure((0.3, 0.3), 0) != score.measure((0.3, 0.3), 1)
    assert score.measure((0.3, 0.3), 1) == score.measure((0.3, 0.3), 4)
    whole = found(score, budget=9)
    found(objective(data=batches), budget=4, log=tmp_path / "log")
    again = found(objective(data=batches), budget=9, log=tmp_path / "log")
    assert [each.from_log for each in again.history] == [True] * 4 + [False] * 5
    assert (again.coefficients, again.score) == (whole.coefficients, whole.score)
    batches[0][0] = batches[0][0] + 1
    with pytest.raises(ValueError, match="log of another search: `subject`"):
        found(objective(data=batches), budget=9, log=tmp_path / "log")


def test_a_module_is_left_as_it_was_and_ties_count_once():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.5), nn.Linear(3, 3, bias=False)).double()
    module[2].weight = module[0].weight
    before = module[0].weight.detach().clone()
    base = {name: torch.eye(3, dtype=torch.float64) for name in ("0.weight", "2.weight")}
    vector = {name: double(INPUTS[0] + [[0.1, 0.2, 0.3]]) for name in base}
    score = Entropy(module, base, [vector], [[double(INPUTS[0])]], per="tensor")
    assert score.tensors == ("0.weight",)
    small = 1e-6
    slope = (score.measure((0.5 + small,), 0).value - score.measure((0.5 - small,), 0).value) / (2 * small)
    assert score.measure((0.5,), 0).gradient == pytest.approx((slope,), abs=1e-8)
    weights = score.weights((0.5,))
    assert weights["0.weight"] is weights["2.weight"]
    assert torch.equal(module[0].weight, before)
    assert all(each.training for each in module.modules())
    assert module[0].weight.grad is None


def test_statistics_of_batch_norm_are_the_mean_and_counters_the_bases():
    module = nn.BatchNorm1d(2).double()
    base = module.state_dict()
    tasks = [{name: torch.full_like(tensor, n) for name, tensor in base.items() if tensor.dim()} for n in (1.0, 2.0)]
    score = Entropy(module, base, tasks, [[torch.randn(5, 2, dtype=torch.float64)]])
    assert score.tensors == ("weight", "bias")
    weights = score.weights((1.0, 0.0))
    assert weights["running_var"].tolist() == [2.5, 2.5]
    assert weights["weight"].tolist() == [2.0, 2.0]
    assert weights["num_batches_tracked"] == 0


WEIGHTS = named(VECTORS[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": [[torch.tensor([0, 2, 1])], [double(INPUTS[1])]]}, ValueError, "which are labels, not inputs"),
        ({"data": [[], [double(INPUTS[1])]]}, ValueError, "`data` of task 0 must yield at least one batch"),
        ({"data": [["text"], [double(INPUTS[1])]]}, TypeError, "`data` of task 0 must yield tensors"),
        ({"data": [[double(INPUTS[0])]]}, ValueError, "`heads` must be one for each of the 1 sets"),
        ({"vectors": []}, ValueError, "at least one task vector"),
        (
            {"vectors": [WEIGHTS, {**WEIGHTS, "1.weight": torch.zeros(5, 2)}]},
            ValueError,
            "as their heads, are not merged",
        ),
        ({"vectors": [{**WEIGHTS, "1.weight": torch.zeros(5, 2)}] * 2}, ValueError, "as their heads, are not merged"),
        ({"vectors": [{"0.bias": torch.full((2,), math.nan)}] * 2}, ValueError, "`0.bias` of task 0 is not finite"),
        ({"vectors": [{"0.bias": torch.zeros(2, dtype=torch.int8)}] * 2}, ValueError, "int8, of which there are no"),
        ({"vectors": [{"0.bias": torch.zeros(2).to(torch.float8_e5m2)}] * 2}, ValueError, "whose scale is in another"),
        ({"limit": 0}, ValueError, "`limit` must be at least 1"),
        ({"per": "layer"}, ValueError, "`per` must be 'model', 'tensor' or 'group'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = {
        "module": network(),
        "base": {**named(BASE), "1.weight": double(HEADS[0])},
        "vectors": [WEIGHTS, WEIGHTS],
        "data": [[double(batch)] for batch in INPUTS],
        "heads": [{"1.weight": double(head)} for head in HEADS],
    }
    with pytest.raises(error, match=message):
        Entropy(**(given | change))


def test_factors_of_adapters_are_refused():
    names = ("lora_A.weight", "lora_B.weight")
    module = nn.Module()
    for name in names:
        part = nn.Module()
        part.weight = nn.Parameter(torch.zeros(2, 2))
        module.add_module(name.partition(".")[0], part)
    factors = dict.fromkeys(names, torch.ones(2, 2))
    with pytest.raises(ValueError, match="factors of a LoRA layer"):
        Entropy(module, dict.fromkeys(names, torch.zeros(2, 2)), [factors], [[torch.ones(2, 2)]])


def test_a_search_that_stands_still_goes_on_from_its_log(tmp_path):
    """All coefficients at their bounds: the same candidate, on other batches, several times in the log."""
    given = {"method": Adam(0.05), "space": CLAMPED, "mode": "min"}
    whole = search(Moving(), 1, budget=90, **given)
    search(Moving(), 1, budget=50, log=tmp_path / "log", **given)
    again = search(Moving(), 1, budget=90, log=tmp_path / "log", **given)
    assert [(each.coefficients, each.score) for each in again.history] == [
        (each.coefficients, each.score) for each in whole.history
    ]
    assert [each.from_log for each in again.history] == [True] * 50 + [False] * 40


def test_a_score_without_gradient_is_refused_by_adam():
    with pytest.raises(ValueError, match="`score` must give its gradient to Adam"):
        search(lambda a: 1.0, 2, Adam(), budget=3)
