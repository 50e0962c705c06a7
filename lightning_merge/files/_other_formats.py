"""What a file is that torch did not write, by how it begins: what is sound is not called damaged."""

import io
import os
import pickletools
import shlex
import zipfile

from lightning_merge.files._check import is_zip, opened
from lightning_merge.files._write import is_remote

_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "HDF5, as Keras writes"),
    (b"GGUF", "GGUF, as llama.cpp reads"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"\x1f\x8b", "packed by gzip: unpack it, and name the weights in it"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd: unpack it, and name the weights in it"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z): unpack it, and name the weights in it"),
)
_LEGACY = (119547037146038801333356).to_bytes(10, "little")
"""The number that files of torch before 1.6 begin with."""


def other_format(path: str | os.PathLike[str]) -> str | None:
    """What a file is, and what to do; ``None`` if it may be a checkpoint that was cut short."""
    with opened(path) as file:
        start = file.read(1024)
        if not start:
            return "empty: the save or copy was interrupted"
        if os.fspath(path).endswith(".onnx"):
            return "ONNX: a program, not a file of weights by name"
        for magic, kind in _MAGIC:
            if start.startswith(magic):
                return kind
        if start[257:262] == b"ustar":
            return (
                "an archive (tar), as NeMo writes. Unpack it and name the weights in it:"
                f" tar -xf {shlex.quote(os.fspath(path))}"
            )
        if is_zip(file):
            named = os.fspath(path).endswith(".safetensors")
            return _archive(file) or ("in torch's format: rename it to end in .pt" if named else None)
    return _pickle(start, path) or _text(start)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file is in the format of safetensors, by how it begins; by its name where that is not looked at."""
    named = os.fspath(path).endswith(".safetensors")
    if named or is_remote(path) or not os.path.isfile(path):
        return named
    with opened(path) as file:
        start, size = file.read(9), file.seek(0, 2)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _archive(file: object) -> str | None:
    try:
        with zipfile.ZipFile(file) as parts:  # type: ignore[call-overload]
            names: list[str] = parts.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        return None
    if any(name.endswith("data.pkl") for name in names):
        return None
    if any(name.endswith("archive_format") for name in names):
        return "a program (torch.export): load it with that, and save the `state_dict`"
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy: save them as tensors by name"
    return "an archive (zip): unpack it, and name the weights in it"


def _pickle(start: bytes, path: str | os.PathLike[str]) -> str | None:
    if start[:1] != b"\x80" or _LEGACY in start[:16]:
        return None
    try:
        next(iter(pickletools.genops(io.BytesIO(start))))
    except ValueError:
        return None
    plain = f"{os.path.splitext(os.fspath(path))[0]}.weights.pt"
    code = (
        f"import pickle, torch; x = pickle.load(open({os.fspath(path)!r}, 'rb'), encoding='latin1');"
        f" x = x.get('model', x); torch.save({{k: torch.as_tensor(v) for k, v in x.items()}}, {plain!r})"
    )
    return (
        "a pickle that torch did not write, as those of detectron2's model zoo; to read it would run code. If you trust"
        f" whoever wrote it, convert it once:\n  python -c {in_quotes(code)}"
    )


def _text(start: bytes) -> str | None:
    try:
        text = start[:-3].decode() if len(start) == 1024 else start.decode()
    except UnicodeDecodeError:
        return None
    if any(not letter.isprintable() and not letter.isspace() for letter in text):
        return None
    begins = text.lstrip().lower()
    if begins.startswith("version https://git-lfs"):
        return "a pointer of Git LFS, which stands in the place of the file: `git lfs pull` brings it"
    if begins.startswith(("<!doctype html", "<html", "<?xml")):
        return "a page of the web (HTML), which came in the place of the file: download it again, with what it asks for"
    return "a text, not a file of weights"


def in_quotes(code: str) -> str:
    """A line of Python as an argument, for any shell.

    Windows knows no quotes but double ones; other shells look into those.
    """
    return shlex.quote(code) if any(letter in code for letter in '"$`\\!') else f'"{code}"'
