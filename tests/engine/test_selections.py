"""Which tensors are merged."""

import pytest
import torch
from torch import nn

from lightning_merge.selections import Selection, lora, without


def model() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.head = nn.Linear(2, 1)
            self.lora_a = nn.Parameter(torch.zeros(2))
            self.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
            self.body[0].bias.requires_grad = False

    return Model()


PARAMETERS = {
    "all": (
        Selection(),
        [
            "lora_a",
            "body.0.weight",
            "body.0.bias",
            "body.1.weight",
            "body.1.bias",
            "head.weight",
            "head.bias",
        ],
    ),
    "trainable": (
        Selection(trainable=True, exclude="body.1.*"),
        ["lora_a", "body.0.weight", "head.weight", "head.bias"],
    ),
    "a glob": (Selection(include=["*.bias"]), ["body.0.bias", "body.1.bias", "head.bias"]),
    "a string is one pattern": (Selection(include="head.*"), ["head.weight", "head.bias"]),
    "two globs": (Selection(include=("head.*", "lora*")), ["lora_a", "head.weight", "head.bias"]),
    "exclude wins": (Selection(include=["head.*"], exclude=["*.bias"]), ["head.weight"]),
    "adapters": (lora(), ["lora_a"]),
    "without": (without("body.*", "lora_a"), ["head.weight", "head.bias"]),
}


@pytest.mark.parametrize(("selection", "names"), PARAMETERS.values(), ids=list(PARAMETERS))
def test_selection_takes_the_floating_point_parameters_that_match(selection, names):
    module = model()
    chosen = selection.parameters(module)
    assert list(chosen) == names
    assert all(chosen[name] is module.get_parameter(name) for name in names)


STATISTICS = ["body.1.running_mean", "body.1.running_var"]
COUNT = "body.1.num_batches_tracked"
BUFFERS = {
    "average": (STATISTICS, [COUNT]),
    "copy": ([], [*STATISTICS, COUNT]),
    "recompute": ([], [*STATISTICS, COUNT]),
}


@pytest.mark.parametrize(("policy", "averaged", "copied"), [(p, *b) for p, b in BUFFERS.items()], ids=list(BUFFERS))
def test_every_buffer_is_averaged_or_copied_and_integers_are_copied(policy, averaged, copied):
    selection = Selection(buffers=policy)
    assert list(selection.averaged_buffers(model())) == averaged
    assert list(selection.copied_buffers(model())) == copied


def test_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="`buffers` must be 'average', 'copy' or 'recompute', got 'keep'"):
        Selection(buffers="keep")


def test_selection_of_nothing_is_an_error_that_shows_names():
    with pytest.raises(ValueError, match=r"include=\('heads\.\*',\).* no parameter of Model.*first.*lora_a"):
        Selection(include=["heads.*"]).parameters(model())


def test_lists_from_yaml_and_tuples_make_equal_selections():
    assert Selection(include=["a"], exclude=["b"]) == Selection(include=("a",), exclude=("b",))
    assert hash(Selection(include=["a"])) == hash(Selection(include=("a",)))
