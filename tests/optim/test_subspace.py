"""Training coefficients of stored weights: closed forms, hand calculations, and full-space projected gradients."""

import io
import math

import pytest
import torch
from torch.optim import SGD

from lightning_merge.optim import Subspace

ROWS = torch.tensor([[2, 0, 0, 1], [0, 2, 0, 1], [1, 1, 1, 1]], dtype=torch.float64)
CURVATURE = torch.tensor([1, 2, 3, 4], dtype=torch.float64)
OPTIMUM = torch.tensor([1.2, 0.8, 0.3, 1.4], dtype=torch.float64)


def loss(w):
    return float((CURVATURE * (w - OPTIMUM).square()).sum() / 2)


def gradient(w):
    return CURVATURE * (w - OPTIMUM)


def begun(rows=ROWS, names=("w",), **settings):
    """A subspace over the rows, each divided into tensors of equal size, and the live weights."""
    live = {name: part.clone() for name, part in zip(names, rows[0].chunk(len(names)), strict=True)}
    subspace = Subspace(live, capacity=len(rows), **settings)
    for row in rows:
        subspace.collect(dict(zip(names, row.chunk(len(names)), strict=True)))
    subspace.begin(live)
    return subspace, live


def flat(live):
    return torch.cat([tensor.reshape(-1) for tensor in live.values()])


def train(subspace, live, steps, lr=0.1):
    path = []
    for _ in range(steps):
        gradients = gradient(flat(live).clone()).chunk(len(live))
        subspace.step(live, dict(zip(live, gradients, strict=True)), lr)
        path.append(flat(live).clone())
    return path


def close(found, *expected, tolerance=5e-7):
    """To the digits that the expected numbers were written down with."""
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def projector(rows):
    """The orthogonal projection on the span of rows, by another way than ours."""
    q, r = torch.linalg.qr(rows.T)
    keep = r.diagonal().abs() > 1e-9
    return q[:, keep] @ q[:, keep].T


def projected_sgd(rows, start, steps, lr=0.1, momentum=0.9, weight_decay=0.0):
    """The official algorithm: torch's SGD on all weights, with the projected gradient."""
    w = start.clone().requires_grad_()
    optimizer = SGD([w], lr, momentum=momentum, weight_decay=weight_decay)
    project = projector(rows)
    path = []
    for _ in range(steps):
        w.grad = project @ gradient(w.detach())
        optimizer.step()
        path.append(w.detach().clone())
    return path


@pytest.mark.parametrize("names", [("w",), ("a", "b")])
def test_iclr_form_takes_the_known_steps(names):
    subspace, live = begun(names=names, form="iclr")
    close(flat(live), 1, 1, 1 / 3, 1)
    path = train(subspace, live, 3)
    close(path[0], 1.076667, 1.016667, 0.323333, 1.046667)
    close(path[1], 1.210278, 1.040611, 0.307333, 1.125444)
    close(path[2], 1.374299, 1.058838, 0.290733, 1.216569)
    assert [loss(w) for w in path] == pytest.approx([0.305056, 0.208789, 0.149610], abs=5e-7)
    close(subspace.coefficients, 0.541783, 0.384052, 0.290733)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"momentum": 0.0}, (1.195899, 1.029238, 0.311433, 1.112569)),
        ({"weight_decay": 1e-2}, (1.369193, 1.054452, 0.289357, 1.211823)),
    ],
)
def test_iclr_form_with_other_settings(settings, expected):
    subspace, live = begun(form="iclr", **settings)
    close(train(subspace, live, 3)[-1], *expected)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_iclr_form_is_projected_sgd_on_all_weights_to_rounding(weight_decay):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    subspace, live = begun(rows, form="iclr", weight_decay=weight_decay)
    ours = train(subspace, live, 20, lr=0.05)
    theirs = projected_sgd(rows, rows.mean(0), 20, lr=0.05, weight_decay=weight_decay)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_iclr_form_converges_to_the_closed_form():
    subspace, live = begun(form="iclr", momentum=0.0)
    train(subspace, live, 3000)
    close(flat(live), 1.52, 0.96, 0.3, 1.24, tolerance=1e-10)
    close(subspace.coefficients, 0.61, 0.33, 0.30, tolerance=1e-10)


def test_one_step_by_hand():
    rows = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.float64)
    subspace, live = begun(rows, form="iclr")
    close(live["w"], 1, 0.5, 0, tolerance=1e-12)
    subspace.step(live, {"w": torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)}, lr=1.0)
    close(live["w"], 0.7, 0.7, 0, tolerance=1e-12)
    close(subspace.coefficients, 0, 0.7, tolerance=1e-12)


def test_centred_form_takes_the_known_steps():
    subspace, live = begun()
    assert subspace.rank == 2
    path = train(subspace, live, 5)
    close(path[0], 1.03, 0.97, 0.323333, 1)
    close(path[1], 1.0825, 0.9175, 0.307333, 1)
    close(path[2], 1.147375, 0.852625, 0.290733, 1)
    close(path[3], 1.213656, 0.786344, 0.278573, 1)
    close(path[4], 1.271261, 0.728739, 0.274057, 1)
    assert [loss(w) for w in path] == pytest.approx([0.364167, 0.340790, 0.324283, 0.320968, 0.328627], abs=5e-7)


def test_centred_weights_sum_to_one_and_converge_to_the_affine_optimum():
    subspace, live = begun(momentum=0.0)
    for _ in range(3):
        train(subspace, live, 1)
        assert float(subspace.coefficients.sum()) == pytest.approx(1, abs=1e-12)
    train(subspace, live, 3000)
    close(flat(live), 1.2, 0.8, 0.3, 1.0, tolerance=1e-10)
    close(subspace.coefficients, 0.45, 0.25, 0.30, tolerance=1e-10)


def test_centred_form_is_sgd_projected_on_the_differences_to_rounding():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    subspace, live = begun(rows)
    ours = train(subspace, live, 20, lr=0.05)
    theirs = projected_sgd(rows[:2] - rows[2], rows.mean(0), 20, lr=0.05)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_adamw_works_on_the_basis_by_falling_singular_value():
    subspace, live = begun(optimizer="adamw")
    close(train(subspace, live, 3)[-1], 1.201467, 0.798533, 0.320091, 1)


def test_journal_form_takes_the_known_steps():
    subspace, live = begun(form="journal")
    path = train(subspace, live, 2)
    close(path[0], 1.056842, 0.943158, 0.322281, 1)
    close(path[1], 1.148687, 0.851313, 0.304946, 1)
    subspace, live = begun(form="journal", optimizer="adamw")
    close(train(subspace, live, 1)[0], 1.137649, 0.862351, 0.233333, 1)


def test_journal_form_has_coefficients_per_tensor_and_leaves_constant_ones_alone():
    rows = torch.cat([ROWS, torch.full((3, 4), 5.0, dtype=torch.float64)], dim=1)
    live = {"w": rows[0, :4].clone(), "constant": rows[0, 4:].clone()}
    subspace = Subspace(live, 3, form="journal", optimizer="adamw")
    for row in rows:
        subspace.collect({"w": row[:4], "constant": row[4:]})
    subspace.begin(live)
    for _ in range(3):
        subspace.step(live, {"w": gradient(live["w"]), "constant": torch.ones(4, dtype=torch.float64)}, lr=0.1)
    assert torch.equal(live["constant"], rows[0, 4:])
    assert live["w"].isfinite().all()
    assert subspace.coefficients.shape == (2, 3)
    torch.testing.assert_close(subspace.coefficients.sum(1), torch.ones(2, dtype=torch.float64))


def basis(subspace, dtype=torch.float32):
    rows = torch.cat(list(subspace._rows.values()), dim=1)
    return (subspace._reach.to(dtype) @ rows.to(dtype)).double()


def test_collinear_snapshots_in_float32_give_one_orthonormal_direction():
    generator = torch.Generator().manual_seed(0)
    start, direction = torch.randn(2, 10_000, generator=generator)
    rows = torch.stack([start + 1e-3 * index * direction for index in range(100)])
    subspace, live = begun(rows)
    p = basis(subspace)
    assert subspace.rank == 1
    assert (p @ p.T - torch.eye(len(p), dtype=torch.float64)).abs().max() < 1e-5
    subspace.step(live, {"w": torch.randn(10_000, generator=generator)}, lr=0.1)
    assert live["w"].isfinite().all()


@pytest.mark.parametrize("relative_step", [0.1, 0.01, 0.001])
def test_basis_of_a_walk_in_float32_is_orthonormal(relative_step):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(100, 20_000, generator=generator)
    rows = torch.randn(20_000, generator=generator) + relative_step * steps.cumsum(0)
    subspace, _ = begun(rows)
    p = basis(subspace)
    assert subspace.rank == 99
    assert (p @ p.T - torch.eye(99, dtype=torch.float64)).abs().max() < 1e-5


def test_duplicates_are_dropped_and_change_nothing():
    plain, live = begun()
    with_duplicate, also_live = begun(torch.cat([ROWS, ROWS[:1]]))
    assert with_duplicate.rank == plain.rank == 2
    for _ in range(3):
        train(plain, live, 1)
        train(with_duplicate, also_live, 1)
    assert flat(also_live).isfinite().all()
    assert with_duplicate.coefficients[0] == pytest.approx(float(with_duplicate.coefficients[3]))
    assert with_duplicate.coefficients.abs().max() < 2


@pytest.mark.parametrize("form", ["centred", "iclr", "journal"])
def test_training_goes_on_bit_for_bit_from_what_was_saved(form):
    optimizer = "sgd" if form == "iclr" else "adamw"
    subspace, live = begun(form=form, optimizer=optimizer, names=("a", "b"))
    train(subspace, live, 3)
    file = io.BytesIO()
    torch.save({"subspace": subspace.save(), "live": live}, file)
    file.seek(0)
    expected = train(subspace, live, 4)
    saved = torch.load(file, weights_only=True)
    again = Subspace(saved["live"], 3, form=form, optimizer=optimizer)
    again.load(saved["subspace"])
    found = train(again, saved["live"], 4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(again.coefficients, subspace.coefficients)


def test_collecting_goes_on_from_what_was_saved():
    live = {"w": ROWS[0].clone()}
    first = Subspace(live, 3)
    first.collect({"w": ROWS[0]})
    second = Subspace(live, 3)
    second.load(first.save())
    for row in ROWS[1:]:
        second.collect({"w": row})
    second.begin(live)
    close(train(second, live, 1)[0], 1.03, 0.97, 0.323333, 1)


@pytest.mark.parametrize("store", ["device", "cpu"])
def test_low_precision_weights_in_channels_last_are_written_in_their_own_form(store):
    generator = torch.Generator().manual_seed(0)
    make = lambda: torch.randn(2, 4, 3, 3, generator=generator)  # noqa: E731
    points = [make() for _ in range(3)]
    live = {"w": points[0].to(torch.bfloat16).to(memory_format=torch.channels_last)}
    subspace = Subspace(live, 3, store=store)
    for point in points:
        subspace.collect({"w": point.to(memory_format=torch.channels_last)})
    subspace.begin(live)
    assert live["w"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(live["w"].float(), torch.stack(points).mean(0), atol=1e-2, rtol=1e-2)


def test_only_the_mean_is_held_beside_the_collected_weights():
    subspace, _ = begun()
    held = [tensor for tensors in (subspace._rows, subspace._centre) for tensor in tensors.values()]
    assert sum(tensor.numel() for tensor in held) == (3 + 1) * 4
    iclr, _ = begun(form="iclr")
    assert not iclr._centre


@pytest.mark.parametrize("form", ["centred", "journal"])
def test_fewer_than_two_different_weights_are_refused(form):
    for rows in (ROWS[:1], ROWS[[0, 0, 0]]):
        live = {"w": ROWS[0].clone()}
        subspace = Subspace(live, 3, form=form)
        for row in rows:
            subspace.collect({"w": row})
        with pytest.raises(ValueError, match="at least two different weights have to be collected"):
            subspace.begin(live)


def test_more_than_memory_holds_is_refused_before_it_is_allocated(monkeypatch):
    like = {"w": torch.empty(10**9, device="meta")}
    monkeypatch.setattr("lightning_merge.optim._subspace.free_bytes", lambda device: 10**9)
    with pytest.raises(
        MemoryError, match=r"51 collected weights .* need 208,000,000,000 bytes on meta, and 1,000,000,000"
    ):
        Subspace(like, 51)
    with pytest.raises(MemoryError, match=r"on cpu.* Take fewer of them"):
        Subspace(like, 51, store="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "paper"}, "`form` must be 'centred', 'iclr' or 'journal', got 'paper'"),
        ({"store": "disk"}, "`store` must be 'device' or 'cpu', got 'disk'"),
        ({"optimizer": "lamb"}, "must be 'sgd' or 'adamw', got 'lamb'"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0, got -1.0"),
        ({"weight_decay": math.nan}, "`weight_decay` must be at least 0, got nan"),
        ({"capacity": 1}, "`capacity` must be at least 2, got 1"),
        ({"form": "iclr", "optimizer": "adamw"}, "AdamW depends on the choice of the basis"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Subspace({"w": torch.zeros(2)}, **({"capacity": 3} | settings))


def test_no_more_is_collected_than_there_is_room_for():
    subspace, live = begun()
    with pytest.raises(ValueError, match="`capacity` is 3, and 3 weights are collected already"):
        subspace.collect(live)
    with pytest.raises(ValueError, match="of another model: `v` is missing"):
        Subspace({"v": torch.zeros(4)}, 3).load(subspace.save())
