"""Everything that a run goes on from, as a digest per tensor or value."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_merge.callbacks._publication._callback import Published

Digests = dict[str, str]
"""What it is, as ``weight net.0.bias``, and a digest of its bits."""


def of_state(trainer: Any, module: LightningModule) -> Digests:
    """Weights, buffers, values on the module, optimizers, schedules, averages and random states."""
    found: Digests = {}
    persistent = module.state_dict().keys()
    buffers = dict(module.named_buffers())
    parts: list[tuple[str, Any]] = [
        ("weight", dict(module.named_parameters())),
        ("buffer", {name: buffer for name, buffer in buffers.items() if name in persistent}),
        ("unsaved buffer", {name: buffer for name, buffer in buffers.items() if name not in persistent}),
        ("attribute", dict(_attributes(module))),
    ]
    for index, optimizer in enumerate(trainer.optimizers):
        parts.append((f"optimizer {index}", _by_name(optimizer, module)))
    for index, config in enumerate(trainer.lr_scheduler_configs):
        parts.append((f"schedule {index}", config.scheduler.state_dict()))
    for average in trainer.callbacks:
        if isinstance(average, Published):
            kept = {"updates": average.updates, "steps": average.steps}
            parts.append((f"average {average.name}", {**kept, **(average.merged_weights() or {})}))
    for kind, values in parts:
        found |= {f"{kind} {name}".rstrip(): digest(value) for name, value in flat(values)}
    return found | _random_states()


def of_batch(batch: Any) -> Digests:
    """The batch that training is handed."""
    return {f"batch {name}".rstrip(): digest(value) for name, value in flat(batch)}


def digest(value: Any) -> str:
    """A digest of the bits of a tensor or array, and the text of anything else."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value)) if value.dtype.kind in "biuf" else value.tolist()
    if not isinstance(value, Tensor):
        return repr(value)
    if is_lazy(value):
        return "uninitialized"
    if value.layout != torch.strided:
        value = value.to_dense()
    plain = getattr(value, "to_local", lambda: value)().detach().cpu().contiguous()
    bits = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return f"{tuple(plain.shape)} {plain.dtype} {hashlib.blake2b(bits, digest_size=16).hexdigest()}"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of mappings, dataclasses, lists and tuples, with the way to each."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{name}.{index}" if name else str(index))
    elif isinstance(value, Tensor | np.ndarray | bool | int | float | str | None):
        yield name, value


def _by_name(optimizer: Any, module: LightningModule) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    state = {names.get(id(parameter), "?"): kept for parameter, kept in optimizer.state.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {**state, "group": groups}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Public numbers and tensors that are set on a module and are in none of its registries."""
    for name, part in module.named_modules():
        if isinstance(part, Metric):
            continue
        for key, value in vars(part).items():
            if not key.startswith("_") and isinstance(value, Tensor | np.ndarray | int | float | list | tuple | dict):
                yield (f"{name}.{key}" if name else key), value


def _random_states() -> Digests:
    numpy = np.random.get_state(legacy=False)["state"]
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.append(numpy["key"].astype(np.int64), int(numpy["pos"])),
        "python": repr(random.getstate()),
    }
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return {f"random state {name}": digest(state) for name, state in states.items()}
