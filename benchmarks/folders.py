"""``average`` of sharded folders: the same bits by any number of processes, rate, memory, and what a kill leaves.

    python benchmarks/folders.py --output benchmarks/results/folders.json

Eight folders of the tensors of GPT-2 small (124 M numbers, float32, random) are written by 2 and by 4 processes with
``torch.distributed.checkpoint``, and merged by 1, 2 and 4. Times are of the processor, all processes together, in which
others on the machine do not count, and on the wall; files are in the cache of the system. ``load`` is torch's own of
the same folders, in the same run. Memory is the most that one process had, libraries included.
"""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _shared import child, header, parser, progress, write

FOLDERS, WRITERS, MERGERS = 8, (2, 4), (1, 2, 4)
RATE = 0.7
WIDTH, LAYERS, VOCABULARY, CONTEXT = 768, 12, 50257, 1024


def shapes() -> dict[str, tuple[int, ...]]:
    """Of GPT-2 small."""
    matrices = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
    found: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, WIDTH), "wpe.weight": (CONTEXT, WIDTH)}
    for layer in range(LAYERS):
        for name, (rows, columns) in matrices.items():
            found[f"h.{layer}.{name}.weight"] = (rows * WIDTH, columns * WIDTH)
            found[f"h.{layer}.{name}.bias"] = (rows * WIDTH,)
        for norm in ("ln_1", "ln_2"):
            found |= {f"h.{layer}.{norm}.{part}": (WIDTH,) for part in ("weight", "bias")}
    return {**found, "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}


def written(rank: int, world: int, root: str) -> None:
    """In each of the processes that write."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for step in range(1, FOLDERS + 1):
        numbers, own = torch.Generator().manual_seed(1000 * step + rank), {}
        for name, (rows, *rest) in shapes().items():
            size = -(-rows // world)
            size = max(0, min(size, rows - rank * size))
            part = torch.randn((size, *rest), generator=numbers)
            whole = torch.Size((rows, *rest))
            stride = torch.empty(whole, device="meta").stride()
            own[name] = DTensor.from_local(part, mesh, [Shard(0)], shape=whole, stride=stride)
        save(own, checkpoint_id=Path(root) / "run" / f"step-{step}")
    dist.destroy_process_group()


# ---- what is measured, each in a process of its own, which prints a line of JSON


def used() -> dict[str, float]:
    """Of this process and those it has waited for."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    busy = sum(each.ru_utime + each.ru_stime for each in (own, others))
    return {"processor": round(busy, 2), "own": own.ru_maxrss / 2**10, "others": others.ru_maxrss / 2**10}


def load(root: str) -> dict[str, float]:
    """Torch's own."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    before, start = used()["processor"], time.perf_counter()
    for step in range(1, FOLDERS + 1):
        load({k: torch.empty(s) for k, s in shapes().items()}, checkpoint_id=f"{root}/run/step-{step}", no_dist=True)
    wall = time.perf_counter() - start
    return {**used(), "wall": round(wall, 2), "processor": round(used()["processor"] - before, 2)}


def merge(root: str, out: str, processes: str) -> dict[str, float]:
    """The command."""
    import contextlib
    import io

    from lightning_merge.cli import main as command

    before, start = used()["processor"], time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run = ["average", f"{root}/run", "--pattern", "step-*", "--out", out, "--force", "--processes", processes]
        assert command(run) == 0
    wall = time.perf_counter() - start
    return {**used(), "wall": round(wall, 2), "processor": round(used()["processor"] - before, 2)}


def parts(root: str, out: str) -> dict[str, float]:
    """What the command does beside hashing the inputs: reading, merging and writing."""
    from lightning_merge.trajectory import Trajectory
    from lightning_merge.trajectory._sharded_output import save_parts

    trajectory = Trajectory.of_files(f"{root}/run/step-{step}" for step in range(1, FOLDERS + 1))
    before, start = used()["processor"], time.perf_counter()
    save_parts(trajectory, [1 / FOLDERS] * FOLDERS, out)
    wall = time.perf_counter() - start
    return {**used(), "wall": round(wall, 2), "processor": round(used()["processor"] - before, 2)}


def bits(folder: str) -> dict[str, str]:
    """A digest of all tensors."""
    from lightning_merge.files._places import memory_of
    from lightning_merge.trajectory import Checkpoint

    checkpoint, digest = Checkpoint(folder), hashlib.sha256()
    for name in sorted(checkpoint.places):
        digest.update(memory_of(checkpoint.tensor(name)))
    return {"sha256": digest.hexdigest()}


MEASURES = {each.__name__: each for each in (load, merge, parts, bits)}


# ---- the rows


def killed(root: Path, processes: int) -> dict[str, Any]:
    """The command is killed with half of its output written, over an older output; then it runs again."""
    out = root / "killed"
    child(__file__, "merge", str(root), str(out), "1")
    old = child(__file__, "bits", str(out))["sha256"]
    command = [sys.executable, __file__, "merge", str(root), str(out), str(processes)]
    running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    half = sum(4 * rows * (rest[0] if rest else 1) for rows, *rest in shapes().values()) / 2
    while sum(file.stat().st_size for file in root.glob("killed.*.tmp/*")) < half and running.poll() is None:
        time.sleep(0.02)
    was_running = running.poll() is None
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    left = [path.name for path in root.glob("killed*") if path != out]
    kept = child(__file__, "bits", str(out))["sha256"] == old
    child(__file__, "merge", str(root), str(out), str(processes))
    again = child(__file__, "bits", str(out))["sha256"] == old
    return {"processes": processes, "killed": was_running, "old output kept": kept, "left beside it": len(left),
            "the same after another run": again}  # fmt: skip


def of_writers(world: int, root: Path, rows: dict[str, list[Any]], output: Path | None) -> None:
    """All rows of folders that so many processes wrote; the file has what there is after each."""
    import torch.multiprocessing as mp

    mp.spawn(written, (world, str(root)), nprocs=world)
    progress(f"{FOLDERS} folders were written by {world} processes")
    own = child(__file__, "load", str(root))
    rows["load"].append({"writers": world, **own})
    alone = child(__file__, "parts", str(root), str(root / "parts"))
    rows["read, merged and written"].append({"writers": world, **alone})
    shutil.rmtree(root / "parts")
    for processes in MERGERS:
        out = str(root / f"merged{processes}")
        found = child(__file__, "merge", str(root), out, str(processes))
        most = found["own"] if processes == 1 else found["others"]
        digest = child(__file__, "bits", out)["sha256"]
        row = {"writers": world, "processes": processes, "wall": found["wall"], "processor": found["processor"],
               "memory of a process, MiB": round(most), "sha256": digest}  # fmt: skip
        rows["average"].append(row)
        progress(str(row))
        results(rows, output)
        shutil.rmtree(out)
    rows["rate"].append({
        "writers": world,
        "of load, read, merged and written": round(own["processor"] / alone["processor"], 2),
        "of load, the whole command": round(own["processor"] / rows["average"][-len(MERGERS)]["processor"], 2),
    })  # fmt: skip
    rows["killed"] += [killed(root, processes) for processes in (1, 2)]
    progress(f"{rows['rate'][-1]} {rows['killed'][-2:]}")


def results(rows: dict[str, list[Any]], output: Path | None) -> None:
    write({**header("torch"), "seed": 0, "bar": RATE, **rows}, output)


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in MEASURES:
        import json

        print(json.dumps(MEASURES[sys.argv[1]](*sys.argv[2:])))
        return 0
    options = parser(__doc__)
    options.add_argument("--scratch", type=Path, help="where the folders go, 5 GB; by default the system's")
    arguments = options.parse_args()
    rows: dict[str, list[Any]] = {key: [] for key in ("load", "read, merged and written", "average", "rate", "killed")}
    for world in WRITERS:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as text:
            of_writers(world, Path(text), rows, arguments.output)
        progress(f"done: folders of {world} processes")
        results(rows, arguments.output)
    same = {world: len({row["sha256"] for row in rows["average"] if row["writers"] == world}) == 1 for world in WRITERS}
    progress(f"the same bits by 1, 2 and 4 processes: {same}")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
