"""Checkpoints on disk: read tensor by tensor, in order, as if all had been loaded."""

import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_merge.files import _lazy
from lightning_merge.files._read import read
from lightning_merge.trajectory import (
    Checkpoint,
    Trajectory,
    by_decay,
    exponential,
    linear,
    mean,
    window,
    wsm_1_sqrt,
    wsm_linear,
)
from lightning_merge.trajectory import _trajectory as trajectories


def model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(700, 400, generator=generator).to(dtype)  # more than one chunk
    return {
        "embed.weight": weight,
        "head.weight": weight,  # tied
        "channels_last": torch.randn(2, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "slice": torch.randn(6, 4, generator=generator)[:, 1:3],
        "scale": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor(seed),
    }


def write(folder, seeds, dtype=torch.float32):
    for seed in seeds:
        state = {"state_dict": model(seed, dtype), "global_step": seed, "epoch": seed // 10, "optimizer_states": [{}]}
        torch.save(state, folder / f"step={seed}.ckpt")
    return folder


def test_run_is_read_in_the_order_of_its_steps(tmp_path):
    trajectory = Trajectory.of_run(write(tmp_path, [9, 10, 100]))
    assert [checkpoint.step for checkpoint in trajectory] == [9, 10, 100]
    assert [checkpoint.epoch for checkpoint in trajectory] == [0, 1, 10]
    assert [checkpoint.step for checkpoint in Trajectory.of_run(tmp_path, last=2)] == [10, 100]
    assert [checkpoint.step for checkpoint in Trajectory.of_run(tmp_path, start=10, end=10)] == [10]
    assert [checkpoint.step for checkpoint in trajectory[1:]] == [10, 100]


def test_of_two_files_of_one_step_one_is_taken_and_the_other_is_named(tmp_path):
    write(tmp_path, [1, 2])
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "step=2.ckpt").read_bytes())
    trajectory = Trajectory.of_run(tmp_path)
    assert len(trajectory) == 2
    assert list(trajectory.left_out.values()) == ["of the same step as last.ckpt"]


def test_tensors_are_those_that_torch_loads(tmp_path):
    path = write(tmp_path, [3]) / "step=3.ckpt"
    expected = torch.load(path, weights_only=True)["state_dict"]
    found = Checkpoint(path).weights()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert found[name].stride() == tensor.stride()
    assert found["embed.weight"] is found["head.weight"]
    assert len(list(Trajectory.of_run(tmp_path).stream())) == 1


@pytest.mark.parametrize("coefficients", [(0.5, -0.25, 0.75), (0.3, 0.3, 0.3)], ids=["any", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_combination_is_the_weighted_sum(tmp_path, dtype, coefficients, monkeypatch):
    monkeypatch.setattr(trajectories, "_CHUNK", 61)
    trajectory = Trajectory.of_run(write(tmp_path, [1, 2, 3], dtype))
    merged = trajectory.combine(coefficients)
    models = [model(seed, dtype) for seed in (1, 2, 3)]
    for name, tensor in merged.items():
        assert tensor.dtype == models[0][name].dtype
        if name == "count":
            assert tensor == 3
            continue
        wide = [each[name].double() for each in models]
        expected = sum(c * w for c, w in zip(coefficients, wide, strict=True))
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-15}.get(tensor.dtype, 1e-2)
        torch.testing.assert_close(tensor.double(), expected, atol=tolerance, rtol=tolerance)
    assert merged["embed.weight"] is merged["head.weight"]


def test_complex_numbers_are_averaged(tmp_path):
    for step, value in ((1, 1 + 2j), (2, 3 - 4j)):
        torch.save({"w": torch.tensor([value])}, tmp_path / f"{step}.ckpt")
    merged = Trajectory.of_files([tmp_path / "1.ckpt", tmp_path / "2.ckpt"]).combine((0.5, 0.5))
    assert merged["w"].tolist() == [2 - 1j]


@pytest.mark.filterwarnings("error")
def test_infinities_that_cancel_are_an_error_and_nothing_else(tmp_path):
    for step, value in ((1, math.inf), (2, -math.inf)):
        torch.save({"w": torch.tensor([value])}, tmp_path / f"{step}.ckpt")
    with pytest.raises(ValueError, match=r"`w` of .*1.ckpt holds a NaN or an infinity"):
        Trajectory.of_files([tmp_path / "1.ckpt", tmp_path / "2.ckpt"]).combine((0.25, 0.75))


@pytest.mark.parametrize("coefficients", [(0.75, 0.25), (0.5, 0.5)])
def test_large_numbers_whose_sum_would_overflow_are_merged(tmp_path, coefficients):
    for step in (1, 2):
        torch.save({"w": torch.full((4,), 3e38)}, tmp_path / f"{step}.ckpt")
    merged = Trajectory.of_files([tmp_path / "1.ckpt", tmp_path / "2.ckpt"]).combine(coefficients)
    torch.testing.assert_close(merged["w"], torch.full((4,), 3e38))


def test_one_checkpoint_alone_is_itself_bit_for_bit_and_others_are_not_read(tmp_path):
    trajectory = Trajectory.of_run(write(tmp_path, [1, 2]))
    os.truncate(tmp_path / "step=2.ckpt", 0)
    merged = trajectory.combine((1.0, 0.0))
    assert all(torch.equal(merged[name], tensor) for name, tensor in model(1).items())
    with pytest.raises(ValueError, match=r"step=2.ckpt ends before `embed.weight` does"):
        trajectory.combine((0.5, 0.5))


def test_safetensors_are_read_without_a_library(tmp_path):
    from safetensors.torch import save_file

    plain = {name: tensor.contiguous().clone() for name, tensor in model(1).items()}
    plain["half"] = torch.randn(3).bfloat16()
    save_file(plain, tmp_path / "a.safetensors")
    found = Checkpoint(tmp_path / "a.safetensors").weights()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    trajectory = Trajectory.of_files([tmp_path / "a.safetensors"] * 2)
    assert torch.equal(trajectory.combine((0.5, 0.5))["scale"], plain["scale"])


def test_folder_of_files_without_steps_is_in_natural_order(tmp_path):
    for number in (10, 9):
        torch.save({"w": torch.tensor(float(number))}, tmp_path / f"{number}.pt")
    assert [c.path.stem for c in Trajectory.of_run(tmp_path, "*.pt")] == ["9", "10"]


def test_raw_weights_of_tied_tensors_are_found_under_both_names(tmp_path):
    tied = torch.zeros(3)
    content = {
        "state_dict": {"a": tied, "b": tied, "c": torch.zeros(2)},
        "lightning_merge": {"format": 1, "holds": "ema", "raw": {"a": torch.ones(3)}},
    }
    torch.save(content, tmp_path / "f.ckpt")
    found = Checkpoint(tmp_path / "f.ckpt", weights="raw").weights()
    assert [float(found[name][0]) for name in "abc"] == [1, 1, 0]


def test_models_that_differ_are_refused_by_name_and_shape(tmp_path):
    torch.save({"w": torch.zeros(2, 3)}, tmp_path / "a.pt")
    torch.save({"w": torch.zeros(3, 2)}, tmp_path / "b.pt")
    torch.save({"v": torch.zeros(2, 3)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"b.pt is of another model than .*a.pt: `w` has shape \(3, 2\) instead"):
        Trajectory.of_files([tmp_path / "a.pt", tmp_path / "b.pt"])
    with pytest.raises(ValueError, match=r"`w` of shape \(2, 3\) is missing"):
        Trajectory.of_files([tmp_path / "a.pt", tmp_path / "c.pt"])


class Unsafe:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_files_that_cannot_be_read_or_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.zeros(1)}, "extra": Unsafe()}, "unsafe.ckpt")
    with pytest.raises(ValueError, match="holds Python objects"):
        Checkpoint("unsafe.ckpt")
    assert not (tmp_path / "was-run").exists()
    with pytest.raises(ValueError, match=r"there is no file missing.ckpt"):
        Checkpoint("missing.ckpt")
    with pytest.raises(ValueError, match=r"there is no file missing.safetensors"):
        Checkpoint("missing.safetensors")
    torch.save({"w": torch.zeros(1)}, "old.pt", _use_new_zipfile_serialization=False)
    assert Checkpoint("old.pt").tensor("w").tolist() == [0.0]  # torch before 1.6, which is read as a whole
    torch.save({"epoch": 3}, "empty.pt")
    with pytest.raises(ValueError, match="holds no weights that could be found"):
        Checkpoint("empty.pt")
    (tmp_path / "cut.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="is no safetensors file"):
        Checkpoint("cut.safetensors")
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "short.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ValueError, match="is no safetensors file"):
        Checkpoint("short.safetensors")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"cannot be read|holds no weights"):
        Checkpoint("pickle.pt")
    with pytest.raises(ValueError, match="`weights` must be 'raw' or 'published', got 'ema'"):
        Checkpoint("unsafe.ckpt", weights="ema")


def test_bad_coefficients_and_nan_are_named(tmp_path):
    trajectory = Trajectory.of_run(write(tmp_path, [1, 2]))
    for bad in ((0.5,), (0.5, math.nan)):
        with pytest.raises(ValueError, match="`coefficients` must be 2 finite numbers"):
            trajectory.combine(bad)
    with pytest.raises(ValueError, match="must not all be 0"):
        trajectory.combine((0.0, 0.0))
    torch.save({"state_dict": model(3) | {"scale": torch.tensor(math.nan)}, "global_step": 3}, tmp_path / "3.ckpt")
    with pytest.raises(ValueError, match=r"`scale` of .*3.ckpt holds a NaN or an infinity. Leave that file out"):
        Trajectory.of_run(tmp_path).combine((0.5, 0.25, 0.25))
    with pytest.raises(ValueError, match=r"no checkpoint in .* matches '\*\.pt'"):
        Trajectory.of_run(tmp_path, "*.pt")
    with pytest.raises(ValueError, match="`last` must be at least 1"):
        Trajectory.of_run(tmp_path, last=0)
    with pytest.raises(ValueError, match="at least one checkpoint"):
        Trajectory([])


def test_hash_is_that_of_the_file(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    torch.save({"w": torch.zeros(1)}, tmp_path / "a.pt")
    expected = subprocess.run(["sha256sum", tmp_path / "a.pt"], capture_output=True, text=True, check=True).stdout
    assert Checkpoint(tmp_path / "a.pt").sha256() == expected.split()[0]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_result_and_a_part_of_a_tensor(tmp_path):
    state = {f"layer{index}": torch.randn(2**20) for index in range(32)}  # 128 MiB
    full = {"optimizer_states": [{"momentum": {name: tensor.clone() for name, tensor in state.items()}}]}
    for step in range(4):
        torch.save({"state_dict": state, "global_step": step} | full, tmp_path / f"{step}.ckpt")
    script = f"""
from pathlib import Path
import torch
from lightning_merge.trajectory import Trajectory
Trajectory.of_run({str(tmp_path)!r}, last=1).combine([1.0])["layer0"].sum()
def peak():  # of this process alone: `ru_maxrss` starts at what the parent had
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
before = peak()
Trajectory.of_run({str(tmp_path)!r}).combine([0.25] * 4)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 2**10 < 40  # MiB beyond what one model takes


def test_coefficients_are_those_of_the_papers():
    assert mean(4) == (0.25,) * 4
    assert linear(4) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert exponential(4, 0.8) == pytest.approx((0.512, 0.128, 0.16, 0.2))
    assert window(5, 2) == (0, 0, 0, 0.5, 0.5)
    assert by_decay((0.8, 0.6, 0.4, 0.2)) == pytest.approx((0.2,) * 5)
    assert wsm_linear(5) == pytest.approx((0.2,) * 5)
    assert wsm_1_sqrt(5) == pytest.approx((0.447214, 0.185242, 0.142141, 0.119831, 0.105573), abs=1e-6)
    cosine = [(1 + math.cos(math.pi * j / 5)) / 2 for j in range(1, 5)]
    assert by_decay(cosine) == pytest.approx((0.095492, 0.25, 0.309017, 0.25, 0.095492), abs=1e-6)
    assert wsm_linear(1) == mean(1) == linear(1) == exponential(1, 0.5) == (1.0,)


def test_decay_map_gives_the_weights_that_the_decayed_updates_lead_to():
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    path = torch.cat([torch.zeros(1, 3, dtype=torch.float64), updates.cumsum(0)])
    shape = (0.9, 0.7, 0.3, 0.1)
    decayed = (torch.tensor(shape, dtype=torch.float64)[:, None] * updates).sum(0)
    merged = (torch.tensor(by_decay(shape), dtype=torch.float64)[:, None] * path).sum(0)
    torch.testing.assert_close(merged, decayed, atol=1e-15, rtol=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mean(0), "`count` must be at least 1"),
        (lambda: window(3, 4), r"`k` must be in \[1, 3\]"),
        (lambda: exponential(3, 1.0), r"`decay` must be in \[0, 1\)"),
        (lambda: by_decay((0.5, 0.6)), "`shape` must fall within"),
        (lambda: by_decay((1.5, 0.6)), "`shape` must fall within"),
    ],
)
def test_bad_coefficient_rules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_module_loads_the_combination(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for step in range(2):
        torch.save({"state_dict": network.state_dict(), "global_step": step}, tmp_path / f"{step}.ckpt")
    network.load_state_dict(Trajectory.of_run(tmp_path).combine((0.5, 0.5)))


def test_older_torch_tells_the_same_places(tmp_path, monkeypatch):
    content = model(0)
    torch.save({"state_dict": content, "global_step": 7}, tmp_path / "file.ckpt")
    new = Checkpoint(tmp_path / "file.ckpt")

    def read_before(path, location="cpu"):
        content = read(path, location)
        if location == "meta":
            for tensor in content["state_dict"].values():  # of tied ones it is the same storage
                vars(tensor.untyped_storage()).pop("_checkpoint_offset", None)
        return content

    monkeypatch.setattr(_lazy, "read", read_before)
    old = Checkpoint(tmp_path / "file.ckpt")
    assert (old.places, old.step) == (new.places, new.step)
    assert all(torch.equal(old.tensor(name), tensor) for name, tensor in content.items())
