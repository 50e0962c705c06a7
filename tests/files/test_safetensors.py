"""Safetensors are read as the library of that name reads them, and what it refuses is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from readers import combined, equal

from lightning_merge.combiners import Sum, combine_files
from lightning_merge.compat import read_weights
from lightning_merge.files._safetensors import _DTYPES, read_header
from lightning_merge.trajectory import Checkpoint, Trajectory

DATA = torch.arange(4.0).numpy().tobytes()


def entry(first: Any, last: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def write(path: Path, header: Any, data: bytes = DATA, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


BAD: dict[str, tuple[Any, ...]] = {
    "overlap": ({"a": entry(0, 12, [3]), "b": entry(4, 16, [3])},),
    "the same bytes twice": ({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])},),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])},),
    "hole at the start": ({"a": entry(4, 16, [3])},),
    "bytes left": ({"a": entry(0, 8, [2])},),
    "beyond the end": ({"a": entry(0, 20, [5])},),
    "backwards": ({"a": entry(16, 0, [4])},),
    "negative": ({"a": entry(-16, 0, [4])},),
    "negative shape": ({"a": entry(0, 16, [-2, -2])},),
    "fractional shape": ({"a": entry(0, 16, [4.0])},),
    "text for a shape": ({"a": entry(0, 16, "4")},),
    "a flag for a size": ({"a": entry(0, 4, [True]), "b": entry(4, 16, [3])},),
    "huge shape": ({"a": entry(0, 16, [2**62, 4])},),
    "NaN": (b'{"a": {"dtype":"F32","shape":[4],"data_offsets":[0,NaN]}}',),
    "infinity": (b'{"a": {"dtype":"F32","shape":[Infinity],"data_offsets":[0,16]}}',),
    "name twice": (
        b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
    ),
    "unknown dtype": ({"a": entry(0, 16, [4], "F33")},),
    "three offsets": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}},),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}},),
    "a list": (b"[]",),
    "no JSON": (b"{",),
    "deep": (b"[" * 100000,),
    "a long header": ({"a": entry(0, 16, [4])}, DATA, 2**40),
    "no header": (b"", b"", 0),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("reader", [read_weights, lambda path: Checkpoint(path).weights()], ids=["read", "lazy"])
def test_what_the_library_refuses_is_refused_by_name(bad: tuple[Any, ...], reader: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", *bad)
    with pytest.raises((safetensors.SafetensorError, ValueError, RuntimeError)):
        safetensors.torch.load_file(path)
    with pytest.raises(
        ValueError, match=r"bad.safetensors cannot be read: it was cut short, or is no safetensors file"
    ):
        reader(path)


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.arange(32, dtype=torch.uint8)
    weights = {name: (bits % 2 if name == "BOOL" else bits.clone()).view(dtype) for name, dtype in _DTYPES.items()}
    weights |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    safetensors.torch.save_file(weights, path := tmp_path / "a.safetensors")
    for found in (read_weights(path), Checkpoint(path).weights()):
        assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
            name: (t.dtype, t.shape) for name, t in weights.items()
        }
        as_bytes = [{name: t.reshape(-1).view(torch.uint8) for name, t in each.items()} for each in (found, weights)]
        assert equal(*as_bytes)


def test_bytes_that_do_not_lie_well_are_read_all_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 1, [1], "U8"), "b": entry(1, 13, [3])}, b"\x07" + DATA[:12])
    for found in (read_weights(path), Checkpoint(path).weights()):
        assert found["a"].tolist() == [7]
        assert found["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.int8])
def test_what_is_not_averaged_may_stay_where_it_is_the_same_and_is_refused_where_it_differs(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    packed = torch.full((4,), 3, dtype=torch.int32).to(dtype)
    for k in (1, 2, 3):
        held = packed if k < 3 else (packed.float() + 1).to(dtype)
        state = {"w": torch.full((4,), float(k)), "packed": held}
        safetensors.torch.save_file(state, tmp_path / f"{k}.safetensors")
        torch.save({"state_dict": state, "global_step": k}, tmp_path / f"{k}.ckpt")
    for suffix in ("safetensors", "ckpt"):
        files = [tmp_path / f"{k}.{suffix}" for k in (1, 2, 3)]
        merged = combined("soup", files[:2], tmp_path / "s.pt")
        assert merged["w"].tolist() == [1.5] * 4
        assert merged["packed"].dtype == dtype
        assert torch.equal(merged["packed"].view(torch.uint8), packed.view(torch.uint8))
        base = [*files[:1], "--base", files[0], "--rule", "model-stock"]
        for more in ([], base[1:]):
            with pytest.raises(ValueError, match=r"`packed` .* only where it is the same in all models"):
                combined("soup", files, tmp_path / "s.pt", *map(str, more))
        with pytest.raises(ValueError, match="`packed` "):
            combine_files(Sum(), files[0], files[1:])


def test_counters_are_those_of_the_last_file_and_named_where_they_are_many(tmp_path: Path) -> None:
    for k in (1, 2):
        state = {
            "w": torch.ones(2),
            "batches": torch.tensor(k),
            "seen": torch.tensor([k, 5]),
            "same": torch.tensor([7, 8]),
        }
        torch.save({"state_dict": state}, tmp_path / f"{k}.pt")
    trajectory = Trajectory.of_files([tmp_path / "1.pt", tmp_path / "2.pt"])
    merged = trajectory.combine((0.5, 0.5))
    assert merged["batches"].item() == 2
    assert merged["seen"].tolist() == [2, 5]
    assert trajectory.differing == ["seen"]


def test_numbers_of_different_kinds_are_refused_by_name(tmp_path: Path) -> None:
    for name, tensor in {"a": torch.ones(4), "b": torch.ones(4).to(torch.float8_e4m3fn)}.items():
        safetensors.torch.save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(ValueError, match=r"`w` cannot be averaged .*float32 in .*a\.safetensors, float8_e4m3fn in"):
        Trajectory.of_files(files).combine((0.5, 0.5))


@pytest.mark.parametrize(("content", "message"), [(b"123", "cut short"), (b"a text, " * 9, "but a text")])
def test_a_remote_file_that_is_none_is_named_as_a_local_one(content: bytes, message: str, tmp_path: Path) -> None:
    for where in ("memory://safetensors/x.safetensors", str(tmp_path / "x.safetensors")):
        with fsspec.open(where, "wb") as file:
            file.write(content)
        with pytest.raises(ValueError, match=message):
            read_header(where)
