"""Combiners off the CPU: the values of the CPU, a few operations for any number of tensors, hardly a read."""

import pytest
import torch
from device_counts import fake_cuda
from test_combiner_conformance import COMBINERS, title, updated, vectors

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
    ExponentialAverage,
    IsoC,
    MagMax,
    MetaGPT,
    ModelStock,
    Sum,
)
from lightning_merge.weights import Weights

every_combiner = pytest.mark.parametrize("combiner", COMBINERS, ids=title)


@pytest.fixture
def no_host(monkeypatch):
    """Walks tensors on the CPU as on an accelerator."""

    def switch() -> None:
        monkeypatch.setattr("lightning_merge.weights._chunks._is_host", lambda tensor: False)

    return switch


def crowded(count: int) -> list[Weights]:
    """Vectors in which many magnitudes are equal, with zeros of both signs."""
    choices = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5])
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (5, 7), "b": (35,), "c": (4,), "d": (2, 2), "e": (), "none": (0, 3)}
    return [
        {name: choices[torch.randint(7, shape, generator=generator)] for name, shape in shapes.items()}
        for _ in range(count)
    ]


@every_combiner
@pytest.mark.parametrize("make", [vectors, crowded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_are_those_of_the_cpu(combiner: Combiner, make, dtype, no_host):
    stream = [{name: tensor.to(dtype) for name, tensor in vector.items()} for vector in make(5)]
    expected = combiner.combine(stream)
    no_host()
    state = updated(combiner, stream)
    for found in (combiner.combine(stream), combiner.combine(iter(stream)), combiner.result(state)):
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=3e-6, atol=3e-7, msg=name)
            if exact(combiner):
                assert torch.equal(found[name], tensor), name


def exact(combiner: Combiner) -> bool:
    """Whether each number is computed by the same operations, whatever the order of sums over a tensor."""
    if isinstance(combiner, DARE):
        return exact(combiner.combiner) and combiner.dare_rescale != "l1"
    return isinstance(combiner, Sum | Average | MagMax | TIES | Breadcrumbs)


def layers(count: int, device: str = "cuda") -> Weights:
    """A model of so many equal layers between others, of nine sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        "stem": (32, 3, 2, 2),
        "position": (9, 32),
        "head.bias": (10,),
        "head": (10, 32),
    }
    for i in range(count):
        shapes |= {f"{i}.norm": (32,), f"{i}.qkv": (96, 32), f"{i}.qkv.bias": (96,), f"{i}.proj": (32, 32)}
        shapes |= {f"{i}.fc": (128, 32), f"{i}.fc.bias": (128,)}
    return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}


# By combiner: operations launched and reads waited for when a further vector is taken in, of any number of layers with
# tensors of nine sizes. Read is whether it is finite and there is room, and whether equal ones are at a border; by TIES
# over the whole vector also which tensors are frozen.
SPECTRAL = {OPCM, TSVM}  # per matrix a decomposition of each vector

BARS = {
    IsoC: (5, 1),
    MetaGPT: (9, 3),
    EMR: (8, 1),
    Sum: (5, 1),
    Average: (5, 1),
    ExponentialAverage: (5, 1),
    MagMax: (11, 1),
    TIES: (240, 3),
    Breadcrumbs: (250, 2),
    ModelStock: (230, 1),
    SLERP: (630, 1),
    DARE: (270, 3),
}


@pytest.mark.parametrize(
    "combiner",
    # A decomposition per matrix; a copy of each vector; statistics of each tensor, read from a file.
    [
        c
        for c in COMBINERS
        if not c.needs_every_vector
        and not {type(c), type(getattr(c, "combiner", None))} & SPECTRAL
        and not hasattr(c, "statistics")
    ],
    ids=title,
)
def test_launches_do_not_grow_with_the_layers_and_reads_are_few(combiner: Combiner):
    found = []
    for count in (2, 5):
        with fake_cuda() as counts:
            stream = [layers(count) for _ in range(3)]
            state = updated(combiner, stream[:2])
            counts.restart()
            combiner.update(state, stream[2], task=2)
            found.append((len(counts.launches), len(counts.reads)))
    assert found[0] == found[1]
    assert found[0] <= BARS[type(combiner)], found
    assert found[0][1] <= BARS[type(combiner)][1]


@pytest.mark.parametrize(
    ("combiner", "per_vector"), [(Sum(), 1), (Average(), 1), (MagMax(), 7), (ExponentialAverage(), 1)]
)
def test_vectors_at_once_are_folded_by_operations_on_all_tensors_and_read_once(combiner: Combiner, per_vector: int):
    with fake_cuda() as counts:
        stream = [layers(12) for _ in range(8)]
        counts.restart()
        combiner.combine(stream)
    assert len(counts.reads) == 1
    folds = [name for name in counts.launches if name.startswith("_foreach")]
    assert len(folds) <= 7 * per_vector + 3


def test_counting_sees_what_it_is_for():
    with fake_cuda() as counts:
        x, y = torch.ones(3, device="cuda"), torch.ones(4, device="cuda")
        counts.restart()
        torch._foreach_add_([x, y], 1.0)
        x.view(1, 3).t()
        assert (counts.launches, counts.reads) == (["_foreach_add_"], [])
        float(x.sum()), y.cpu(), y.tolist()
        assert counts.reads == ["_local_scalar_dense", "_to_copy", "tolist"]
