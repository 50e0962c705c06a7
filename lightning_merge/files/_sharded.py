"""Sharded checkpoints: folders that ``torch.distributed.checkpoint`` writes, each process its parts of tensors.

Lightning puts ``state_dict`` and optimizer states there, and what the first process knows besides into ``meta.pt``. Our
tensors are beside the optimizer states, as those of a further one that nobody asks for, and ``meta.pt`` has their
names. (Earlier versions put them into ``state_dict``.) Converters of Lightning and torch make one file of a folder.
"""

import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_merge.files._label import KEY
from lightning_merge.files._sharded_metadata import refuse_code

META = "meta.pt"
"""What Lightning's first process knows beside tensors."""

PROVENANCE = "provenance.json"
"""Of what a merged folder was made."""
_PREFIX = "state_dict."
_OF_TRAINING = ("optim", "state.optim", "train_state.", "lr_scheduler", "dataloader.")  # also as torchtitan calls it


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether it is such a folder, or what is left of one."""
    return path.is_dir() and ((path / META).exists() or (path / ".metadata").exists())


def check_parts(path: Path, needed: tuple[str, ...] = (".metadata", META)) -> None:
    """Raises before anything is read.

    Args:
        path: The folder.
        needed: Files that describe it; what ``.metadata`` lists is needed besides.

    Raises:
        ValueError: If files of a sharded checkpoint are missing or cut short.
    """
    expected = dict.fromkeys((path / name for name in needed), 1)
    if (path / ".metadata").is_file():
        refuse_code(path / ".metadata")
        try:
            stored_parts = sharded_reader(path).read_metadata().storage_data.values()
        except (EOFError, pickle.UnpicklingError):
            stored_parts = ()
            expected[path / ".metadata"] = (path / ".metadata").stat().st_size + 1
        for stored in stored_parts:
            file = path / stored.relative_path
            expected[file] = max(expected.get(file, 0), stored.offset + stored.length)
    wrong = [file for file, size in expected.items() if not file.is_file() or file.stat().st_size < size]
    if wrong:
        names = ", ".join(sorted(file.name for file in wrong))
        raise ValueError(
            f"the sharded checkpoint {path} lacks parts, or they were cut short: {names}. An interrupted save or copy"
            " does that: copy the folders of all machines into one, or use an earlier checkpoint."
        )


def read_folder(path: Path, load: Callable[[Path], Any], outlines: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """The content of a sharded checkpoint as that of a checkpoint in one file, without optimizer states.

    In one process and in host memory.

    Args:
        path: The folder.
        load: Reads ``meta.pt``.
        outlines: Gets the tensors of the content by their keys in the folder; they are on "meta" then, and no numbers
            are read.

    Raises:
        ValueError: If parts are missing, or ``.metadata`` would run code.
    """
    if not (path / META).exists() and (found := _without_lightning(path, outlines)) is not None:
        return found
    check_parts(path)
    content: dict[str, Any] = load(path / META)
    device = "cpu" if outlines is None else "meta"
    tensors = read_tensors(path, lambda _, size, dtype: torch.empty(size, dtype=dtype, device=device), False, outlines)
    whole: dict[str, Any] = together({**content, "state_dict": tensors})
    return whole


def _without_lightning(path: Path, outlines: dict[str, Tensor] | None) -> dict[str, Any] | None:
    """The tensors that ``torch.distributed.checkpoint`` alone saved, nested as they were; ``None`` if it is ours."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    check_parts(path, (".metadata",))
    metadata = sharded_reader(path).read_metadata()
    if any(is_part(key.partition(".")[2]) for key in metadata.state_dict_metadata):
        return None
    ways = metadata.planner_data or {}  # of each key how it was nested
    targets = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu" if outlines is None else "meta")
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not key.startswith(_OF_TRAINING)
    }
    if _is_of_one_object(ways):  # as the `app` of torch's tutorial
        ways = {key: way[1:] for key, way in ways.items()}
        targets = {key: t for key, t in targets.items() if not f"{ways[key][0]}.".startswith(_OF_TRAINING)}
    if outlines is not None:
        outlines |= targets
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled")  # as it is meant to be
        if targets and outlines is None:
            load(targets, storage_reader=sharded_reader(path), no_dist=True)
    content: dict[str, Any] = {}
    for key, tensor in targets.items():
        *outer, last = ways.get(key, (key,))
        inside = content
        for step in outer:
            inside = inside.setdefault(step, {})
        inside[last] = tensor
    return content


def _is_of_one_object(ways: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether all is under one key that holds a model and more."""
    return (
        len({way[0] for way in ways.values()}) == 1
        and {"model", "state_dict"} & {str(way[1]) for way in ways.values() if len(way) > 2} != set()
    )


def together(content: Any) -> Any:
    """The content of a file with our tensors where they belong, wherever the parts of a folder were put in it."""
    holders = {k: each for k, each in content.items() if isinstance(each, Mapping) and any(map(is_part, each))}
    if not holders:
        return content
    parts = {name: t for each in holders.values() for name, t in each.items() if is_part(name)}
    rest = {k: {name: t for name, t in each.items() if not is_part(name)} for k, each in holders.items()}
    found = {k: rest.get(k, value) for k, value in content.items() if rest.get(k, True)}
    if KEY in found:
        states = {name: dict(state) for name, state in found[KEY].get("states", {}).items()}
        found[KEY] = {**found[KEY], **({"states": states} if "states" in found[KEY] else {})}
        fill(found[KEY], parts)
    return found


def is_part(name: object) -> bool:
    """Whether a name in a folder, or in what was made of one, is that of a tensor of ours."""
    return isinstance(name, str) and name.startswith(f"{KEY}/")


def read_tensors(
    path: Path, make: Any, ours_alone: bool = False, outlines: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Tensors of ``state_dict``, and ours, read into what ``make(name, size, dtype)`` gives; or ours alone.

    With ``outlines`` they are put there by key, and nothing is read into them.

    With several processes all must call this.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = sharded_reader(path).read_metadata().state_dict_metadata
    names = {key: key.partition(".")[2] for key, found in stored.items() if isinstance(found, TensorStorageMetadata)}
    wanted = [k for k, n in names.items() if is_part(n) or (k.startswith(_PREFIX) and not ours_alone)]
    targets = {key: make(names[key], stored[key].size, stored[key].properties.dtype) for key in wanted}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if outlines is not None:
        outlines |= targets
    elif targets:
        load(targets, storage_reader=sharded_reader(path), no_dist=not distributed)
    return {names[key]: tensor for key, tensor in targets.items()}


def fill(section: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of their names."""
    for holder, key in mergeable(section):
        holder[key] = tree_map(lambda leaf: tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf, holder[key])


def mergeable(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where in a section tensors of merged parameters are: not among kept batches, whose names are the user's."""
    if "states" in section:
        yield section, "raw"
        for state in section["states"].values():
            if "state" in state:
                yield state, "state"


def provenance_of(path: Path) -> dict[str, Any] | None:
    """Of what a folder was merged; ``None`` if it says nothing of it.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        found = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path / PROVENANCE} cannot be read: it is no JSON ({error}). Delete it.") from error
    return found if isinstance(found, dict) else None


def sharded_reader(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(path)
