"""The manifest of a bank: its tasks, combiner and base, and every other file with its hash."""

import ast
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_merge import combiners
from lightning_merge._said import is_said
from lightning_merge.combiners import Combiner
from lightning_merge.continual._bank_files import damage, damage_of, put

_FORMAT = 1
NO_STATE: dict[str, Any] = {"file": None, "sha256": None, "numbers": {}, "groups": []}
MANIFEST, COPY = "bank.json", "bank-copy.json"


def new_manifest(combiner: Combiner, keep_vectors: bool) -> dict[str, Any]:
    """That of a bank without tasks."""
    return {
        "format": _FORMAT,
        "combiner": repr(combiner),
        "keep_vectors": keep_vectors,
        "base": None,
        "tensors": {},
        "tasks": [],
        "state": NO_STATE,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder's manifest says, or its copy if it is damaged; ``None`` if there is neither.

    Raises:
        ValueError: If both are damaged, or were written by a newer version.
    """
    paths = [folder / name for name in (MANIFEST, COPY)]
    if not any(path.exists() for path in paths):
        return None
    for path in paths:
        if (found := manifest_in(path)) is not None:
            return found
        warnings.warn(f"{damage(path)} The next step that changes the bank writes it again.", stacklevel=3)
    raise ValueError(
        f"{damage(paths[0])} So is its copy, {COPY}. Files of vectors can still be read with safetensors; to go"
        " on with the bank, restore one of the two from a backup."
    )


def stamp(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """What differs between two states of a bank: entries of tasks are only added, or marked as removed."""
    return manifest["tasks"], manifest["state"]


def problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """A sentence for each file of a bank that is missing or not as it was written."""
    tasks = manifest["tasks"]
    manifests = [folder / name for name in (MANIFEST, COPY)] if tasks else []
    if len(tasks) == 1 and not (folder / COPY).exists():
        manifests = manifests[:1]  # a process killed during the first write leaves no copy; the next write makes it
    found = [damage(path) for path in manifests if manifest_in(path) is None]
    for kept, task in _files(manifest):
        if (sentence := damage_of(folder, kept["file"], kept["sha256"])) is not None:
            found.append(sentence if task is None else f"{sentence} (task {task})")
    return found


def drop_unnamed(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Removes the files of the step before, and of writers that were killed."""
    named = {kept["file"] for kept, _ in _files(manifest)}
    for pattern in ("state-*", "vector-*", "beside-*", "*.part"):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink()


def _files(manifest: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Any]]:
    """What is said of each file, and its task where it is of one."""
    of_tasks = [each for each in manifest["tasks"] if not each["removed"]]
    found = [(kept, each["task"]) for each in of_tasks for kept in (each, each.get("beside") or NO_STATE)]
    return [(kept, task) for kept, task in [*found, (manifest["state"], None)] if kept["file"] is not None]


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replaces the manifest, then its copy."""
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
    for name in (MANIFEST, COPY):
        part = folder / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        put(folder, part, folder / name)


def manifest_in(path: Path) -> dict[str, Any] | None:
    """The manifest that a file holds; ``None`` if it is damaged."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        newer = manifest["format"] > _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if newer:
        raise ValueError(
            f"{path} has format {manifest['format']}; this version of lightning-merge reads up to {_FORMAT}. Update it."
        )
    digest = manifest.pop("sha256", None)
    return manifest if digest == _digest(manifest) else None


def refuse_other(manifest: Mapping[str, Any], combiner: Combiner, keep_vectors: bool, folder: Path) -> None:
    """Raises a ``ValueError`` if a bank was made with another combiner, or keeps vectors where it must not, or not."""
    if not is_said(manifest["combiner"], combiner):
        raise ValueError(
            f"the bank {folder} was merged by {manifest['combiner']}, and `combiner` is {combiner}: use the same, or a"
            " new folder."
        )
    if keep_vectors and not manifest["keep_vectors"]:
        raise ValueError(f"the bank {folder} has not kept earlier vectors: `keep_vectors` must stay False.")
    if combiner.needs_every_vector and not manifest["keep_vectors"]:
        raise ValueError(f"{combiner} needs every vector: make the bank with `keep_vectors=True`.")


def combiner_of(text: str) -> Combiner:
    """The combiner whose ``repr`` this is."""

    def value_of(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in combiners.__all__:
            return getattr(combiners, node.func.id)(**{k.arg: value_of(k.value) for k in node.keywords if k.arg})
        return ast.literal_eval(node)

    try:
        found = value_of(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"the bank was merged by {text}, which is not of lightning-merge: name it as `combiner`."
        ) from error
    assert isinstance(found, Combiner)
    return found


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
