"""Logs belong to weights as well as to batches; half precision loses nothing; what a module cannot do is named."""

import pytest
import torch
from test_objectives import INPUTS, VECTORS, found, objective
from torch import nn

from lightning_merge.search import Adam, CrossEntropy, Entropy, concrete_mask, search


def score(kind=Entropy, **change):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    given = {
        "module": module,
        "base": {name: tensor.detach().clone() for name, tensor in module.state_dict().items()},
        "vectors": [{"weight": torch.tensor(each["0.weight"])} for each in VECTORS[:2]],
        "data": [[torch.tensor(INPUTS[0])]],
        "heads": [{"bias": torch.ones(2)}],
    }
    return kind(**(given | change))


OTHERS = {
    "base": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)},
    "vectors": [{"weight": torch.ones(2, 3)}] * 2,
    "heads": [{"bias": torch.zeros(2)}],
    "data": [[torch.ones(1, 3)]],
}


@pytest.mark.parametrize("changed", OTHERS)
def test_a_log_of_other_weights_or_batches_is_refused(changed, tmp_path):
    found(score(), log=tmp_path / "log")
    concrete_mask(score(), [0.3, 0.3], 2, log=tmp_path / "mask.pt")
    assert all(each.from_log for each in found(score(), log=tmp_path / "log").history)
    other = score(**{changed: OTHERS[changed]})
    with pytest.raises(ValueError, match="log of another search: `subject`"):
        found(other, log=tmp_path / "log")
    with pytest.raises(ValueError, match="log of another mask: `subject`"):
        concrete_mask(other, [0.3, 0.3], 2, log=tmp_path / "mask.pt")


def test_what_no_base_holds_of_the_module_is_a_part_of_the_subject():
    module = nn.Linear(3, 2)
    base, data = {"weight": torch.zeros(2, 3)}, [[torch.ones(1, 3)]]
    first = Entropy(module, base, [base], data).subject
    with torch.no_grad():
        module.bias += 1
    assert Entropy(module, base, [base], data).subject != first


@pytest.mark.parametrize("steps", [1, 3])
def test_a_mask_of_other_steps_is_refused(steps, tmp_path):
    concrete_mask(objective(), [0.3, 0.3], 2, log=tmp_path / "mask.pt")
    with pytest.raises(ValueError, match="`steps` is 2 there"):
        concrete_mask(objective(), [0.3, 0.3], steps, log=tmp_path / "mask.pt")


@pytest.mark.parametrize("lacking", ["step", "logits", "outer", "inner"])
def test_a_log_of_a_mask_that_lacks_something_is_refused(lacking, tmp_path):
    concrete_mask(objective(), [0.3, 0.3], 2, log=tmp_path / "mask.pt")
    state = torch.load(tmp_path / "mask.pt", weights_only=True)
    del state[lacking]
    torch.save(state, tmp_path / "mask.pt")
    with pytest.raises(ValueError, match=f"lacks '{lacking}'"):
        concrete_mask(objective(), [0.3, 0.3], 2, log=tmp_path / "mask.pt")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_vectors_in_half_precision_add_up_and_learn_as_wide_ones(half):
    vectors = [{"weight": (1e-3 * torch.tensor(each["0.weight"])).to(half)} for each in VECTORS[:2]]
    wide = [{name: tensor.float() for name, tensor in each.items()} for each in vectors]
    narrow, exact, at = score(vectors=vectors), score(vectors=wide), (0.123, 0.456)
    assert narrow.measure(at, 0) == exact.measure(at, 0)
    assert torch.equal(narrow.weights(at)["weight"], exact.weights(at)["weight"])
    masks = [concrete_mask(each, at, 5, inner_rate=0.1) for each in (narrow, exact)]
    assert torch.equal(masks[0]["weight"], masks[1]["weight"])


def test_masks_of_a_low_temperature_are_finite():
    told = []
    data = [[torch.ones(1, 3)]]
    vectors = [{"weight": torch.ones(2, 3), "bias": torch.ones(2)}]
    tiny = score(vectors=vectors, heads=(), data=data)
    mask = concrete_mask(tiny, [0.3], 30, temperature=1e-3, on_step=lambda step, loss: told.append(loss))
    assert len(told) == 30
    for tensor in mask.values():
        assert float(tensor.mean()) == pytest.approx(1)


class Odd(nn.Linear):
    """Does with its outputs what it is told to."""

    def __init__(self, how):
        super().__init__(3, 2)
        self.how = how

    def forward(self, inputs):
        return self.how(super().forward(inputs))


def without_gradient(outputs):
    return outputs.detach()


LABELLED = [[(torch.ones(2, 3), torch.tensor([0, 1]))]]


def labels(values):
    return {"data": [[(torch.ones(2, 3), torch.tensor(values))]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [{"bia": torch.ones(2)}]}, "`heads` must be of the module, which has no 'bia'"),
        ({"base": {**OTHERS["base"], "ema.bias": torch.ones(2)}}, "`base` must be of the module, which has no 'ema"),
        ({"module": Odd(without_gradient)}, "`module` must give outputs with a gradient"),
        (
            {"data": [[(torch.ones(2, 4), torch.tensor([0, 1]))]]},
            r"no loss on `data` of task 0 \(float32 of shape \(2, 4",
        ),
        ({"data": [[(torch.ones(2, 3).half(), torch.tensor([0, 1]))]]}, "weights of float32, has no loss on"),
        (labels([0, 7]), "no loss on `data` of task 0 .*out of bounds"),
        (labels([[0], [1]]), "no loss on `data` of task 0"),
        (labels([0, 1, 1]), "no loss on `data` of task 0"),
    ],
)
def test_what_does_not_go_together_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        found(score(**{"kind": CrossEntropy, "data": LABELLED, **change}))


def test_complex_numbers_are_named():
    module = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="`weight` of task 0 holds complex numbers"):
        Entropy(module, module.state_dict(), [module.state_dict()], [[torch.ones(1, 3)]])


def test_labels_are_whole_numbers_of_any_width():
    first, second = (
        score(CrossEntropy, data=[[(torch.ones(2, 3), torch.tensor([0, 1], dtype=kind))]]).measure((0.3, 0.3), 0)
        for kind in (torch.int64, torch.int32)
    )
    assert first == second


def test_a_search_under_inference_mode_has_gradients():
    expected = found(score()).coefficients
    with torch.inference_mode():
        assert found(score()).coefficients == expected != (0.3, 0.3)


@pytest.mark.parametrize(
    ("content", "message"), [('{"search": 3}\n', "is not the log of a search"), (None, "must be a file")]
)
def test_what_is_no_log_is_refused(content, message, tmp_path):
    path = tmp_path / "log"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        search(lambda a: 1.0, 1, Adam(), budget=1, log=path)
