"""The named tensors of a module, and what merging does to them."""

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_merge.weights import (
    Inventory,
    average_dtype,
    canonical,
    clone,
    compensated_lerp_,
    copies,
    copy_,
    exchange,
    first_mismatch,
    in_large_pages,
    is_averaged,
    is_metric,
    lerp_,
    like,
    named_buffers,
    named_parameters,
    named_tensors,
    nonfinite,
    state_dict_names,
    to_devices,
    zeros,
)


class Model(nn.Module):
    """Tied weights, a shared layer, buffers of every kind, metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.again = self.encoder
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.accuracy = torchmetrics.Accuracy("binary")
        self.metrics = torchmetrics.MetricCollection([torchmetrics.MeanMetric()])
        self.accuracy.persistent(True)
        self.accuracy.network = nn.BatchNorm1d(1)  # as image metrics have


def test_tied_tensors_have_one_name():
    assert list(named_parameters(Model())) == ["encoder.weight", "encoder.bias", "norm.weight", "norm.bias"]


def test_tensors_that_only_share_storage_have_one_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight.data = model["a"].weight.data
    assert list(named_parameters(model)) == ["a.weight"]


def test_empty_tensors_are_not_tied_to_each_other():
    model = nn.ParameterList([nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))])
    assert list(named_parameters(model)) == ["0", "1"]


def test_buffers_that_are_not_saved_or_belong_to_metrics_have_no_name():
    assert list(named_buffers(Model())) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def test_every_saved_tensor_of_the_model_has_a_name():
    model = Model()
    names = state_dict_names(model)
    metric_states = {key for key in model.state_dict() if key.startswith(("accuracy.", "metrics."))}
    assert metric_states
    assert set(names) == set(model.state_dict()) - metric_states
    assert names["decoder.weight"] == names["again.weight"] == "encoder.weight"
    tensors = named_tensors(model)
    for key, name in names.items():
        assert model.state_dict()[key].data_ptr() == tensors[name].data_ptr()


def test_names_are_the_same_in_a_compiled_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    plain = named_tensors(model)
    model[1] = torch.compile(model[1])
    compiled = named_tensors(torch.compile(model))
    assert list(compiled) == list(plain)
    assert canonical("_orig_mod.net._fsdp_wrapped_module.0._checkpoint_wrapped_module.weight") == "net.0.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module.norm, "num_batches_tracked", torch.tensor(0)),  # equal, and another
        lambda module: module.norm._buffers.update(running_mean=torch.zeros(3)),
        lambda module: module.encoder._parameters.update(bias=None),
        lambda module: module.norm._modules.update(extra=nn.Linear(1, 1)),  # where there was none
        lambda module: module.norm._modules.update(extra=None),
        lambda module: module._modules.pop("again"),
    ],
)
def test_what_is_replaced_added_or_removed_is_seen_however_it_was_done(change):
    module = Model()
    inventory = Inventory(module)
    assert not inventory.refresh()
    change(module)
    assert inventory.refresh()
    assert not inventory.refresh()


def test_metrics_are_told_from_modules():
    class Own(torchmetrics.MeanMetric):
        """A user's metric."""

    assert is_metric(Own())
    assert is_metric(torchmetrics.MetricCollection([]))
    assert not is_metric(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("dtype", "averaged"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
        (torch.int64, None),
        (torch.bool, None),
    ],
    ids=str,
)
def test_averages_are_float32_or_wider_and_integers_are_none(dtype, averaged):
    tensor = torch.zeros(2, dtype=dtype)
    assert is_averaged(tensor) == (averaged is not None)
    assert average_dtype(tensor) == (averaged or dtype)
    assert clone({"w": tensor})["w"].dtype == zeros({"w": tensor})["w"].dtype == (averaged or dtype)
    assert copies({"w": tensor})["w"].dtype == dtype


@pytest.mark.parametrize("copied", [clone, copies])
def test_copies_share_no_memory_and_no_graph_and_keep_the_layout(copied):
    source = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    copy = copied({"w": source})["w"]
    assert copy.data_ptr() != source.data_ptr()
    assert not copy.requires_grad
    assert copy.stride() == source.stride()
    assert torch.equal(copy, source)


def test_copies_of_much_lie_side_by_side_and_are_tensors_of_their_own():
    large = {
        "dense": torch.randn(1024, 1024).requires_grad_(),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(7, dtype=torch.bfloat16),
        "transposed": torch.randn(3, 5).T,
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(4, 6)[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "double": torch.randn(2, dtype=torch.float64),
        "integer": torch.tensor([1, 2]),
        "none": torch.zeros(0),
    }
    for made in (clone(large), clone(large), zeros(large)):
        for name, tensor in made.items():
            assert tensor.dtype == average_dtype(large[name])
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # a file of one holds no other
            assert tensor.data_ptr() % 64 == 0
            assert tensor.stride() == torch.empty_like(large[name]).stride()
        assert len({tensor.data_ptr() for tensor in made.values() if tensor.numel()}) == len(large) - 1
    assert made.keys() == large.keys()
    assert not any(tensor.any() for tensor in made.values())
    assert all(torch.equal(tensor, large[name].to(tensor.dtype)) for name, tensor in clone(large).items())


def test_what_was_loaded_lies_side_by_side_as_what_was_copied_and_is_the_same_bit_for_bit():
    large = {
        "dense": torch.randn(1024, 1025).mul_(torch.tensor([float("nan"), -0.0, 1.0]).repeat(1025)[:1025]),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(7, dtype=torch.bfloat16),
        "double": torch.randn(2, dtype=torch.float64),
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(4, 6)[:, ::2],
    }
    state = {"averages": [large, {"small": torch.zeros(3)}], "updates": 3, "name": None}
    moved = in_large_pages(state)
    assert (moved["updates"], moved["name"]) == (3, None)
    assert moved["averages"][1]["small"] is state["averages"][1]["small"]  # not worth it
    there = moved["averages"][0]
    assert list(there) == list(large)
    for name, tensor in there.items():
        assert tensor.dtype == large[name].dtype
        assert tensor.stride() == large[name].stride()
        assert tensor.double().numpy().tobytes() == large[name].double().numpy().tobytes()
    close = ("dense", "channels", "scalar")
    assert {name for name in large if there[name] is not large[name]} == set(close)
    starts = [there[name].data_ptr() for name in close]
    assert starts[1] - starts[0] == 4 * (1024 * 1025 + -1024 * 1025 % 16)
    assert all(start % 64 == 0 for start in starts)
    again = in_large_pages(moved)
    assert all(again["averages"][0][name] is there[name] for name in large)  # an average in memory is not copied again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_lerp_is_done_in_the_precision_of_the_target(dtype):
    target = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    source = {"b": torch.tensor(1.0, dtype=dtype), "a": torch.tensor([1.0009765625, 4.0], dtype=dtype)}
    expected = {name: t.double() + 0.25 * (source[name].double() - t.double()) for name, t in target.items()}
    lerp_(target, source, 0.25)
    assert {name: t.double().tolist() for name, t in target.items()} == {
        name: t.tolist() for name, t in expected.items()
    }


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_lerp_by_1_copies_over_anything(bad):
    target, carried = {"w": torch.tensor([bad, 2.0])}, {"w": torch.tensor([bad, 1.0])}
    source = {"w": torch.tensor([0.1, 0.2])}
    lerp_(target, source, 1.0)
    assert torch.equal(target["w"], source["w"])
    target["w"].fill_(bad)
    compensated_lerp_(target, carried, source, 1.0)
    assert torch.equal(target["w"], source["w"])
    assert torch.equal(carried["w"], torch.zeros(2))


def test_compensated_lerp_loses_nothing_that_fits_the_compensation():
    target, carried = {"w": torch.tensor(1.0)}, {"w": torch.tensor(0.0)}
    for _ in range(1000):
        compensated_lerp_(target, carried, {"w": torch.tensor(2.0, dtype=torch.float64)}, 1e-8)
    value = target["w"].double() + carried["w"].double()
    assert value.item() - 1 == pytest.approx(1e-5, rel=1e-4)


def test_copy_goes_by_name_across_dtypes():
    target = {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float64)}
    copy_(target, {"b": torch.ones(3), "a": torch.full((2,), 2.0, dtype=torch.bfloat16), "c": torch.ones(1)})
    assert target["a"].tolist() == [2.0, 2.0]
    assert target["b"].tolist() == [1.0, 1.0, 1.0]


def test_like_converts_only_what_differs():
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}
    converted = like(tensors, {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2)})
    assert converted["a"].dtype == torch.bfloat16
    assert converted["b"] is tensors["b"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("numbers", [5, 100_000])
def test_nonfinite_names_the_offenders(bad, dtype, numbers):
    large = torch.ones(numbers, dtype=dtype)
    tensors = {"count": torch.tensor(1), "empty": torch.empty(0), "a": torch.ones(3), "b": large}
    assert nonfinite(tensors) == set()
    tensors["b"][3] = bad
    tensors["c"] = torch.tensor(torch.nan)
    assert nonfinite(tensors) == {"b", "c"}


@pytest.mark.parametrize("numbers", [4, 100_000])
def test_finite_numbers_whose_norm_overflows_are_finite(numbers):
    assert not nonfinite({"w": torch.full((numbers,), 3e38)})
    assert not nonfinite({"w": torch.full((numbers,), 60_000.0, dtype=torch.float16)})
    assert not nonfinite({})


def test_exchange_swaps_storage_and_keeps_the_objects():
    module = nn.Linear(2, 2)
    parameters, objects = named_parameters(module), list(module.parameters())
    live = {name: p.data_ptr() for name, p in parameters.items()}
    merged = clone(parameters)
    before = exchange(parameters, merged)
    assert {name: p.data_ptr() for name, p in parameters.items()} == {name: t.data_ptr() for name, t in merged.items()}
    assert {name: t.data_ptr() for name, t in before.items()} == live
    exchange(parameters, before)
    assert {name: p.data_ptr() for name, p in parameters.items()} == live
    assert all(now is then for now, then in zip(module.parameters(), objects, strict=True))


def test_interrupted_exchange_can_be_undone():
    parameters = named_parameters(nn.Linear(2, 2))
    live = {name: p.data_ptr() for name, p in parameters.items()}
    before: dict[str, Tensor] = {}
    with pytest.raises(KeyError):
        exchange(parameters, {"weight": torch.zeros(2, 2), "absent": torch.zeros(1)}, before)
    exchange(parameters, before)
    assert {name: p.data_ptr() for name, p in parameters.items()} == live


def test_state_moves_to_the_devices_of_its_names():
    meta = torch.device("meta")
    state = {"average": {"a": torch.zeros(1), "b": torch.zeros(1)}, "queue": [{"a": torch.zeros(1)}], "updates": 3}
    moved = to_devices(state, {"a": meta})
    assert moved["average"]["a"].device == meta
    assert moved["average"]["b"].device == torch.device("cpu")
    assert moved["queue"][0]["a"].device == meta
    assert moved["updates"] == 3
    assert to_devices(state, meta)["average"]["b"].device == meta


MISMATCHES = {
    "missing": ({"a": (2,)}, {}, r"`a` of shape \(2,\) is missing"),
    "another shape": ({"a": (2,)}, {"a": (3,)}, r"`a` has shape \(3,\) instead of \(2,\)"),
    "one too many": ({"a": (2,)}, {"a": (2,), "b": (1,)}, r"`b` of shape \(1,\) is not part of this model"),
    "the first of two": ({"a": (2,), "b": (2,)}, {"b": (1,), "a": (1,)}, "`a` has shape"),
}


@pytest.mark.parametrize(("expected", "found", "message"), MISMATCHES.values(), ids=list(MISMATCHES))
def test_first_mismatch_names_the_tensor_and_the_shapes(expected, found, message):
    found = {name: torch.zeros(shape) for name, shape in found.items()}
    text = first_mismatch({name: torch.zeros(shape) for name, shape in expected.items()}, found)
    with pytest.raises(ValueError, match=message):
        raise ValueError(text)


def test_same_names_and_shapes_are_no_mismatch():
    assert first_mismatch({"a": torch.zeros(2)}, {"a": torch.ones(2)}) is None
