"""Times what an average costs each process of a sharded run, against the memory or disk limit measured beside it.

    python benchmarks/scaling.py --repeats 3 --output benchmarks/results/scaling.json

Processes are gloo on this machine, one thread each, and share its memory bandwidth; a limit is measured with all at
work too. Parameters are those of a transformer, each layer sharded by FSDP2 and the rest by the root.

- update: one exponential mean of the parts here. Limit: one flat in-place ``lerp_`` over as many numbers.
- swap: merged parts in place of raw ones and back. Limit: three flat copies, since raw parts are set aside (1), merged
  ones written (2), and raw ones written back (3).
- save: model and average as a sharded checkpoint. Limit: as many bytes written to one file per process and synced.
- resume: the average read back. Limit: as many bytes read into memory from such a file.

Collectives are counted while an update and a swap run: none is the claim, so no byte is communicated. All take turns in
one start of the processes; a figure is the median over rounds of the slowest process, then the median over repeats.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"1 M": (256, 1), "10 M": (256, 13), "100 M": (768, 14), "300 M": (1024, 24)}
WORLDS = (1, 2, 4)
DECAY = 0.999


def model(width: int, layers: int) -> Any:
    """Matrices of 12 widths squared and vectors of 13 widths a layer."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        *(torch.nn.TransformerEncoderLayer(width, 8, 4 * width) for _ in range(layers)), torch.nn.LayerNorm(width)
    )
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in module[:-1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def measure(size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """What this process takes for each, in seconds by round."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.tensor.debug import CommDebugMode

    from lightning_merge import weights
    from lightning_merge.callbacks._publication._sharded import pack, unpack
    from lightning_merge.files._label import KEY
    from lightning_merge.rules import ExponentialMean
    from lightning_merge.shards import sharded_tensors

    module = model(*SIZES[size])
    sharded = sharded_tensors(module)
    rule = ExponentialMean(DECAY)
    state = rule.init(weights.local(sharded))
    merged = rule.init(weights.local(sharded))["average"]
    here = sum(t.numel() for t in weights.local(sharded).values())
    flat = torch.randn(2, here)
    own = folder / f"flat{dist.get_rank()}"
    written: list[int] = []

    def update() -> None:
        rule.update(state, weights.local(sharded))

    def swap() -> None:
        before = weights.exchange(sharded, merged)
        weights.put_back(sharded, before)

    def save_parts() -> None:
        shutil.rmtree(folder / "parts", ignore_errors=True) if dist.get_rank() == 0 else None
        dist.barrier()
        state_dict: dict[str, Any] = dict(get_model_state_dict(module))
        section = {"raw": {}, "states": {"ema": {"state": dict(state)}}}
        pack(section, sharded, state_dict)
        save({"state_dict": state_dict}, checkpoint_id=folder / "parts")
        if dist.get_rank() == 0:
            torch.save({KEY: section}, folder / "parts" / "meta.pt")
        written[:] = [sum(t.to_local().nbytes for t in state_dict.values())]

    def resume() -> None:
        section = torch.load(folder / "parts" / "meta.pt", weights_only=True)[KEY]
        unpack(section, sharded, folder / "parts")

    def write_flat() -> None:
        with own.open("wb") as file:
            for _ in range(2):  # the model and the average
                file.write(flat[0].numpy())
            file.flush()
            os.fsync(file.fileno())

    def read_flat() -> None:
        with own.open("rb") as file:
            file.readinto(flat[0].numpy())

    def copies() -> None:
        for _ in range(3):
            flat[1].copy_(flat[0])

    pairs: dict[str, tuple[Callable[[], None], Callable[[], None], int]] = {
        "update": (update, lambda: flat[0].lerp_(flat[1], 1 - DECAY), rounds),  # type: ignore[dict-item, return-value]
        "swap": (swap, copies, rounds),
        "save": (save_parts, write_flat, 3),
        "resume": (resume, read_flat, 3),
    }
    found: dict[str, Any] = {"numbers": here, "tensors": len(sharded)}
    for name, (ours, limit, times) in pairs.items():
        taken: dict[str, list[float]] = {"ours": [], "limit": []}
        for _ in range(times + 1):
            for key, work in (("limit", limit), ("ours", ours)):
                dist.barrier()
                start = time.perf_counter()
                with torch.no_grad():
                    work()
                taken[key].append(time.perf_counter() - start)
        found[name] = {key: values[1:] for key, values in taken.items()}  # the first one allocates
    with CommDebugMode() as mode, torch.no_grad():
        update()
        swap()
    found["collectives"] = mode.get_total_counts()
    found["checkpoint bytes"] = written[0]
    return found


def one_process(rank: int, world: int, port: int, size: str, rounds: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo")
    (folder / f"found{rank}.json").write_text(json.dumps(measure(size, rounds, folder)))
    dist.barrier()
    dist.destroy_process_group()


def start(world: int, size: str, rounds: int) -> list[dict[str, Any]]:
    """What each process found."""
    import torch.multiprocessing as multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        multiprocessing.start_processes(  # type: ignore[no-untyped-call]
            one_process, (world, port, size, rounds, folder), nprocs=world, start_method="fork"
        )
        return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(world)]


def row(processes: list[dict[str, Any]]) -> dict[str, Any]:
    """One start in figures: of each round the slowest process."""
    found: dict[str, Any] = {}
    for name in ("update", "swap", "save", "resume"):
        slowest = {
            key: [max(times) for times in zip(*(each[name][key] for each in processes), strict=True)]
            for key in ("ours", "limit")
        }
        found[f"{name} ms"] = round(1e3 * statistics.median(slowest["ours"]), 3)
        found[f"{name} over limit"] = round(statistics.median(slowest["ours"]) / statistics.median(slowest["limit"]), 3)
    found["collectives of update and swap"] = max(each["collectives"] for each in processes)
    found["checkpoint MB, all processes"] = round(sum(each["checkpoint bytes"] for each in processes) / 1e6, 1)
    found["numbers in the largest part"] = max(each["numbers"] for each in processes)
    found["tensors"] = processes[0]["tensors"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS), help="numbers of processes")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=15, help="of update and swap")
    parser.add_argument("--repeats", type=int, default=3, help="starts of the processes")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()

    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # once, before the forks

    rows = []
    for size in arguments.sizes:
        for world in arguments.worlds:
            repeats = [row(start(world, size, arguments.rounds)) for _ in range(arguments.repeats)]
            figures = {key: statistics.median(each[key] for each in repeats) for key in repeats[0]}
            rows.append({"parameters": size, "processes": world, **figures})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.output:
                versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
                content = {"command": " ".join(sys.argv), "versions": versions, "seed": 0, "rows": rows}
                arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
