"""A corpus of small sound files and folders in the layouts of other libraries, each with what is right for it.

Of each: where it is, and the weights that it publishes, or a part of the sentence that it is refused with.
"""

import argparse
import io
import json
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

Weights = dict[str, Tensor]
Made = tuple[Path, Weights | str]

W: Weights = {"net.weight": torch.arange(6.0).view(2, 3), "net.bias": torch.tensor([0.5, -0.5])}
EMA: Weights = {name: tensor + 10 for name, tensor in W.items()}
LORA: Weights = {
    f"base_model.model.q.lora_{part}.weight": torch.ones(shape) for part, shape in (("A", (2, 4)), ("B", (4, 2)))
}


ARGS = argparse.Namespace(lr=1)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def _wrapped(weights: Weights) -> Weights:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


class Detector(nn.Module):
    """A network that is pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.load_state_dict(W)


def _optimizer() -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def _file(name: str, content: Any, expected: Weights | str = W, **how: Any) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        torch.save(content() if callable(content) else content, folder / name, **how)
        return folder / name, expected

    return make


def _written(name: str, content: bytes | str, expected: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name, expected

    return make


def _safetensors(path: Path, weights: Weights) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    return path


def _folder(weights: dict[str, Weights], others: dict[str, Any], at: str = "", expected: Weights | str = W) -> Any:
    """A folder of safetensors and JSON files."""

    def make(folder: Path) -> Made:
        place = folder / "it"
        place.mkdir()
        for name, tensors in weights.items():
            _safetensors(place / name, tensors)
        for name, content in others.items():
            (place / name).write_text(json.dumps(content))
        return place / at, expected

    return make


def _shards(suffix: str, at: str = "") -> Callable[[Path], Made]:
    stem = "model" if suffix == "safetensors" else "pytorch_model"

    def make(folder: Path) -> Made:
        place = folder / "it"
        place.mkdir()
        names = {name: f"{stem}-0000{i}-of-00002.{suffix}" for i, name in enumerate(W, 1)}
        for name, file in names.items():
            if suffix == "safetensors":
                _safetensors(place / file, {name: W[name]})
            else:
                torch.save({name: W[name]}, place / file)
        index = place / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": names}))
        (place / "config.json").write_text("{}")
        return (index if at == "index" else place), W

    return make


def _distributed(content: Any, expected: Weights | str = W) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        dcp.save(content, checkpoint_id=folder / "it", no_dist=True)
        return folder / "it", expected

    return make


def _nemo_archive(folder: Path) -> Made:
    torch.save(W, folder / "model_weights.ckpt")
    with tarfile.open(folder / "it.nemo", "w") as archive:
        archive.add(folder / "model_weights.ckpt", "model_weights.ckpt")
    (folder / "model_weights.ckpt").unlink()
    return folder / "it.nemo", "an archive .*tar -xf"


def _nemo_pair(folder: Path) -> Made:
    for name, weights in (("it-EMA.ckpt", EMA), ("it.ckpt", W)):
        torch.save({"state_dict": weights, "pytorch-lightning_version": "2.4.0", "global_step": 1}, folder / name)
    return folder / "it-EMA.ckpt", EMA


def _program(folder: Path) -> Made:
    torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(str(folder / "it.pt"))
    return folder / "it.pt", r"a program \(TorchScript\)"


def _zip(name: str, part: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(part, name)
    return held.getvalue()


def _npz() -> bytes:
    held = io.BytesIO()
    np.savez(held, w=np.ones(2))
    return held.getvalue()


CORPUS: dict[str, Callable[[Path], Made]] = {
    "Lightning": _file(
        "it.ckpt", {"state_dict": W, "pytorch-lightning_version": "2.6.0", "global_step": 1, "epoch": 0}
    ),
    "a state dict": _file("it.pt", OrderedDict(W)),
    "torch before 1.6": _file("it.pth", W, _use_new_zipfile_serialization=False),
    "detectron2": _file(
        "it.pth", lambda: {"model": W, "optimizer": _optimizer(), "scheduler": {"last_epoch": 3}, "iteration": 9}
    ),
    "model_state_dict": _file(
        "it.pt", lambda: {"epoch": 1, "model_state_dict": W, "optimizer_state_dict": _optimizer(), "loss": 0.1}
    ),
    "torchvision's references": _file(
        "it.pth",
        lambda: {
            "model": W,
            "optimizer": _optimizer(),
            "model_ema": {"n_averaged": torch.tensor(3), **_wrapped(EMA)},
            "args": ARGS,
        },
        EMA,
    ),
    "model and ema": _file("it.pt", {"model": W, "ema": EMA, "step": 3}, EMA),
    "timm": _file("it.pth.tar", {"arch": "x", "state_dict": W, "state_dict_ema": EMA, "epoch": 1, "args": ARGS}, EMA),
    "BasicSR": _file("it.pth", {"params": W, "params_ema": EMA}, EMA),
    "fairseq": _file(
        "it.pt",
        {
            "args": None,
            "cfg": {"lr": 1},
            "model": W,
            "optimizer_history": [{"num_updates": 3}],
            "extra_state": {"epoch": 1},
            "last_optimizer_state": {},
        },
    ),
    "Composer": _file(
        "it.pt", lambda: {"state": {"model": W, "optimizers": {"AdamW": _optimizer()}}, "rng": [{"python": 1}]}
    ),
    "DeepSpeed": _file(
        "mp_rank_00_model_states.pt", {"module": W, "buffer_names": [], "optimizer": None, "global_steps": 3}
    ),
    "MMEngine": _file(
        "it.pth",
        {
            "meta": {"epoch": 1},
            "state_dict": EMA,
            "ema_state_dict": {"steps": torch.tensor(2), **_wrapped(W)},
            "message_hub": {},
        },
        EMA,
    ),
    "MMEngine without EMA": _file("it.pth", {"meta": {"epoch": 1}, "state_dict": W, "optimizer": {}}),
    "a list of weights without names": _file(
        "it.pt", {"decay": 0.99, "num_updates": 3, "shadow_params": list(W.values())}, "without names"
    ),
    "a pair of NeMo's EMA": _nemo_pair,
    "NeMo's archive": _nemo_archive,
    "ultralytics": _file(
        "best.pt", lambda: {"epoch": 3, "model": Detector(), "ema": None, "train_args": {"lr": 1}}, "convert it once"
    ),
    "a pickled module": _file("it.pt", Detector, "convert it once"),
    "TorchScript": _program,
    "transformers": _folder({"model.safetensors": W}, {"config.json": {}}),
    "transformers, sharded": _shards("safetensors"),
    "the index of shards": _shards("safetensors", "index"),
    "transformers, sharded by torch": _shards("bin"),
    "peft": _folder({"adapter_model.safetensors": LORA}, {"adapter_config.json": {"peft_type": "LORA"}}, expected=LORA),
    "diffusers, one model": _folder({"diffusion_pytorch_model.safetensors": W}, {"config.json": {}}),
    "diffusers, a pipeline": _folder(
        {f"{part}/diffusion_pytorch_model.safetensors": W for part in ("unet", "vae")},
        {"model_index.json": {}},
        expected="Name one of them: .*unet, .*vae",
    ),
    "a run of transformers": _folder(
        {"checkpoint-10/model.safetensors": W, "checkpoint-20/model.safetensors": W},
        {},
        expected="Name one of them: .*checkpoint-10",
    ),
    "a folder of nothing": _folder({}, {}, expected="no weights"),
    "torch.distributed": _distributed(dict(W)),
    "torch.distributed, nested": _distributed({"model": W, "optim": {"lr": torch.ones(1)}, "step": 3}),
    "safetensors by another name": lambda folder: (_safetensors(folder / "it.bin", W), W),
    "torch's format as safetensors": _file("it.safetensors", W, "in torch's format: rename it"),
    "detectron2's model zoo": _written(
        "it.pkl", pickle.dumps({"model": {"w": np.ones(2)}, "__author__": "x"}), "pickle"
    ),
    "a pointer of git-lfs": _written("it.safetensors", POINTER, "git lfs pull"),
    "a page of the web": _written("it.ckpt", "<!DOCTYPE html><html></html>", "page of the web|HTML"),
    "ONNX": _written("it.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.4.0", "ONNX"),
    "HDF5": _written("it.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "GGUF": _written("it.gguf", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    "NumPy": _written("it.npz", _npz(), "NumPy"),
    "some archive": _written("it.zip", _zip("hello", "a.txt"), "archive"),
}
