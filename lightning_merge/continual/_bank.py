"""A stream of task vectors on disk."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from lightning_merge._checks import flag, instance
from lightning_merge._checks import path as checked_path
from lightning_merge._mergeable import named
from lightning_merge.combiners import EMR, Combiner
from lightning_merge.combiners._base import label
from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.continual._bank_files import damage_of, fingerprint, safetensors_torch, write
from lightning_merge.continual._bank_lock import alone
from lightning_merge.continual._bank_state import empty_of, hashes_of, layout_of, put_together, taken_apart
from lightning_merge.continual._beside import bound, keep_beside, served
from lightning_merge.continual._manifest import (
    NO_STATE,
    combiner_of,
    drop_unnamed,
    new_manifest,
    problems,
    read_manifest,
    refuse_other,
    stamp,
    write_manifest,
)
from lightning_merge.continual._rescue import Rescue
from lightning_merge.importance import Statistics
from lightning_merge.weights import State, Weights

_T = TypeVar("_T")


@final
class Bank:
    """What a combiner has merged of a stream of tasks, in a folder; with ``keep_vectors`` every task vector as well.

    ``bank.json`` names the tasks, the combiner, the base and every other file with its hash; tensors are in safetensors
    files. Of each task the bank keeps the statistics that its combiner weighs by (``Fisher``, ``RegMean`` and their
    kin), and for ``EMR`` the sign of each number, a bit. All files of a step are written and flushed before
    ``bank.json`` is replaced in one go, so a process that is killed leaves the bank as it was before the step or as it
    is after. No vector is held in memory between calls.
    Several processes may have it open: they write one after the other, one that knows an older state of it is told so
    and changes nothing, and one that reads beside a writer reads what is there now.

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
        self._writes = False
        refuse_other(self._manifest, self.combiner, keep_vectors, self.folder)
        safetensors_torch()  # what is missing is said here, not after a task was trained
        if base is not None:
            self._manifest = {**self._manifest, "base": hashes_of(base, self._manifest["base"], self.folder)}

    # ---- what is in it

    @property
    def tasks(self) -> list[int | str]:
        """The tasks that are merged now, in their order."""
        return [entry["task"] for entry in self._merged_entries()]

    @property
    def all_tasks(self) -> list[int | str]:
        """The tasks that were ever added, those removed since included."""
        return [entry["task"] for entry in self._manifest["tasks"]]

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
        return self._reading(lambda: self.rule.result(self._state()) if self.tasks else None)

    def vector(self, task: int | str) -> Weights:
        """A task's vector as it was added.

        Args:
            task: The name it was added under.

        Raises:
            ValueError: If there is no such task, its vector was not kept, or its file is damaged.
        """

        def read() -> Weights:
            entry = self._entry(label("task", task))
            if entry["file"] is None:
                raise ValueError(f"the bank {self.folder} has not kept the vector of task {task}: see `keep_vectors`.")
            return self._vector_of(entry)

        return self._reading(read)

    @property
    def rule(self) -> Combiner:
        """The combiner with the statistics that were kept of the tasks."""
        return bound(self.combiner, self.folder, self._merged_entries())

    def vector_for(self, task: int | str) -> Weights:
        """Of ``EMR``: the vector that serves a task, to be added to the base; one for all tasks is ``result``.

        Args:
            task: The name it was added under.

        Raises:
            ValueError: If the combiner is another, there is no such task, or its file is damaged.
        """
        emr = self.combiner
        if not isinstance(emr, EMR):
            raise ValueError(f"`combiner` must be EMR to serve tasks with vectors of their own, got {emr!r}.")

        def read() -> Weights:
            kept = self._entry(label("task", task))["beside"]
            return served(self._load(kept["file"], kept["sha256"]), emr, emr.result(self._state()) or {})

        return self._reading(read)

    def verify(self) -> list[str]:
        """What is damaged: a sentence for each file that is missing or not as it was written; empty if all is well."""
        found = self._problems()
        while found and self._is_behind():
            found = self._problems()
        return found

    def _problems(self) -> list[str]:
        return problems(self.folder, self._manifest)

    # ---- what changes it

    def preview(
        self, vector: Mapping[str, Tensor], *, task: int | str, statistics: Statistics | None = None
    ) -> Weights:
        """What ``result`` will be after ``add``; nothing is written.

        Args:
            vector: The task vector, by canonical name.
            task: A name for it, not used before.
            statistics: As for ``add``.

        Raises:
            ValueError: As ``add``.
        """
        vector, task = _on_cpu(named("vector", vector)), label("task", task)

        def merged() -> Weights:
            rule = self._rule_with(task, statistics)
            return rule.result(self._updated(vector, task, rule)) or {}

        return self._reading(merged)

    def add(self, vector: Mapping[str, Tensor], *, task: int | str, statistics: Statistics | None = None) -> None:
        """Merges the vector of a further task.

        Args:
            vector: The task vector, by canonical name.
            task: A name for it, not used before.
            statistics: Of the task's weights, which the bank keeps; for combiners that weigh by them and were not given
                any of this task.

        Raises:
            ValueError: If the task is in the bank already, there are no statistics of it, or of another model, the
                vector does not fit the others or holds a NaN, or another process has changed the bank.
        """
        vector, task = _on_cpu(named("vector", vector)), label("task", task)
        with self.alone():
            self._add(vector, task, statistics)

    def _add(self, vector: Weights, task: int | str, statistics: Statistics | None) -> None:
        state = self._updated(vector, task, self._rule_with(task, statistics))
        entry = {"task": task, "removed": False, "fingerprint": fingerprint(vector), "file": None, "sha256": None}
        if self.keeps_vectors:
            entry["file"], entry["sha256"] = write(self.folder, f"vector-{self.added:04d}", vector)
        entry |= keep_beside(self.combiner, self.folder, self.added, vector, statistics)
        self._commit(state, tasks=[*self._manifest["tasks"], entry], tensors=layout_of(vector))

    def remove(self, task: int | str, vector: Mapping[str, Tensor] | None = None) -> None:
        """Unlearns a task: what is merged becomes what it would be without it, and its vector is deleted.

        With every vector kept, the others are merged again, which is exact bit for bit. Otherwise the vector has to be
        handed in and the rule has to be linear (``Combiner.removable``); then it is exact up to the rounding of sums.

        Args:
            task: Its label.
            vector: The very vector that was added.

        Raises:
            TypeError: If the rule is not linear and a vector is handed in.
            ValueError: If there is no such task, it was removed before, it takes a vector that is not there, or another
                process has changed the bank.
        """
        with self.alone():
            self._remove(label("task", task), vector)

    def _remove(self, task: int | str, vector: Mapping[str, Tensor] | None) -> None:
        entry = self._entry(task)
        if vector is not None:
            vector = _on_cpu(named("vector", vector))
            if fingerprint(vector) != entry["fingerprint"]:
                raise ValueError(f"this is not the vector that was added as task {task}: it has another hash.")
            state = self._state()
            self.rule.remove(state, vector, task=task)
        elif self.keeps_vectors:
            state = self._folded([other for other in self._merged_entries() if other is not entry])
        else:
            cure = "hand in its `vector`" if self.combiner.removable else "a bank made with `keep_vectors=True` can"
            raise ValueError(f"the bank has not kept the vector of task {task}, so it cannot remove it: {cure}.")
        gone = {**entry, "removed": True, "file": None, "sha256": None, "beside": None}
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
        with self.alone():
            if rescue is not None:
                self._take_in(Rescue.read(Path(checked_path("rescue", rescue))))
                return
            if not self.keeps_vectors:
                raise ValueError(
                    f"the bank {self.folder} has not kept its vectors, so there is nothing to rebuild it from."
                )
            self._commit(self._folded(self._merged_entries()))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process changes the bank in the block.

        Raises:
            ValueError: If one has changed it since it was opened here, or last read.
        """
        if self._writes:
            yield
            return
        with alone(self.folder):
            known = self.tasks
            if self._is_behind():
                raise ValueError(
                    f"another process has changed the bank {self.folder} since it was read here: its tasks were"
                    f" {known} and are {self.tasks}. Nothing was written. Repeat the step if it still has to be done."
                )
            self._writes = True
            try:
                yield
            finally:
                self._writes = False

    def _is_behind(self) -> bool:
        """Whether the bank on the disk is another one than is known here, which it is from now on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copy that serves was warned of when the bank was opened
            found = read_manifest(self.folder)
        if found is None or stamp(found) == stamp(self._manifest):
            return False
        self._manifest = found
        return True

    def _reading(self, read: Callable[[], _T]) -> _T:
        """What ``read`` gives; again, if a file was gone since another process has put a new one in its place."""
        while True:
            try:
                return read()
            except (ValueError, OSError):
                if self._writes or not self._is_behind():
                    raise

    def _take_in(self, rescued: Rescue) -> None:
        rescued.into(self.folder, self.added, self._manifest["base"])
        self.add(rescued.vector, task=rescued.task, statistics=rescued.statistics)

    # ---- the state

    def _rule_with(self, task: int | str, statistics: Statistics | None) -> Combiner:
        return bound(self.combiner, self.folder, self._merged_entries(), task, statistics)

    def _updated(self, vector: Weights, task: int | str, rule: Combiner) -> State:
        if any(entry["task"] == task for entry in self._merged_entries()):
            raise ValueError(f"task {task!r} is in the bank {self.folder} already. Its tasks: {self.tasks}.")
        check_vector(vector, self._like() if self._manifest["tensors"] else vector, task)
        check_finite(vector, task)
        state = self._state() if self.added else rule.init(vector)
        rule.update(state, vector, task=task)
        return state

    def _state(self) -> State:
        if self.combiner.needs_every_vector:
            return self._folded(self._merged_entries())
        saved = self._manifest["state"]
        order = list(self._manifest["tensors"])
        state = put_together(saved, self._load(saved["file"], saved["sha256"]), order)
        return self.combiner.load(state, {name: torch.device("cpu") for name in order})

    def _folded(self, entries: list[dict[str, Any]]) -> State:
        rule = bound(self.combiner, self.folder, entries)
        state = rule.init(self._like())
        for entry in entries:
            rule.update(state, self._vector_of(entry), task=entry["task"])
        return state

    def _vector_of(self, entry: Mapping[str, Any]) -> Weights:
        tensors = self._load(entry["file"], entry["sha256"])
        return {name: tensors[name] for name in self._manifest["tensors"]}  # a file sorts them

    def _like(self) -> Weights:
        return empty_of(self._manifest["tensors"])

    # ---- files

    def _commit(self, state: State, **changes: Any) -> None:
        """Writes the state, then replaces ``bank.json``: only then anything has happened."""
        saved = dict(NO_STATE)
        if not self.combiner.needs_every_vector:
            rest, flat = taken_apart(self.combiner.save(state))
            file, digest = write(self.folder, "state", flat)
            saved |= {**rest, "file": file, "sha256": digest}
        manifest = {**self._manifest, **changes, "state": saved}
        write_manifest(self.folder, manifest)
        self._manifest = manifest
        drop_unnamed(self.folder, manifest)

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


def _on_cpu(vector: Mapping[str, Tensor]) -> Weights:
    return {name: tensor.detach().cpu() for name, tensor in vector.items()}
