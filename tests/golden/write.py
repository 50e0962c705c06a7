"""Wrote ``6af3a7e.tar.xz``: checkpoints as commit 6af3a7e writes them, and what that commit makes of them.

It ran once, with that commit's code, torch 2.14.1, Lightning 2.6.6 and Python 3.11 on a CPU, and is kept to say how:

    git worktree add --detach /tmp/old 6af3a7e
    PYTHONPATH=/tmp/old:tests:tests/callbacks python tests/golden/write.py

The archive is never written again: that files of this format are read, exported and resumed as before is what it is
there to show. A later format gets an archive of its own beside it. In the archive, for every run of ``runs.METHODS`` a
full and a weights-only checkpoint, what the run keeps in folders beside them, and ``expected.pt``:

    saved       the module and its averages right after the full file was written, as a user sees them
    sets        for each file the sets that `inspect` names: their tensors, or None for those that are not in the file
    end         the module, its averages and the optimizer's momenta at the end of the run
    further     the same of a run that goes on from the final file of ``accept-if-better``

and a stream of two tasks with its bank, a file of its second task, a bank per combiner, an FSDP2 folder of two
processes, and a file of a run with a branch in each of two. Every end is that of the uninterrupted run and of one
resumed from the file alike, bit for bit, or nothing is written.
"""

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from golden import pairs, runs, streams
from golden.compare import differing, loaded, sets_in
from processes import launch

from lightning_merge import callbacks as merging
from lightning_merge.cli import main
from lightning_merge.files._layouts import open_file


def inspected(path: Path) -> dict[str, str]:
    """What ``inspect`` says of each set, by its name."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", str(path)]) == 0
    return sets_in(out.getvalue())


def sets_of(path: Path) -> dict[str, Any]:
    """The tensors of each set that the file has, None for one that is only named."""
    there = open_file(path).sets
    return {name: runs.tensors(there[name].weights) if name in there else None for name in inspected(path)}


def method(name: str, into: Path, scratch: Path) -> dict[str, Any]:
    """One run with its files; then the same from its full file."""
    target, first, second = into / name, scratch / f"{name}-1", scratch / f"{name}-2"
    first.mkdir()
    os.chdir(first)
    witness, end = runs.fit(name, first, keep=lambda: shutil.copytree(first, target))
    shutil.copy(first / runs.WEIGHTS, target)
    if name == "accept-if-better":
        shutil.copy(first / runs.FINAL, target)

    shutil.copytree(target, second)
    os.chdir(second)
    resumed, again = runs.fit(name, second, second / runs.FULL)
    same(f"{name}: the end", again, end)
    same(f"{name}: the start", loaded(resumed.started), loaded(witness.saved))

    expected = {
        "saved": witness.saved,
        "sets": {file.name: sets_of(file) for file in target.glob("*.ckpt")},
        "end": end,
    }
    check(name, expected["sets"], witness)
    if name == "accept-if-better":
        further, expected["further"] = runs.fit(name, second, second / runs.FINAL, epochs=4)
        same(f"{name}: the start", loaded(further.started), loaded(end | {"module": witness.last}))
    return expected


def check(name: str, sets: dict[str, Any], witness: runs.Witness) -> None:
    """That the files hold what trained, and what was measured."""
    full, live = sets[runs.FULL], witness.saved["module"]
    same(f"{name}: the raw weights", full["raw"] if "raw" in full else full["weights"], live)
    for average, held in witness.saved["averages"].items():
        if held["merged"]:
            merged = live | {key: tensor.to(live[key]) for key, tensor in held["merged"].items()}
            same(f"{name}: the weights of {average}", full[average], merged)
    weights = next(tensors for tensors in sets[runs.WEIGHTS].values() if tensors is not None)
    assert any(not differing(weights, seen) for seen in witness.validated), f"{name}: nothing that was measured"


def same(what: str, left: Any, right: Any) -> None:
    """Refuses to write what this commit itself does not keep."""
    difference = differing(left, right)
    assert not difference, f"{what} is not the same: {difference}"


def stream(into: Path, scratch: Path) -> dict[str, Any]:
    """Two tasks, the second with a file amid it; a third from there."""
    target, work = into / "stream", scratch / "stream"
    first = streams.stream_task(0, work)
    shutil.copytree(work / "bank", target / "bank-of-one")
    second = streams.stream_task(1, work, keep=lambda: shutil.copy(work / streams.TASK, target))
    shutil.copytree(work / "bank", target / "bank-of-two")
    shutil.copy(work / streams.MERGED, target)
    third = streams.stream_task(2, work)
    shutil.copytree(target / "bank-of-one", scratch / "again" / "bank")
    again = streams.stream_task(1, scratch / "again", target / streams.TASK)
    same("stream: the end", again, second)
    return {"ends": [first, second, third]}


def banks(into: Path, scratch: Path) -> dict[str, Any]:
    """Two vectors in a bank of each combiner; what is merged of them, and of three."""
    expected = {}
    for preset in streams.COMBINERS:
        bank = streams.bank(preset, into / "banks" / preset)
        vectors = list(streams.vectors())
        for task, vector in enumerate(vectors[:2]):
            bank.add(vector, task=task)
        expected[preset] = {"two": runs.tensors(bank.result() or {}), "three": bank.preview(vectors[2], task=2)}
    return expected


def sharded(into: Path, scratch: Path) -> dict[str, Any]:
    """A folder that two processes write."""
    return two_processes(pairs.sharded, pairs.SHARDED, into, scratch, (1, 2))


def per_process(into: Path, scratch: Path) -> dict[str, Any]:
    """A file amid a run with a branch per process."""
    return two_processes(pairs.per_process, pairs.PER_PROCESS, into, scratch, (2, 3))


def two_processes(run: Any, name: str, into: Path, scratch: Path, epochs: tuple[int, int]) -> dict[str, Any]:
    """A run of some epochs that writes a file, and one of more that goes on from it; what each process holds."""
    places = [scratch / f"{run.__name__}{i}" for i in range(3)]
    written = launch(2, run, places[0], epochs[0], None)
    (into / run.__name__).mkdir()
    target = Path(shutil.move(places[0] / name, into / run.__name__))
    straight = launch(2, run, places[1], epochs[1], None)
    resumed = launch(2, run, places[2], epochs[1], target)
    for rank in range(2):
        same(f"{name}: the end", resumed[rank]["end"], straight[rank]["end"])
        start, saved = resumed[rank]["start"], written[rank]["saved"]
        if not saved:  # it was written at the end, when averages were as they are after it
            saved = written[rank]["end"] | {"module": start["module"]}
        same(f"{name}: the start", loaded(start), loaded(saved))
    return {"ranks": resumed, "sets": {name: sets_of(target)}}


def write() -> None:
    """Everything, into the archive."""
    if runs.ARCHIVE.exists():
        raise SystemExit(f"{runs.ARCHIVE} is never written again.")
    used = {type(callback).__name__ for callbacks in runs.METHODS.values() for callback in callbacks()}
    elsewhere = {"ContinualMerging", "BranchStrategy"}
    keep_nothing = {"Doctor", "Published", "teacher"}  # Published is abstract
    assert set(merging.__all__) <= used | elsewhere | keep_nothing
    with tempfile.TemporaryDirectory() as folder:
        into, scratch = Path(folder) / "files", Path(folder) / "scratch"
        into.mkdir()
        scratch.mkdir()
        parts = {name: method(name, into, scratch) for name in runs.METHODS}
        parts |= {part.__name__: part(into, scratch) for part in (stream, banks, sharded, per_process)}
        for name, expected in parts.items():
            torch.save(expected, into / name / "expected.pt")
        with tarfile.open(runs.ARCHIVE, "w:xz") as archive:
            archive.add(into, ".")


if __name__ == "__main__":
    write()
