"""Time and peak memory of a uniform soup of full checkpoints, beside reading the files once and loading them all.

    python benchmarks/soup.py --folder data/soup --output benchmarks/results/soup.json

Writes checkpoints of ViT-B/16 (86 M parameters), plain or with the optimizer state of AdamW. Contestants take
turns, each in a process of its own, with a warm page cache. "read" reads as many bytes as the weights of each file
have, once into one buffer; "read all" all bytes. Peak memory (Linux) is what a process took beyond its imports.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from _shared import child, header, parser, progress, seconds
from _shared import write as save

CONTESTANTS = ("read", "read all", "ours", "load all")


def write(folder: Path, count: int, full: bool) -> None:
    import timm
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = folder / f"{index}.ckpt"
        if not path.exists():
            torch.manual_seed(index)
            state = timm.create_model("vit_base_patch16_224").state_dict()
            content: dict[str, Any] = {"state_dict": state, "global_step": index}
            if full:
                moments = {name: torch.rand_like(tensor) for name, tensor in state.items()}
                content["optimizer_states"] = [
                    {"exp_avg": moments, "exp_avg_sq": {n: t + 1 for n, t in moments.items()}}
                ]
            torch.save(content, path)


def peak_kib() -> int:
    """Of this process alone; `ru_maxrss` starts at what the parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def contestant(name: str, folder: Path) -> dict[str, float]:
    """Seconds of the second of two rounds, and MiB beyond what was taken before."""
    import torch

    from lightning_merge.trajectory import Checkpoint, Trajectory

    paths = sorted(folder.glob("*.ckpt"))
    Checkpoint(paths[0])  # loads what torch loads at its first file
    sizes = {path: sum(p.numbers * p.dtype.itemsize for p in Checkpoint(path).places.values()) for path in paths}
    before = peak_kib()

    def read(whole: bool) -> None:
        buffer = bytearray(2**20)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                left = path.stat().st_size if whole else sizes[path]
                while left > 0 and (count := file.readinto(buffer)):
                    left -= count

    def soup() -> None:
        trajectory = Trajectory.of_run(folder, weights="published")
        trajectory.combine([1 / len(trajectory)] * len(trajectory))

    def load_all() -> None:
        states = [torch.load(path, map_location="cpu", weights_only=True)["state_dict"] for path in paths]
        _ = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}

    work = {"read": lambda: read(False), "read all": lambda: read(True), "ours": soup, "load all": load_all}[name]
    work()
    return {"seconds": seconds(work), "MiB": (peak_kib() - before) / 1024}


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each contestant that has run, and its time over that of reading."""
    table = {
        name: {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        for name, rows in runs.items()
        if rows
    }
    for row in table.values():
        row["over read"] = round(row["seconds"] / table["read"]["seconds"], 3) if "read" in table else 0.0
    return table


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="for the checkpoints: 7 GB plain, 21 GB full")
    options.add_argument("--count", type=int, default=20)
    options.add_argument("--full", action="store_true", help="with optimizer state")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--skip", nargs="*", default=[], choices=CONTESTANTS, help="'load all' holds every model")
    options.add_argument("--child", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        print(json.dumps(contestant(arguments.child, arguments.folder)))
        return
    write(arguments.folder, arguments.count, arguments.full)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS if name not in arguments.skip}
    for _ in range(arguments.rounds):
        for name, found in runs.items():
            progress(name)
            found.append(child(__file__, "--folder", str(arguments.folder), "--child", name))
            table = medians(runs)
            save({**header(threads=True), "files": arguments.count, "median": table, "runs": runs}, arguments.output)
    for name, row in table.items():
        print(f"{name:9} {row['seconds']:8.3f} s  {row['over read']:6.2f} x read  {row['MiB']:9.1f} MiB")


if __name__ == "__main__":
    main()
