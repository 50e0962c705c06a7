"""Holds the formulas of ``_scale.py`` against what tiny models hold, send and write in 1, 2 and 4 processes.

    python benchmarks/scale.py --output benchmarks/results/scale.json

Processes are gloo on this machine; nothing is timed. Sharded models are a transformer under FSDP2, branches a stack of
linear layers with AdamW. A figure is of all processes together where a formula is of an even share of each.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from _costs import FLOAT, Sent
from _scale import (
    average,
    diloco,
    in_turn,
    merge_folders,
    per_process,
    recalibration,
    save_branches,
    save_parts,
    streaming,
    window,
)
from _shared import header, parser, progress, write
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

WORLDS = (1, 2, 4)
FRAGMENTS, LAYERS = 8, 64
FOLDERS = 3


def held(value: Any) -> int:
    """Bytes of the tensors in it, as many as are in this process."""
    leaves = [each for each in tree_leaves(value) if isinstance(each, Tensor)]
    return sum((each.to_local() if hasattr(each, "to_local") else each).nbytes for each in leaves)


def sharded(world: int, folder: Path) -> list[dict[str, Any]]:
    """Averages, their files, and forward passes, under FSDP2."""
    from scaling import model
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    from lightning_merge import weights
    from lightning_merge.rules import ExponentialMean, WindowMean
    from lightning_merge.shards import sharded_tensors

    module = model(256, 2)
    n = sum(parameter.numel() for parameter in module.parameters())
    local = weights.local(sharded_tensors(module))
    rows = []
    with Sent(world) as sent:
        rule = ExponentialMean(0.9)
        state = rule.init(local)
        rule.update(state, local)
        merged = weights.clone(local)
        weights.put_back(sharded_tensors(module), weights.exchange(sharded_tensors(module), merged))
    rows.append(row("average: held", world, average(n, world).device * world, total(held(state))))
    rows.append(row("average: sent by an update and a swap", world, average(n, world).sent, sum(sent.bytes)))
    windowed = WindowMean(5)
    state_of_window = windowed.init(local)
    for _ in range(5):
        windowed.update(state_of_window, local)
    kept = held(state_of_window) + held(windowed.result(state_of_window))
    rows.append(row("window of 5: held", world, window(n, world).device * world, total(kept)))
    with Sent(world) as sent, torch.no_grad():
        module(torch.randn(4, 2, 256))
    rows.append(row("recalibration: sent by a batch", world, recalibration(n, world, 1).sent, sum(sent.bytes)))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 2, 256)).sum().backward()
    optimizer.step()
    moments = {f"moments.{number}.{key}": value for number, own in enumerate(optimizer.state.values())
               for key, value in own.items() if key != "step"}  # fmt: skip
    names = [name for name, _ in module.named_parameters()]
    averages = {f"average.{name}": weights.as_sharded(local[name], sharded_tensors(module)[name]) for name in names}
    save({**get_model_state_dict(module), **moments, **averages}, checkpoint_id=folder / "parts")
    written = sum(file.stat().st_size for file in (folder / "parts").glob("*.distcp"))
    rows.append(row("save: written", world, save_parts(n, world).file * world, written))
    return rows


def whole(world: int, folder: Path) -> list[dict[str, Any]]:
    """A branch in each process; with one process, branches in turn."""
    from rules.live_memory import LiveMemory  # type: ignore[import-not-found]

    from lightning_merge.branches import Average, InTurn, OnePerRank, OuterStep, StreamingOuterStep

    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(LAYERS)))
    n = sum(parameter.numel() for parameter in module.parameters())
    optimizer = torch.optim.AdamW(module.parameters())

    def step() -> None:
        module(torch.randn(2, 64)).sum().backward()
        optimizer.step()

    met = FLOAT * n  # the weights that branches last met at, which the callback keeps
    if world == 1:
        turns = InTurn(module, [optimizer], 4)
        for branch in range(4):
            turns.activate(branch)
            step()
        others = [turns._waiting, [list(each[0].values()) for each in turns._states if each]]
        return [row("four branches in turn: held", 1, in_turn(n, 4).device - met, held(others))]
    branches = OnePerRank(module, [optimizer], world)
    step()
    rows = []
    bits_of: dict[str, Literal[32, 8, 4]] = {f"streaming diloco, {bits} bits": bits for bits in (32, 8, 4)}
    merges = {
        "a mean of processes": (Average(), per_process(n, world), met),
        "diloco": (OuterStep(), diloco(n, world), met),
        **{
            name: (StreamingOuterStep(FRAGMENTS, 0, 0.5, bits), streaming(n, world, FRAGMENTS, bits), 0)
            for name, bits in bits_of.items()
        },
    }
    for name, (policy, cost, kept) in merges.items():
        state = policy.init(branches)
        with LiveMemory() as live, Sent(world) as sent:
            policy.merge(state, branches)
        rows.append(row(f"{name}: sent by a merge", world, cost.sent, sum(sent.bytes)))
        rows.append(row(f"{name}: most at a merge, beside training", world, cost.device - kept, live.peak))
        if cost.host:
            rows.append(row(f"{name}: held on the host", world, cost.host, held(state)))
    saved = branches.save()
    collected = held([saved["weights"], saved["optimizers"]]) if dist.get_rank() == 0 else 0
    own = save_branches(n, world).file / world  # of the first process, which the file has as any run's
    rows.append(row("a branch per process: in a file, of the others", world, own * (world - 1), total(collected)))
    return rows


def total(bytes_: int) -> float:
    """Of all processes."""
    tensor = torch.tensor([float(bytes_)], dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item()


def row(what: str, processes: int, formula: float, counted: float) -> dict[str, Any]:
    return {"what": what, "processes": processes, "formula": round(formula), "counted": round(counted)}


def counted(root: Path) -> list[dict[str, Any]]:
    """In each process."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    return [*sharded(world, root), *whole(world, root)]


def merging(folder: Path, processes: int) -> dict[str, Any]:
    """What ``average`` of folders of weights reads and writes, by the sizes of what it reads and writes."""
    from torch.distributed.checkpoint.state_dict_saver import save

    from lightning_merge.cli import main as command

    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    n = sum(parameter.numel() for parameter in module.parameters())
    inputs = [folder / "run" / f"step={step}.ckpt" for step in range(1, FOLDERS + 1)]
    for path in inputs:
        save({"state_dict": module.state_dict()}, checkpoint_id=path, no_dist=True)
    output = folder / "merged"
    command(["average", str(folder / "run"), "--out", str(output), "--processes", str(processes)])
    parts = [file.stat().st_size for path in (*inputs, output) for file in path.glob("*.distcp")]
    formula = merge_folders(n, processes, FOLDERS).file * processes
    return row(f"average of {FOLDERS} folders: read and written", processes, formula, sum(parts))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--worlds", nargs="+", type=int, default=list(WORLDS), help="numbers of processes")
    arguments = options.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from processes import returned, start  # type: ignore[import-not-found]

    rows: list[dict[str, Any]] = []
    for world in arguments.worlds:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            rows += returned(start(world, counted, folder), folder, seconds=1800.0)[0]
            if world < 4:
                rows.append(merging(folder / "merging", world))
        for each in rows:
            progress(f"{each['what']:60} {each['processes']}: {each['formula']:12,} {each['counted']:12,}")
        write({**header(), "seed": 0, "rows": rows}, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
