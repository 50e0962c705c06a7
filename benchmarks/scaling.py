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

import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _shared import header, parser, progress, seconds, write

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


class Parts:
    """A sharded model and its average in this process: what is measured, each beside its limit."""

    def __init__(self, size: str, folder: Path) -> None:
        import torch
        import torch.distributed as dist

        from lightning_merge import weights
        from lightning_merge.rules import ExponentialMean
        from lightning_merge.shards import sharded_tensors

        self.folder = folder
        self.module = model(*SIZES[size])
        self.sharded = sharded_tensors(self.module)
        self.rule = ExponentialMean(DECAY)
        self.state = self.rule.init(weights.local(self.sharded))
        self.merged = self.rule.init(weights.local(self.sharded))["average"]
        self.here = sum(t.numel() for t in weights.local(self.sharded).values())
        self.flat = torch.randn(2, self.here)
        self.own = folder / f"flat{dist.get_rank()}"
        self.written = 0

    def update(self) -> None:
        from lightning_merge import weights

        self.rule.update(self.state, weights.local(self.sharded))

    def update_limit(self) -> None:
        self.flat[0].lerp_(self.flat[1], 1 - DECAY)

    def swap(self) -> None:
        from lightning_merge import weights

        before = weights.exchange(self.sharded, self.merged)
        weights.put_back(self.sharded, before)

    def swap_limit(self) -> None:
        for _ in range(3):
            self.flat[1].copy_(self.flat[0])

    def save(self) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict import get_model_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        from lightning_merge.callbacks._publication._sharded import pack
        from lightning_merge.files._label import KEY

        shutil.rmtree(self.folder / "parts", ignore_errors=True) if dist.get_rank() == 0 else None
        dist.barrier()
        state_dict: dict[str, Any] = dict(get_model_state_dict(self.module))
        section = {"raw": {}, "states": {"ema": {"state": dict(self.state)}}}
        pack(section, self.sharded, state_dict)
        save({"state_dict": state_dict}, checkpoint_id=self.folder / "parts")
        if dist.get_rank() == 0:
            torch.save({KEY: section}, self.folder / "parts" / "meta.pt")
        self.written = sum(t.to_local().nbytes for t in state_dict.values())

    def save_limit(self) -> None:
        with self.own.open("wb") as file:
            for _ in range(2):  # the model and the average
                file.write(self.flat[0].numpy())
            file.flush()
            os.fsync(file.fileno())

    def resume(self) -> None:
        import torch

        from lightning_merge.callbacks._publication._sharded import unpack
        from lightning_merge.files._label import KEY

        section = torch.load(self.folder / "parts" / "meta.pt", weights_only=True)[KEY]
        unpack(section, self.sharded, self.folder / "parts")

    def resume_limit(self) -> None:
        with self.own.open("rb") as file:
            file.readinto(self.flat[0].numpy())


def measure(size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of each part in this process, by round, and what was communicated."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode

    parts = Parts(size, folder)
    found: dict[str, Any] = {"numbers": parts.here, "tensors": len(parts.sharded)}
    for name, times in (("update", rounds), ("swap", rounds), ("save", 3), ("resume", 3)):
        taken: dict[str, list[float]] = {"ours": [], "limit": []}
        for _ in range(times + 1):
            for key, work in (("limit", getattr(parts, f"{name}_limit")), ("ours", getattr(parts, name))):
                dist.barrier()
                with torch.no_grad():
                    taken[key].append(seconds(work))
        found[name] = {key: values[1:] for key, values in taken.items()}  # the first one allocates
    with CommDebugMode() as mode, torch.no_grad():
        parts.update()
        parts.swap()
    found["collectives"] = mode.get_total_counts()
    found["checkpoint bytes"] = parts.written
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
    options = parser(__doc__)
    options.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS), help="numbers of processes")
    options.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    options.add_argument("--rounds", type=int, default=15, help="of update and swap")
    options.add_argument("--repeats", type=int, default=3, help="starts of the processes")
    arguments = options.parse_args()

    rows = []
    for size in arguments.sizes:
        for world in arguments.worlds:
            progress(f"{size} parameters in {world} processes")
            repeats = [row(start(world, size, arguments.rounds)) for _ in range(arguments.repeats)]
            figures = {key: statistics.median(each[key] for each in repeats) for key in repeats[0]}
            rows.append({"parameters": size, "processes": world, **figures})
            progress(json.dumps(rows[-1]))
            write({**header(), "seed": 0, "rows": rows}, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
