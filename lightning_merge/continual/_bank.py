"""A stream of task vectors on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_merge._checks import flag, instance
from lightning_merge._checks import path as checked_path
from lightning_merge._mergeable import named
from lightning_merge.combiners import Combiner
from lightning_merge.combiners._base import label
from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.continual._bank_files import damage, damage_of, fingerprint, safetensors_torch, write
from lightning_merge.continual._manifest import (
    COPY,
    MANIFEST,
    NO_STATE,
    combiner_of,
    manifest_in,
    new_manifest,
    read_manifest,
    write_manifest,
)
from lightning_merge.continual._rescue import Rescue
from lightning_merge.continual._stream_state import StreamState
from lightning_merge.weights import State, Weights


@final
class Bank:
    """What a combiner has merged of a stream of tasks, in a folder; with ``keep_vectors`` every task vector as well.

    ``bank.json`` names the tasks, the combiner, the base and every other file with its hash; tensors are in safetensors
    files. All files of a step are written and flushed before ``bank.json`` is replaced in one go, so a process that is
    killed leaves the bank as it was before the step or as it is after. Nothing is held in memory between calls. Only
    one process may write at a time.

    Args:
        folder: Made by the first ``add``.
        combiner: How vectors are merged. May be left out for a folder that is a bank already.
        base: The weights all vectors are measured against. If given, a bank of another base is refused.
        keep_vectors: Also keeps every vector, which takes one copy of the weights per task: to remove a task later from
            what any rule merged, and for combiners that need every vector.

    Raises:
        ValueError: If the folder is a bank of another combiner, base, or a newer format, or does not go with
            ``keep_vectors``; or if its ``bank.json`` and the copy of it are damaged.

    Example:
        >>> import tempfile, torch
        >>> from lightning_merge import combiners
        >>> bank = Bank(tempfile.mkdtemp(), combiners.Sum(scale=1.0), keep_vectors=True)
        >>> bank.add({"w": torch.tensor([1.0])}, task="cars")
        >>> bank.add({"w": torch.tensor([4.0])}, task="pets")
        >>> bank.result()
        {'w': tensor([5.])}
        >>> bank.remove("cars")
        >>> bank.result(), bank.tasks
        ({'w': tensor([4.])}, ['pets'])
    """

    def __init__(
        self,
        folder: str | Path,
        combiner: Combiner | None = None,
        *,
        base: Mapping[str, Tensor] | None = None,
        keep_vectors: bool = False,
    ) -> None:
        self.folder = Path(checked_path("folder", folder))
        keep_vectors = flag("keep_vectors", keep_vectors)
        if combiner is not None:
            instance("combiner", combiner, Combiner)
        if base is not None:
            named("base", base)
        found = read_manifest(self.folder)
        if found is None and combiner is None:
            raise ValueError(f"there is no bank in {self.folder}: name the `combiner` of a new one.")
        self.combiner = combiner if combiner is not None else combiner_of(found["combiner"])  # type: ignore[index]
        self._manifest = found if found is not None else new_manifest(self.combiner, keep_vectors)
        self._refuse_other(keep_vectors)
        safetensors_torch()  # what is missing is said here, not after a task was trained
        if base is not None:
            self._refuse_other_base(base)

    # ---- what is in it

    @property
    def tasks(self) -> list[int | str]:
        """The tasks that are merged now, in their order."""
        return [entry["task"] for entry in self._merged_entries()]

    @property
    def added(self) -> int:
        """How many tasks were ever added, those removed since included."""
        return len(self._manifest["tasks"])

    @property
    def names(self) -> list[str]:
        """Names of the tensors of every vector; none before the first."""
        return list(self._manifest["tensors"])

    @property
    def keeps_vectors(self) -> bool:
        """Whether every vector is kept."""
        return bool(self._manifest["keep_vectors"])

    def result(self) -> Weights | None:
        """The merged vector, on the CPU; ``None`` if there is no task.

        Raises:
            ValueError: If a file that it takes is damaged.
        """
        return self.combiner.result(self._state()) if self.tasks else None

    def vector(self, task: int | str) -> Weights:
        """A task's vector as it was added.

        Raises:
            ValueError: If there is no such task, its vector was not kept, or its file is damaged.
        """
        entry = self._entry(task)
        if entry["file"] is None:
            raise ValueError(f"the bank {self.folder} has not kept the vector of task {task}: see `keep_vectors`.")
        return self._vector_of(entry)

    def verify(self) -> list[str]:
        """What is damaged: a sentence for each file that is missing or not as it was written; empty if all is well."""
        manifests = [self.folder / name for name in (MANIFEST, COPY)] if self.added else []
        if len(self._manifest["tasks"]) == 1 and not (self.folder / COPY).exists():
            manifests = manifests[:1]  # a process killed during the first write leaves no copy; the next write makes it
        found = [damage(path) for path in manifests if manifest_in(path) is None]
        files = {entry["file"]: entry for entry in self._merged_entries() if entry["file"]}
        state = self._manifest["state"]
        if state["file"] is not None:
            files[state["file"]] = state
        for name, entry in files.items():
            if (sentence := damage_of(self.folder, name, entry["sha256"])) is not None:
                found.append(f"{sentence} (task {entry['task']})" if "task" in entry else sentence)
        return found

    # ---- what changes it

    def preview(self, vector: Mapping[str, Tensor], *, task: int | str) -> Weights:
        """What ``result`` will be after ``add``; nothing is written.

        Raises:
            ValueError: As ``add``.
        """
        state = self._updated(_on_cpu(named("vector", vector)), label("task", task))
        return self.combiner.result(state) or {}

    def add(self, vector: Mapping[str, Tensor], *, task: int | str) -> None:
        """Merges the vector of a further task.

        Raises:
            ValueError: If the task is in the bank already, or the vector does not fit the others or holds a NaN.
        """
        vector, task = _on_cpu(named("vector", vector)), label("task", task)
        state = self._updated(vector, task)
        entry = {"task": task, "removed": False, "fingerprint": fingerprint(vector), "file": None, "sha256": None}
        if self.keeps_vectors:
            entry["file"], entry["sha256"] = write(self.folder, f"vector-{self.added:04d}", vector)
        layout = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in vector.items()}
        self._commit(state, tasks=[*self._manifest["tasks"], entry], tensors=layout)

    def remove(self, task: int | str, vector: Mapping[str, Tensor] | None = None) -> None:
        """Unlearns a task: what is merged becomes what it would be without it, and its vector is deleted.

        With every vector kept, the others are merged again, which is exact bit for bit. Otherwise the vector has to be
        handed in and the rule has to be linear (``Combiner.removable``); then it is exact up to the rounding of sums.

        Args:
            task: Its label.
            vector: The very vector that was added.

        Raises:
            TypeError: If the rule is not linear and a vector is handed in.
            ValueError: If there is no such task, it was removed before, or it takes a vector that is not there.
        """
        entry = self._entry(label("task", task))
        if vector is not None:
            vector = _on_cpu(named("vector", vector))
            if fingerprint(vector) != entry["fingerprint"]:
                raise ValueError(f"this is not the vector that was added as task {task}: it has another hash.")
            state = self._state()
            self.combiner.remove(state, vector, task=task)
        elif self.keeps_vectors:
            state = self._folded([other for other in self._merged_entries() if other is not entry])
        else:
            cure = "hand in its `vector`" if self.combiner.removable else "a bank made with `keep_vectors=True` can"
            raise ValueError(f"the bank has not kept the vector of task {task}, so it cannot remove it: {cure}.")
        gone = {**entry, "removed": True, "file": None, "sha256": None}
        self._commit(state, tasks=[gone if other is entry else other for other in self._manifest["tasks"]])

    def rebuild(self, rescue: str | Path | None = None) -> None:
        """Merges the kept vectors again, after the file of what was merged was damaged; or takes a rescued task in.

        Args:
            rescue: The file that a task has left which was trained and could not be written to the bank
                (``ContinualMerging`` says its name). It is merged with the tasks that are there, and the stream goes on
                after it. Without it the kept vectors are merged again.

        Raises:
            ValueError: If vectors are not kept, or one is damaged; or if the rescued task does not come next.
        """
        if rescue is not None:
            self._take_in(Rescue.read(Path(checked_path("rescue", rescue))))
            return
        if not self.keeps_vectors:
            raise ValueError(
                f"the bank {self.folder} has not kept its vectors, so there is nothing to rebuild it from."
            )
        self._commit(self._folded(self._merged_entries()))

    def _take_in(self, rescued: Rescue) -> None:
        if rescued.number != self.added:
            raise ValueError(
                f"`rescue` must be of task {self.added} of the bank {self.folder}, the next one, got that of task"
                f" {rescued.number}."
            )
        stream = StreamState(self.folder)
        if stream.has_base:
            base = stream.base()
            self._refuse_other_base({name: base[name] for name in rescued.vector})
        before = stream.load(self.added) if self.added else {}
        earlier = {part: tensors for part, tensors in before.items() if part.startswith(("head", "classes"))}
        parts = {part: {**earlier.pop(part, {}), **tensors} for part, tensors in rescued.parts.items()}
        stream.save(self.added + 1, {**earlier, **parts})
        self.add(rescued.vector, task=rescued.task)

    # ---- the state

    def _updated(self, vector: Weights, task: int | str) -> State:
        if any(entry["task"] == task for entry in self._merged_entries()):
            raise ValueError(f"task {task!r} is in the bank {self.folder} already. Its tasks: {self.tasks}.")
        check_vector(vector, self._like() if self._manifest["tensors"] else vector, task)
        check_finite(vector, task)
        state = self._state() if self.added else self.combiner.init(vector)
        self.combiner.update(state, vector, task=task)
        return state

    def _state(self) -> State:
        if self.combiner.needs_every_vector:
            return self._folded(self._merged_entries())
        saved = self._manifest["state"]
        state: State = dict(saved["numbers"])
        for key in saved["groups"]:
            state[key] = {}
        for path, tensor in self._load(saved["file"], saved["sha256"]).items():
            key, _, name = path.partition("/")
            state[key][name] = tensor
        order = list(self._manifest["tensors"])
        for key in saved["groups"]:
            state[key] = {name: state[key][name] for name in order}
        return self.combiner.load(state, {name: torch.device("cpu") for name in order})

    def _folded(self, entries: list[dict[str, Any]]) -> State:
        state = self.combiner.init(self._like())
        for entry in entries:
            self.combiner.update(state, self._vector_of(entry), task=entry["task"])
        return state

    def _vector_of(self, entry: Mapping[str, Any]) -> Weights:
        tensors = self._load(entry["file"], entry["sha256"])
        return {name: tensors[name] for name in self._manifest["tensors"]}  # a file sorts them

    def _like(self) -> Weights:
        return {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in self._manifest["tensors"].items()
        }

    # ---- files

    def _commit(self, state: State, **changes: Any) -> None:
        """Writes the state, then replaces ``bank.json``: only then anything has happened."""
        saved = dict(NO_STATE)
        if not self.combiner.needs_every_vector:
            state = self.combiner.save(state)
            groups = {key: value for key, value in state.items() if isinstance(value, dict)}
            flat = {f"{key}/{name}": tensor for key, group in groups.items() for name, tensor in group.items()}
            saved["numbers"] = {key: value for key, value in state.items() if key not in groups}
            saved["groups"] = list(groups)
            saved["file"], saved["sha256"] = write(self.folder, "state", flat)
        manifest = {**self._manifest, **changes, "state": saved}
        write_manifest(self.folder, manifest)
        self._manifest = manifest
        named = {saved["file"], *(entry["file"] for entry in manifest["tasks"])}
        for pattern in ("state-*", "vector-*"):
            for path in self.folder.glob(pattern):
                if path.name not in named:
                    path.unlink()

    def _load(self, name: str, digest: str) -> Weights:
        if (sentence := damage_of(self.folder, name, digest)) is not None:
            cure = "The other files of the bank are not affected"
            if name.startswith("state") and self.keeps_vectors:
                cure += ": `rebuild()` merges the kept vectors again"
            raise ValueError(f"{sentence} {cure}.")
        tensors: Weights = safetensors_torch().load_file(self.folder / name)
        return tensors

    # ---- entries

    def _merged_entries(self) -> list[dict[str, Any]]:
        return [entry for entry in self._manifest["tasks"] if not entry["removed"]]

    def _entry(self, task: int | str) -> dict[str, Any]:
        known = [entry for entry in self._manifest["tasks"] if entry["task"] == task]
        if not known:
            raise ValueError(f"there is no task {task!r} in the bank {self.folder}. Its tasks: {self.tasks}.")
        if known[-1]["removed"]:
            raise ValueError(f"task {task!r} was removed from the bank {self.folder} already. Its tasks: {self.tasks}.")
        entry: dict[str, Any] = known[-1]
        return entry

    def _refuse_other(self, keep_vectors: bool) -> None:
        if self._manifest["combiner"] != repr(self.combiner):
            raise ValueError(
                f"the bank {self.folder} was merged by {self._manifest['combiner']}, and `combiner` is {self.combiner}:"
                " use the same, or a new folder."
            )
        if keep_vectors and not self.keeps_vectors:
            raise ValueError(f"the bank {self.folder} has not kept earlier vectors: `keep_vectors` must stay False.")
        if self.combiner.needs_every_vector and not self.keeps_vectors:
            raise ValueError(f"{self.combiner} needs every vector: make the bank with `keep_vectors=True`.")

    def _refuse_other_base(self, base: Mapping[str, Tensor]) -> None:
        hashes = {name: fingerprint({name: tensor.detach().cpu()}) for name, tensor in base.items()}
        known = self._manifest["base"] or hashes
        for name in [*known, *hashes]:
            if known.get(name) != hashes.get(name):
                there, here = (found.get(name, "of no tensor")[:16] for found in (known, hashes))
                raise ValueError(
                    f"the bank {self.folder} is of another base: `{name}` has hash {there} in it and {here} here. Its"
                    " vectors add up only on the weights they were measured against."
                )
        self._manifest = {**self._manifest, "base": hashes}


def _on_cpu(vector: Mapping[str, Tensor]) -> Weights:
    return {name: tensor.detach().cpu() for name, tensor in vector.items()}
