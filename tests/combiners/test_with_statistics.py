"""Combiners on statistics, against values of the official functions, closed forms, and SciPy, to 1e-9 in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg  # type: ignore[import-untyped]
from torch import Tensor

from lightning_merge.combiners import Combiner, Daheim, Fisher, MaTS, RegMean, add_vector, combine_files, task_vector
from lightning_merge.importance import Statistics
from lightning_merge.weights import Weights


def double(**values: Any) -> Weights:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


BASE = double(a=[[0.3, -0.1, 0.2], [0.5, -0.4, 0.1]], b=[0.05, -0.05])
MODELS = [
    double(a=[[1.3, -2.1, 0.7], [0.5, 2.6, -0.9]], b=[0.25, -0.45]),
    double(a=[[-0.2, -1.1, 2.2], [2.0, 0.6, -1.9]], b=[0.15, 0.55]),
]
SQUARES = [
    double(a=[[1.0, 0.5, 0.1], [2.0, 0.0, 1.0]], b=[0.3, 0.7]),
    double(a=[[0.2, 0.5, 3.0], [1.0, 0.0, 0.5]], b=[0.9, 0.1]),
]
FISHER = {task: Statistics("fisher", each) for task, each in enumerate(SQUARES)}
INPUTS = [
    [[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [1.0, 1.0, 0.5], [0.3, -0.2, 0.1]],
    [[0.5, -1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 0.3, -0.7], [1.0, 1.0, 1.0]],
]
GRAMS = [double(x=rows)["x"].T @ double(x=rows)["x"] for rows in INPUTS]
GRAM = {task: Statistics("gram", {"a": each}) for task, each in enumerate(GRAMS)}


def merged(combiner: Combiner, form: str, tmp_path: Path, models: Any = MODELS, base: Weights = BASE) -> Weights:
    """What a list, a stream or files of these models come to."""
    if form != "files":
        vectors = [task_vector(model, base) for model in models]
        return add_vector(base, combiner.combine(vectors if form == "list" else iter(vectors)))
    paths = [tmp_path / f"{index}.pt" for index in range(len(models) + 1)]
    for path, weights in zip(paths, [base, *models], strict=True):
        torch.save(weights, path)
    return combine_files(combiner, paths[0], paths[1:])


FORMS = pytest.mark.parametrize("form", ["list", "stream", "files"])


def assert_equal(found: Weights, expected: Weights) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


# By setting: values of dataless-model-merging (92247ae) and of model_merging (46802f9).
FISHERS: list[tuple[dict[str, Any], Weights]] = [
    (
        {"normalise": None, "floor": 1e-10},
        double(
            a=[[1.0499999999166667, -1.6, 2.151612903180541], [1.0000000000166667, 1.6, -1.2333333333555556]],
            b=[0.17500000000416668, -0.32499999990625],
        ),
    ),
    (
        {"normalise": "tensor", "floor": 1e-10},
        double(
            a=[
                [1.0996764105245527, -1.6647588741910464, 2.137810984491516],
                [0.9172283023954804, 1.7295177483820934, -1.178152201607026],
            ],
            b=[0.17838438086654748, -0.34274083067656547],
        ),
    ),
    (
        {"normalise": "model", "floor": 1e-10},
        double(
            a=[
                [1.0984856269313803, -1.6630759994095428, 2.1382176430078226],
                [0.9192924727632368, 1.726151998819086, -1.1795283151855607],
            ],
            b=[0.1800491821717779, -0.35021048486472856],
        ),
    ),
    (
        {"normalise": "model", "floor": 1e-6, "floor_rule": "first"},
        double(
            a=[
                [1.0984856270026517, -1.6630759994116506, 2.138217643064578],
                [0.9192924727455446, 2.5999999999999996, -1.1795283151636964],
            ],
            b=[0.18004918216728688, -0.35021048494249657],
        ),
    ),
    (
        {"normalise": None, "floor": 1e-6, "floor_rule": "least"},
        double(a=[[1.05, -1.6, 2.1516129032258067], [1.0, 1.6, -1.2333333333333334]], b=[0.175, -0.325]),
    ),
]


@FORMS
@pytest.mark.parametrize(("settings", "expected"), FISHERS, ids=str)
def test_fisher_has_the_values_of_the_official_functions(
    settings: Any, expected: Weights, form: str, tmp_path: Path
) -> None:
    assert_equal(merged(Fisher(FISHER, **settings), form, tmp_path), expected)


def test_fisher_in_constant_memory_after_three_and_with_coefficients() -> None:
    rows = {0: [1.0, 3.0, 0.0], 1: [3.0, 1.0, 0.0], 2: [2.0, 2.0, 1.0]}
    known = {task: Statistics("fisher", double(w=row)) for task, row in rows.items()}
    vectors = [double(w=row) for row in ([1.0, 2.0, 3.0], [3.0, 0.0, -1.0], [0.0, 1.0, 1.0])]
    found = Fisher(known, normalise=None).combine(iter(vectors))
    assert_equal(found, double(w=[5 / 3, 4 / 3, 1.0]))
    weighted = Fisher(known, normalise=None, weights={0: 0.25, 1: 0.75}).combine(vectors[:2])
    assert_equal(weighted, double(w=[2.8, 1.0, 0.0]))  # no task knows of the last: the base is kept


def test_fisher_nodes_have_the_mean_over_what_comes_in() -> None:
    shares = [each["a"].mean(1, keepdim=True) for each in SQUARES]
    expected = sum(s * m["a"] for s, m in zip(shares, MODELS, strict=True)) / sum(shares)
    vectors = [task_vector(model, BASE) for model in MODELS]
    found = add_vector(BASE, Fisher(FISHER, normalise=None, per="node").combine(vectors))
    torch.testing.assert_close(found["a"], expected, rtol=0, atol=1e-9)
    plain = add_vector(BASE, Fisher(FISHER, normalise=None).combine(vectors))
    torch.testing.assert_close(found["b"], plain["b"], rtol=0, atol=0)


# The loop body of uncertainty_based_gradient_matching.py (da602e4), evaluated literally.
DAHEIMS: list[tuple[dict[str, Any], Weights]] = [
    (
        {},
        double(
            a=[
                [0.9875, -2.028571428571429, 2.2142857142857144],
                [1.1176470588235294, 3.6, -1.5842105263157893],
            ],
            b=[0.2, -0.22999999999999998],
        ),
    ),
    (
        {"scale": 0.5, "weights": {0: 2.0}, "damping": 1e-3},
        double(
            a=[
                [0.9997001998667556, -1.708601216333623, 1.9747376311844076],
                [0.8622026887280247, 1.5999999999999996, -1.1728649303452454],
            ],
            b=[0.19211356466876972, -0.2917455310199789],
        ),
    ),
]


@FORMS
@pytest.mark.parametrize(("settings", "expected"), DAHEIMS, ids=str)
def test_daheim_has_the_values_of_the_official_loop(
    settings: Any, expected: Weights, form: str, tmp_path: Path
) -> None:
    base = Statistics("fisher", double(a=[[0.4] * 3] * 2, b=[0.2, 0.2]))
    assert_equal(merged(Daheim(FISHER, base, **settings), form, tmp_path), expected)


REGMEANS = {
    1.0: [
        [0.08769383448609203, -1.1204592363328052, 1.534138979238938],
        [2.107873201213634, 1.0855219902922821, -1.9390489987213302],
    ],
    0.9: [
        [0.17371340197647944, -1.1896060597821783, 1.445845505921307],
        [1.898276309067596, 1.189580117701194, -1.735934085010428],
    ],
    0.0: [
        [0.22711171662125343, -1.593946731234867, 1.1819354838709677],
        [1.5728882833787468, 1.5878934624697336, -1.221290322580645],
    ],
}


@FORMS
@pytest.mark.parametrize(("off_diagonal", "expected"), REGMEANS.items())
def test_regmean_has_the_values_of_the_official_function(
    off_diagonal: float, expected: Any, form: str, tmp_path: Path
) -> None:
    found = merged(RegMean(GRAM, off_diagonal, ridge=0.0), form, tmp_path)
    assert_equal(found, double(a=expected, b=[0.2, 0.05]))


@pytest.mark.parametrize(
    ("off_diagonal", "expected"),
    [
        (1.0, [[0.42857143, 0.71428571], [0.92857143, 0.21428571]]),
        (0.9, [[0.45736435, 0.69767441], [0.89499647, 0.23890064]]),
        (0.1, [[0.64643095, 0.60707138], [0.68712475, 0.38625750]]),
        (0.0, [[0.66666667, 0.6], [0.66666667, 0.4]]),
    ],
)
def test_regmean_of_a_stream(off_diagonal: float, expected: Any) -> None:
    grams = [[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 3.0]], [[1.0, -0.5], [-0.5, 1.0]]]
    known = {task: Statistics("gram", double(w=each)) for task, each in enumerate(grams)}
    rows = [double(w=each) for each in ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]])]
    combiner = RegMean(known, off_diagonal, ridge=0.0)
    state = combiner.init(rows[0])
    for task in (0, 1):
        combiner.update(state, rows[task], task=task)
    torch.testing.assert_close((combiner.result(state) or {})["w"], double(w=expected)["w"], rtol=0, atol=1e-8)
    if off_diagonal == 1.0:
        combiner.update(state, rows[2], task=2)
        third = double(w=[[0.53684211, 0.70526316], [0.56842105, 0.45263158]])["w"]
        torch.testing.assert_close((combiner.result(state) or {})["w"], third, rtol=0, atol=1e-8)


def convolutions(count: int = 3) -> tuple[list[Weights], dict[int, Statistics]]:
    generator = torch.Generator().manual_seed(0)
    made = [{"w": torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)} for _ in range(count)]
    inputs = [torch.randn(40, 18, generator=generator, dtype=torch.float64) for _ in range(count)]
    return made, {i: Statistics("gram", {"w": x.T @ x / len(x)}) for i, x in enumerate(inputs)}


def test_regmean_of_convolutions_gives_the_outputs_nearest_to_those_of_the_models() -> None:
    vectors, known = convolutions()
    found = RegMean(known, 1.0, ridge=0.0).combine(vectors)["w"].flatten(1)
    # Where the sum of squared differences of outputs is least its gradient is 0.
    gradient = sum((found - vector["w"].flatten(1)) @ known[i].tensors["w"] for i, vector in enumerate(vectors))
    assert isinstance(gradient, Tensor)
    assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("start", ["mean", "base"])
@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_mats_takes_the_steps_of_the_official_code(start: Any, iterations: int) -> None:
    # conjugateGradient_fisherMerging.py of mats (cb52c38): SciPy's `cg` on the flattened weight, from the average or
    # from the pretrained weights, for so many iterations. The residual does not know where the base is.
    vectors, known = convolutions()
    grams = [known[i].tensors["w"].numpy() for i in range(3)]
    rows = [vector["w"].flatten(1).numpy() for vector in vectors]
    total: Any = sum(grams)
    target: Any = sum(w @ g for w, g in zip(rows, grams, strict=True))
    shape = rows[0].shape
    operator = LinearOperator((rows[0].size,) * 2, matvec=lambda v: (v.reshape(shape) @ total).ravel())
    begin: Any = sum(rows) / 3 if start == "mean" else np.zeros(shape)
    expected, _ = cg(operator, target.ravel(), x0=begin.ravel(), maxiter=iterations, rtol=1e-5)
    found = MaTS(known, start, iterations).combine(vectors)["w"]
    np.testing.assert_allclose(found.numpy().ravel(), expected, rtol=0, atol=1e-9)


def test_mats_ends_at_regmean_and_stops_there() -> None:
    vectors, known = convolutions()
    expected = RegMean(known, 1.0, ridge=0.0).combine(vectors)
    assert_equal(MaTS(known, tolerance=1e-13, iterations=1000).combine(vectors), expected)


def test_mats_leaves_directions_without_inputs_where_it_starts() -> None:
    known = {i: Statistics("gram", double(w=[[each, 0.0], [0.0, 0.0]])) for i, each in enumerate((1.0, 3.0))}
    vectors = [double(w=[[0.0, 2.0]]), double(w=[[4.0, 4.0]])]
    assert_equal(MaTS(known).combine(vectors), double(w=[[3.0, 3.0]]))
    assert_equal(MaTS(known, "base").combine(vectors), double(w=[[3.0, 0.0]]))


# ---- what is true of all of them


def everyone(fisher: Any, gram: Any) -> list[Combiner]:
    return [Fisher(fisher), Fisher(fisher, None), Daheim(fisher), RegMean(gram), RegMean(gram, 1.0, 0.0), MaTS(gram)]


EVERYONE = pytest.mark.parametrize("at", range(6))


@EVERYONE
def test_one_task_is_that_task(at: int) -> None:
    known = {0: Statistics("fisher", {name: tensor + 0.1 for name, tensor in SQUARES[0].items()})}
    vector = task_vector(MODELS[0], BASE)
    assert_equal(everyone(known, GRAM)[at].combine([vector]), vector)


@EVERYONE
def test_equal_statistics_give_the_mean(at: int) -> None:
    known = dict.fromkeys(range(2), Statistics("fisher", {name: t + 0.1 for name, t in SQUARES[0].items()}))
    vectors = [task_vector(model, BASE) for model in MODELS]
    found = everyone(known, dict.fromkeys(range(2), GRAM[0]))[at].combine(vectors)
    factor = 2.0 if at == 2 else 1.0  # Daheim sums
    mean = {name: (vectors[0][name] + vectors[1][name]) / 2 for name in vectors[0]}
    assert_equal(found, {name: tensor * (factor / (2.0 if at == 2 else 1.0)) for name, tensor in mean.items()})


@pytest.mark.parametrize("normalise", ["model", "tensor"])
def test_data_of_another_scale_changes_no_share_once_it_is_normalised(normalise: Any) -> None:
    vectors = [task_vector(model, BASE) for model in MODELS]

    def results(factor: float) -> list[Weights]:
        fisher = {**FISHER, 0: Statistics("fisher", {n: t * factor for n, t in SQUARES[0].items()})}
        gram = {**GRAM, 0: Statistics("gram", {"a": GRAMS[0] * factor})}
        known = [Fisher(fisher, normalise), RegMean(gram, normalise=normalise), MaTS(gram, normalise=normalise)]
        return [each.combine(vectors) for each in known]

    for found, expected in zip(results(1e6), results(1.0), strict=True):
        assert_equal(found, expected)


def test_no_gradient_anywhere_keeps_the_base() -> None:
    known = {task: Statistics("fisher", double(w=[1.0, 0.0])) for task in range(2)}
    vectors = [double(w=[2.0, 2.0]), double(w=[4.0, 4.0])]
    for combiner in (Fisher(known), Daheim(known)):
        assert combiner.combine(vectors)["w"][1] == 0


def test_a_second_name_of_a_tied_tensor_has_the_statistics_of_the_first() -> None:
    known = {i: Statistics("fisher", double(w=[1.0 + 2 * i]), aliases={"tied": "w"}) for i in range(2)}
    vectors = [double(w=[4.0], tied=[4.0]), double(w=[0.0], tied=[0.0])]
    assert_equal(Fisher(known, normalise=None).combine(vectors), double(w=[1.0], tied=[1.0]))


# ---- what does not fit


def fisher(**values: Any) -> Statistics:
    return Statistics("fisher", double(**values))


HALF = {0: fisher(w=[1.0]), 1: Statistics("fisher", double(v=[1.0]), left_out={"w": "in no optimizer"})}
OTHER = {0: Statistics("fisher", double(v=[1.0]), names=frozenset({"v"}))}
SINGULAR = {0: Statistics("gram", double(w=[[1.0, 1.0], [1.0, 1.0]]))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Statistics("fisher", double(w=[0.0])), r"statistics of kind 'fisher' are all zero"),
        (lambda: fisher(w=[float("nan")]), r"hold a NaN or an infinity, in `w`"),
        (lambda: fisher(w=[-1.0, 2.0]), r"cannot be mean squares: `w` holds a negative number"),
        (
            lambda: RegMean(FISHER),
            r"`statistics` of task 0: RegMean takes statistics of kind 'gram', and got .*'fisher'",
        ),
        (lambda: Fisher(GRAM), r"Fisher takes statistics of kind 'fisher' or 'adam', and got .*'gram'"),
        (lambda: Daheim(FISHER, GRAM[0]), r"Daheim takes statistics of kind 'fisher'"),
        (lambda: Fisher({0: "nowhere.safetensors"}), r"`statistics` of task 0: there is no file nowhere.safetensors"),
        (
            lambda: Fisher({0: fisher(w=[1.0])}).combine([double(w=[1.0])] * 2),
            r"`statistics` .*none of task 1",
        ),
        (lambda: Fisher(HALF).combine([double(w=[1.0])] * 2), r"`w` .*of task 1 \(in no optimizer\), and has .*task 0"),
        (lambda: Fisher(OTHER).combine([double(w=[1.0])]), r"are of another model: it has no `w`, but `v`"),
        (lambda: Fisher({0: fisher(w=[1.0])}).combine([double(w=[[1.0]])]), r"`w` they have shape \(1,\) instead of"),
        (lambda: RegMean(GRAM).combine([double(a=[[1.0, 2.0]])]), r"`a` they have shape \(3, 3\) instead of \(2, 2\)"),
        (lambda: RegMean(SINGULAR, 1.0, 0.0).combine([double(w=[[1.0, 2.0]])]), r"`w` .*no full rank.*Raise `ridge`"),
        (
            lambda: Daheim(FISHER, fisher(a=[1.0])).combine([BASE]),
            r"statistics of `a`.* and the base has some of shape",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_why(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [Fisher, Daheim, RegMean, MaTS])
def test_statistics_of_another_model_leave_the_state_as_it_was(kind: Any) -> None:
    squares = kind in (Fisher, Daheim)
    shape = (2, 3)
    name: Any = "fisher" if squares else "gram"
    good = {"a": torch.eye(3, dtype=torch.float64) if not squares else torch.ones(shape, dtype=torch.float64)}
    combiner = kind({0: Statistics(name, good | ({"b": torch.ones(1)} if squares else {})), 1: Statistics(name, good)})
    like = double(a=[[1.0, 2.0, 3.0]] * 2, b=[1.0] if squares else [[1.0]])
    state = combiner.init(like)
    combiner.update(state, like, task=0)
    before = repr(state)
    if squares:
        with pytest.raises(ValueError, match="`b` has no statistics of task 1"):
            combiner.update(state, like, task=1)
        assert repr(state) == before


def test_a_ridge_keeps_unused_inputs_at_the_mean_and_low_ranks_solvable() -> None:
    known = {i: Statistics("gram", double(w=[[1.0 + i, 0.0], [0.0, 0.0]])) for i in range(2)}
    vectors = [double(w=[[3.0, 2.0]]), double(w=[[0.0, 4.0]])]
    found = RegMean(known, ridge=1e-9).combine(vectors)["w"]
    weights = [1.0, 2.0]  # the ridge is in proportion to each matrix
    torch.testing.assert_close(found, double(w=[[1.0, (2 * weights[0] + 4 * weights[1]) / 3]])["w"], rtol=0, atol=1e-6)


# ---- files


def module_statistics(module: torch.nn.Module, tensors: Weights, kind: Any = "fisher") -> Statistics:
    return Statistics.of(module, kind, tensors, samples=5, labels="true", left_out={"x": "why"})


def test_statistics_of_other_weights_are_refused_where_files_are_merged(tmp_path: Path) -> None:
    models = [torch.nn.Linear(2, 2) for _ in range(3)]
    for index, model in enumerate(models):
        torch.save(model.state_dict(), tmp_path / f"{index}.pt")
        squares = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        module_statistics(model, squares).write(tmp_path / f"{index}.stat")
    files = [tmp_path / "1.pt", tmp_path / "2.pt"]
    right = {0: tmp_path / "1.stat", 1: tmp_path / "2.stat"}
    found = combine_files(Fisher(right), tmp_path / "0.pt", files)
    torch.testing.assert_close(found["weight"], (models[1].weight + models[2].weight).detach() / 2)
    with pytest.raises(ValueError, match=r"2.stat are of other weights than .*1.pt: `weight` differs"):
        combine_files(Fisher({0: right[1], 1: right[0]}), tmp_path / "0.pt", files)
    with pytest.raises(ValueError, match=r"1.stat are of other weights than .*0.pt: `weight` differs"):
        combine_files(Daheim(right, right[0]), tmp_path / "0.pt", files)
