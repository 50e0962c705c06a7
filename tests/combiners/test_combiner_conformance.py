"""What every combiner keeps to, whatever it computes. Adding a combiner adds a line to ``COMBINERS``."""

import io
import re
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import lightning_merge.combiners
from lightning_merge.combiners import (
    DARE,
    EMR,
    OPCM,
    SLERP,
    TIES,
    TSVM,
    Average,
    Breadcrumbs,
    Combiner,
    Consensus,
    Daheim,
    ExponentialAverage,
    Fisher,
    IsoC,
    MagMax,
    MaTS,
    MetaGPT,
    ModelStock,
    RegMean,
    Sum,
)
from lightning_merge.importance import Statistics
from lightning_merge.weights import Weights

SHAPES = {"layer.weight": (6, 4), "layer.bias": (6,), "one": (1,), "scale": (), "empty": (0, 2), "conv": (2, 3, 2, 2)}

LABELS = (*range(12), "cars", "pets")


def statistics(kind: Literal["fisher", "gram"]) -> dict[int | str, str]:
    """Files of statistics of such vectors for every task of these tests."""
    folder, generator = Path(FILES.name), torch.Generator().manual_seed(1)
    found: dict[int | str, str] = {}
    for task in LABELS:
        sizes = {"layer.weight": 4, "conv": 12}
        inputs = {name: torch.randn(3 * size, size, generator=generator) for name, size in sizes.items()}
        squares = {
            name: torch.rand(shape, generator=generator)
            for name, shape in SHAPES.items()
            if name not in ("empty", "scale")
        }
        tensors = squares if kind == "fisher" else {name: x.T @ x / len(x) for name, x in inputs.items()}
        found[task] = str(folder / f"{kind}-{task}")
        Statistics(kind, tensors).write(found[task])
    return found


FILES = tempfile.TemporaryDirectory()
FISHER, GRAM = statistics("fisher"), statistics("gram")

COMBINERS = [
    Sum(),
    Sum(scale="1/t"),
    Sum(scale="1/sqrt(t)"),
    Average(),
    ExponentialAverage(),
    MagMax(),
    MagMax(scale=1.0, magmax_tie="first"),
    TIES(),
    TIES(density=0.5, scope="global", zero_sign="official", topk_rule="official_plus_one"),
    TIES(density=0.5, zero_sign="official", topk_rule="official_plus_one", scale="1/t"),
    TIES(density=0.5, scope="global", zero_sign="positive"),
    TIES(density=0.4, divisor="weight_sum", weights={1: 2.0, 3: 0.5}),
    TIES(density=0.4, divisor=None, weights={1: 2.0}, weighted_sign=False),
    TIES(density=0.5, disjoint="max", weights={1: 2.0}),
    TIES(density=0.5, scope="global", disjoint="max", zero_sign="official", topk_rule="official_plus_one"),
    DARE(),
    DARE(Average(), density=0.3, seed=-5, dare_rescale="l1"),
    DARE(TIES(density=0.5), density=0.5, dare_rescale=None),
    DARE(MagMax()),
    DARE(OPCM()),
    DARE(TIES(density=0.5, scope="global"), density=0.9),
    Breadcrumbs(),
    Breadcrumbs(density=0.5, outliers=0.0, scale=1.0),
    Breadcrumbs(density=0.4, outliers=0.2, scope="row"),
    OPCM(),
    OPCM(alpha=0.8, opcm_rank="fixed"),
    ModelStock(),
    ModelStock(stock_angle="mean_deg"),
    ModelStock(scope="row"),
    ModelStock("mean_deg", "row"),
    SLERP(),
    SLERP(t=0.25, scale=0.3),
    IsoC(),
    TSVM(scale="1/t"),
    MetaGPT(),
    Consensus(),
    EMR(),
    Fisher(FISHER),
    Fisher(FISHER, normalise="tensor", per="node", floor=1e-6, floor_rule="first", weights={1: 2.0}),
    Daheim(FISHER, FISHER[0], scale="1/t", damping=1e-3),
    RegMean(GRAM),
    MaTS(GRAM, normalise="model"),
    MaTS(GRAM, "base", iterations=3),
]


def title(combiner: Combiner) -> str:
    """How it was made, without paths of files."""
    return re.sub(r"\{0: '.*?'\}|'/.*?'", "...", repr(combiner))


every_combiner = pytest.mark.parametrize("combiner", COMBINERS, ids=title)


def vectors(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Weights]:
    """Task vectors with tensors of all sorts: of one element, of none, one that is zero in every other task."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]
    for vector in made[::2]:
        vector["layer.bias"].zero_()
    return made


def bits(value: object) -> object:
    """Equal for two states only if every number in them is the same, bit for bit."""
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, value.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [bits(item) for item in value]
    return value


def devices(weights: Weights) -> dict[str, torch.device]:
    return {name: tensor.device for name, tensor in weights.items()}


@every_combiner
def test_a_combiner_with_another_scale_differs_in_nothing_else(combiner: Combiner) -> None:
    if "scale" in (settings := vars(combiner)):
        assert vars(combiner.with_scale(0.7)) == {**settings, "scale": 0.7}
        with pytest.raises(ValueError, match=r"`scale` must be .*got 11"):
            combiner.with_scale(11)
    else:
        with pytest.raises(ValueError, match=rf"`scale` must be left out for {type(combiner).__name__}\("):
            combiner.with_scale(0.7)


def updated(combiner: Combiner, stream: list[Weights], first_task: int = 0) -> dict[str, object]:
    state = combiner.init(stream[0])
    for task, vector in enumerate(stream, first_task):
        combiner.update(state, vector, task=task)
    return state


def test_table_has_every_combiner():
    public = [getattr(lightning_merge.combiners, name) for name in lightning_merge.combiners.__all__]
    classes = {each for each in public if isinstance(each, type) and issubclass(each, Combiner)} - {Combiner}
    assert classes
    assert {type(combiner) for combiner in COMBINERS} == classes


@every_combiner
def test_list_merged_part_by_part_equals_the_stream_bit_for_bit(combiner):
    stream = vectors(5)
    state = updated(combiner, stream)
    expected = bits(combiner.result(state))
    assert bits(combiner.combine(stream)) == expected
    assert bits(combiner.combine(iter(stream))) == expected


@every_combiner
def test_a_tensor_cut_into_parts_gives_what_it_gives_whole(combiner, monkeypatch):
    from lightning_merge import weights
    from lightning_merge.combiners import _base, _dare, _elementwise, _pieces

    stream = vectors(4)
    expected = bits(combiner.combine(iter(stream)))
    monkeypatch.setattr(weights.parts, "__defaults__", ("element", 5))
    for module in (_base, _dare, _pieces, _elementwise):
        monkeypatch.setattr(module, "_PIECE", 5)
    monkeypatch.setattr(_elementwise, "_PIECE_OF_ONE", 5)
    assert bits(combiner.combine(stream)) == expected
    assert bits(combiner.combine(iter(stream))) == expected


@every_combiner
def test_order_of_the_names_in_a_vector_changes_no_bit(combiner):
    stream = vectors(4)
    for vector in stream:  # equal magnitudes, which a rank has to choose among
        for tensor in vector.values():
            tensor.copy_(tensor.sign() * tensor.abs().ceil())
    expected = bits(dict(sorted(combiner.combine(stream).items())))
    turned = [dict(sorted(vector.items(), reverse=at % 2 == 0)) for at, vector in enumerate(stream)]
    for found in (combiner.combine(turned), combiner.combine(iter(turned)), combiner.combine(turned[:1] + stream[1:])):
        assert bits(dict(sorted(found.items()))) == expected


@pytest.mark.parametrize("inner", [each for each in COMBINERS if not isinstance(each, DARE)], ids=title)
def test_dare_is_the_combiner_of_thinned_vectors(inner):
    dare, stream = DARE(inner, density=0.6), vectors(12)
    thinned = [dare._thinned(vector, task) for task, vector in enumerate(stream)]
    expected = bits(inner.combine(thinned))
    assert bits(dare.combine(stream)) == expected
    assert bits(dare.combine(iter(stream))) == expected


@pytest.mark.parametrize("combiner", [OPCM(), DARE(OPCM())], ids=repr)
def test_long_streams_do_not_depend_on_the_precision(combiner):
    single = combiner.combine([{"w": each["layer.weight"]} for each in vectors(60)])["w"]
    double = combiner.combine([{"w": each["layer.weight"].double()} for each in vectors(60)])["w"]
    assert float((single - double).norm() / double.norm()) < 1e-4


@pytest.mark.parametrize("label", [np.str_("cars"), type("Name", (str,), {})("cars")], ids=["NumPy", "subclass"])
@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3)], ids=["NumPy", "tensor"])
def test_equal_labels_draw_equal_masks_whatever_their_type(label, number):
    stream = vectors(2)
    assert bits(DARE().combine(stream, [label, number])) == bits(DARE().combine(stream, ["cars", 3]))
    assert bits(updated(DARE(), stream[:1], number)) == bits(updated(DARE(), stream[:1], 3))


@pytest.mark.parametrize("combiner", [Sum(0.3), MagMax(), MagMax(magmax_tie="first")], ids=repr)
def test_tensors_in_another_order_of_memory_are_merged_as_any(combiner):
    stream = [{"w": torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    last = [{"w": vector["w"].to(memory_format=torch.channels_last)} for vector in stream]
    expected = bits(combiner.combine(stream))
    assert bits(combiner.combine(last)) == expected
    assert bits(combiner.combine([stream[0], last[1], last[2]])) == expected


@every_combiner
def test_vectors_are_not_written_to_and_no_memory_is_shared(combiner):
    stream = vectors(3)
    before = bits(deepcopy(stream))
    state = updated(combiner, stream)
    combiner.result(state)
    assert bits(stream) == before
    expected = bits(deepcopy(state))
    for vector in stream:
        for tensor in vector.values():
            tensor.fill_(7)
    assert bits(state) == expected


@every_combiner
def test_result_changes_nothing_and_there_is_none_before_the_first_vector(combiner):
    stream = vectors(3)
    assert combiner.result(combiner.init(stream[0])) is None
    state = updated(combiner, stream)
    before = bits(deepcopy(state))
    first = bits(combiner.result(state))
    assert bits(combiner.result(state)) == first
    assert bits(state) == before


@every_combiner
def test_saved_and_loaded_state_goes_on_bit_for_bit(combiner):
    stream = vectors(6)
    state = updated(combiner, stream[:3])
    file = io.BytesIO()
    torch.save(combiner.save(state), file)
    file.seek(0)
    resumed = combiner.load(torch.load(file, weights_only=True), devices(stream[0]))
    assert bits(resumed) == bits(state)
    for task, vector in enumerate(stream[3:], 3):
        combiner.update(resumed, vector, task=task)
    assert bits(combiner.result(resumed)) == bits(combiner.result(updated(combiner, stream)))


@every_combiner
@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_result_is_float32_or_wider_and_as_exact_as_from_wide_vectors(combiner, given, kept):
    narrow = vectors(4, given)
    result = combiner.combine(narrow)
    assert {tensor.dtype for tensor in result.values()} == {kept}
    wide = [{name: tensor.to(kept) for name, tensor in vector.items()} for vector in narrow]
    assert bits(combiner.combine(wide)) == bits(result)


@every_combiner
def test_zero_vectors_merge_to_zero(combiner):
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for tensor in combiner.combine([zero, zero, zero]).values():
        assert torch.equal(tensor, torch.zeros_like(tensor))


@every_combiner
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_by_name_and_the_state_stays_as_it_was(combiner, bad):
    first, second = vectors(2)
    state = updated(combiner, [first])
    before = bits(deepcopy(state))
    second["conv"][0, 0, 0, 0] = bad
    for attempt in (
        lambda: combiner.update(state, second, task="pets"),
        lambda: combiner.combine([first, second], ["cars", "pets"]),
        lambda: combiner.combine(iter([first, second]), ["cars", "pets"]),
    ):
        with pytest.raises(ValueError, match="`conv` in the vector of task pets holds a NaN or an infinity"):
            attempt()
    assert bits(state) == before


@every_combiner
def test_names_shapes_and_types_that_do_not_fit_are_named(combiner):
    first, second = vectors(2)
    state = updated(combiner, [first])
    before = bits(deepcopy(state))
    for wrong, message in (
        ({name: tensor for name, tensor in second.items() if name != "conv"}, "`conv` .* is missing"),
        ({**second, "layer.bias": torch.zeros(7)}, r"`layer.bias` has shape \(7,\) instead of \(6,\)"),
        ({**second, "head": torch.zeros(2)}, "`head` .* is not part of this model"),
        ({**second, "conv": second["conv"].long()}, "`conv` in the vector of task 3 is torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            combiner.update(state, wrong, task=3)
        with pytest.raises(ValueError, match=message.replace("task 3", "task 1")):
            combiner.combine([first, wrong])
    assert bits(state) == before


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_combiner
def test_sharded_vectors_are_refused_by_name(combiner, one_process):
    mesh = init_device_mesh("cpu", (1,))
    first, second = vectors(2)
    sharded = {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in second.items()}
    for attempt in (
        lambda: combiner.update(updated(combiner, [first]), sharded, task="pets"),
        lambda: combiner.combine([first, sharded], ["cars", "pets"]),
        lambda: combiner.combine(iter([first, sharded]), ["cars", "pets"]),
    ):
        with pytest.raises(ValueError, match=r"`layer.weight` in the vector of task pets is sharded .*full_tensor"):
            attempt()


@every_combiner
def test_a_vector_is_taken_out_again_where_the_rule_allows_it(combiner):
    stream = vectors(4)
    state = updated(combiner, stream)
    if not combiner.removable:
        with pytest.raises(TypeError, match="keep every vector"):
            combiner.remove(state, stream[2], task=2)
        return
    combiner.remove(state, stream[2], task=2)
    expected = combiner.combine([stream[0], stream[1], stream[3]], [0, 1, 3])
    rounding = 1e-5 if isinstance(combiner, IsoC) else 1e-6  # singular vectors move further than the sum
    for name, tensor in combiner.result(state).items():
        torch.testing.assert_close(tensor, expected[name], rtol=rounding, atol=rounding)
    for task in (0, 1, 3):
        combiner.remove(state, stream[task], task=task)
    assert bits(state) == bits(combiner.init(stream[0]))
    with pytest.raises(ValueError, match="no vector to remove"):
        combiner.remove(state, stream[0])


@every_combiner
def test_repr_makes_the_combiner_again(combiner):
    assert eval(repr(combiner), vars(lightning_merge.combiners)) == combiner


@every_combiner
def test_layout_in_memory_does_not_matter(combiner):
    stream = vectors(3)
    expected = combiner.combine(stream)
    for vector in stream:
        vector["conv"] = vector["conv"].to(memory_format=torch.channels_last)
        vector["layer.weight"] = vector["layer.weight"].T.contiguous().T
    for found in (combiner.combine(stream), combiner.combine(iter(stream))):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, msg=name)


@every_combiner
def test_nothing_to_combine_is_an_error(combiner):
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="no task vector to combine"):
            combiner.combine(nothing)


@pytest.mark.parametrize("cls", [Sum, ExponentialAverage, MagMax, TIES, Breadcrumbs, SLERP, IsoC, TSVM, Consensus])
@pytest.mark.parametrize("scale", [0, -0.5, 10.5, float("nan"), True, "1/T"])
def test_scale_out_of_range_is_an_error_that_names_the_range(cls, scale):
    with pytest.raises(ValueError, match=r"`scale` must be a number in \(0, 10\]"):
        cls(scale=scale)


def test_scale_counts_the_tasks_seen_so_far():
    ones = {"w": torch.ones(1, dtype=torch.float64)}
    for scale, expected in (("1/t", [1, 1, 1]), ("1/sqrt(t)", [1, 2 / 2**0.5, 3 / 3**0.5]), (0.3, [0.3, 0.6, 0.9])):
        combiner = Sum(scale=scale)
        state = combiner.init(ones)
        found = []
        for _ in expected:
            combiner.update(state, ones)
            found.append(combiner.result(state)["w"].item())
        assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("arrays", [True, False], ids=["NumPy", "torch"])
@pytest.mark.parametrize("combiner", [Sum(), Average(), ExponentialAverage(), MagMax(), MagMax(magmax_tie="first")])
def test_ties_and_signs_of_zero_are_the_same_at_once_as_in_turn(combiner, arrays, monkeypatch):
    if not arrays:  # as on an accelerator
        monkeypatch.setattr("lightning_merge.weights._chunks._is_host", lambda tensor: False)
    generator = torch.Generator().manual_seed(0)
    choices = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0])
    stream = [{"w": choices[torch.randint(6, (50, 7), generator=generator)]} for _ in range(4)]
    assert bits(combiner.combine(stream)) == bits(combiner.result(updated(combiner, stream)))
    stream[1]["w"][3, 3] = float("nan")
    with pytest.raises(ValueError, match="`w` in the vector of task 1 holds a NaN"):
        combiner.combine(stream)
