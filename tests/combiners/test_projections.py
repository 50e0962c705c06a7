"""What is subtracted to unlearn: Ext-Sub beside its official code (ffab8fd of its repository), and Ethos."""

import pytest
import torch

from lightning_merge.combiners import add_vector, ethos, ext_sub, negate

EXPERT = (
    [[1.54, -0.29, -2.18], [0.57, -1.08, -1.4]],
    [[0.4, 0.84], [-0.72, -0.4], [-0.6, 0.18]],
)
HARMFUL = ([[-0.86, 1.1, -1.07], [0.12, -0.57, 0.37]], [[-0.89, -1.51], [0.37, 1.46], [0.94, 0.77]])
SUBTRACTED = [
    [0.6274399757385254, -0.9285600185394287, -2.362880086898804],
    [-1.2224000811576843, 0.980959987640381, 2.0141600608825683],
    [-0.24860002994537356, -0.4964800536632538, 1.6327201128005981],
]
EXTRACTED = [
    [0.984382254961214, -1.0910809392064953, -2.436022062070028],
    [-1.3767110740074329, 0.8574304976517519, 2.2265834816392314],
    [-0.8241460935617304, -0.265621170543434, 1.7160891734108579],
]


def tensor(values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def product(factors):
    down, up = (torch.tensor(each, dtype=torch.float64) for each in factors)
    return {"w": up @ down}


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found["w"], torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


@pytest.mark.parametrize(("extract", "expected"), [(False, SUBTRACTED), (True, EXTRACTED)])
def test_ext_sub_is_the_official_one(extract, expected):
    expert, harmful = product(EXPERT), product(HARMFUL)
    forgotten = ext_sub(harmful, expert) if extract else harmful
    close(add_vector(expert, negate(forgotten, 0.8)), expected, atol=1e-6)  # the official code multiplies in float32


def test_what_ext_sub_takes_is_orthogonal_to_what_both_share():
    expert, harmful = product(EXPERT)["w"], product(HARMFUL)["w"]
    shared = expert / expert.norm(dim=-1, keepdim=True) + harmful / harmful.norm(dim=-1, keepdim=True)
    taken = ext_sub({"w": harmful}, {"w": expert})["w"]
    assert (taken * shared).sum(-1).abs().max() < 1e-12
    close(ext_sub({"w": harmful}, {"w": harmful * 3}), torch.zeros(3, 3))  # all is shared


@pytest.mark.parametrize(
    ("vector", "expert", "expected"),
    [
        ([[1.0, 2.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [0.5, -0.5]]),  # nothing to share with
        ([[0.0, 0.0]], [[1.0, 2.0]], [[0.0, 0.0]]),
        ([[1.0, 2.0]], [[-1.0, -2.0]], [[1.0, 2.0]]),  # opposite: there is no direction between them
        ([0.0, 2.0], [3.0, 0.0], [-1.0, 1.0]),  # a bias is one row
        ([[0.0], [2.0]], [[3.0], [0.0]], [[-1.0], [1.0]]),  # and so is a scaling of (IA)3
        ([], [], []),
    ],
)
def test_rows_that_have_no_direction_and_tensors_that_have_no_rows(vector, expert, expected):
    close(ext_sub(tensor(vector), tensor(expert)), expected)


def test_ethos_keeps_what_is_large_along_the_singular_vectors_of_the_base():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (4, 3))
    base = {"w": left[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) @ right.T, "more": torch.ones(1)}
    large, small = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    large[0, 2], small[1, 1] = 1.0, 0.02
    outside = torch.outer(left[:, 3], right[:, 0])
    vector = {"w": left[:, :3] @ (large + small) @ right.T + outside}
    close(ethos(vector, base), left[:, :3] @ large @ right.T)
    close(ethos(vector, base, threshold=0.0), left[:, :3] @ (large + small) @ right.T)
    square = {"w": torch.randn(3, 3, dtype=torch.float64)}
    close(ethos(square, {"w": torch.randn(3, 3).double()}, threshold=0.0), square["w"])


def test_ethos_takes_filters_as_rows_and_leaves_biases_whole():
    torch.manual_seed(0)
    vector = {"w": torch.randn(4, 2, 3, 3).double(), "b": torch.randn(4).double()}
    base = {"w": torch.randn(4, 2, 3, 3).double(), "b": torch.zeros(4).double()}
    found = ethos(vector, base, 0.2)
    assert torch.equal(found["b"], vector["b"])
    flat = ethos({"w": vector["w"].flatten(1)}, {"w": base["w"].flatten(1)}, 0.2)
    close({"w": found["w"].flatten(1)}, flat["w"])
    assert (found["w"] - vector["w"]).abs().max() > 1e-3
    close(ethos(tensor([[0.0]]), tensor([[0.0]])), [[0.0]])


@pytest.mark.parametrize("project", [ext_sub, ethos])
@pytest.mark.parametrize(
    ("vector", "other", "part"),
    [
        ({"w": torch.ones(2)}, {"w": torch.ones(3)}, "is of another model than `vector`"),
        ({"w": torch.ones(2)}, {"v": torch.ones(2)}, "is of another model than `vector`"),
        ({"w": torch.tensor([float("nan")])}, {"w": torch.ones(1)}, "`w` of `vector` holds a NaN"),
        ({"w": torch.ones(1)}, {"w": torch.tensor([float("inf")])}, "holds a NaN or an infinity"),
        ({"w": torch.ones(1).long()}, {"w": torch.ones(1)}, "must be a whole tensor of floating-point numbers"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, {"w": torch.ones(1)}, "holds complex numbers"),
    ],
)
def test_what_does_not_fit_is_named(project, vector, other, part):
    with pytest.raises(ValueError, match=part):
        project(vector, other)


def test_a_threshold_is_a_share():
    with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\]"):
        ethos(tensor([1.0]), tensor([1.0]), 1.5)
