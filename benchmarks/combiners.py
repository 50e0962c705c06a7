"""Times merging eight task vectors of a model against the memory-bandwidth limit and peers; measures peak memory.

    pip install --target PEERS --no-deps mergekit fusion-bench
    python benchmarks/combiners.py --processes 5 --peers PEERS --output benchmarks/results/combiners.json

The limit is a flat in-place ``lerp_`` over as many float32 numbers as the model has, which moves 3 N numbers: merging
all eight vectors at once has to move 9 N (read eight, write one), taking them in one at a time 24 N (each time read the
vector and the state, write the state). Contestants take turns in one process; each process gives the ratio of lowest
times, with one thread of the processor's, since others may use the machine, and the figure is the median over
processes, with lowest and highest.

The floor of a stream is what a vector has to move, by plain operations of torch: a read that finds a NaN before
anything is written (and could rank), then vector and sums are read and the sums written. These are 4 numbers per
parameter for sums, MagMax and Breadcrumbs, and 7 for TIES, which has two sums and two counts of a byte.

TIES keeps 20 % of each vector, ranked per tensor against mergekit and over the whole vector against FusionBench, whose
own functions are called on what they take: models around a base of zeros, and one matrix of all vectors. Memory is the
peak resident size of a process above what it was before, in copies of the model (N); the vector handed in is one. Since
the C library may keep the holes that freed vectors leave, it is measured again with MALLOC_MMAP_THRESHOLD_=131072,
under which all that is freed goes back ("returned").
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _shared import clock_of, header, parser, progress, seconds, spread, write

TASKS = 8
DENSITY = 0.2
COPIES = {"at once": 9 / 3, "stream": 24 / 3}
PARTS = ("memory", "files", "speed")
MEMORY = ("Sum", "Average", "MagMax", "TIES", "DARE", "Breadcrumbs")


def shapes(model: str) -> dict[str, Any]:
    import timm

    return {name: p.shape for name, p in timm.create_model(model, pretrained=False).named_parameters()}


def vectors(model: str, count: int) -> list[dict[str, Any]]:
    import torch

    torch.manual_seed(0)
    layout = shapes(model)
    return [{name: torch.randn(shape) * 1e-3 for name, shape in layout.items()} for _ in range(count)]


def mergekit_ties(tasks: list[dict[str, Any]]) -> Callable[[], Any]:
    """mergekit's own TIES, per tensor."""
    import torch
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GeneralizedTaskArithmeticMerge
    from mergekit.sparsify import SparsificationMethod

    ties = GeneralizedTaskArithmeticMerge(
        ConsensusMethod.sum, SparsificationMethod.magnitude, True, False, "ties", None, None
    )
    ids = range(1, len(tasks) + 1)
    parameters = {
        "density": dict.fromkeys(ids, DENSITY),
        "weight": dict.fromkeys(ids, 1.0),
        "rescale": False,
        "int8_mask": False,
        "normalize": True,
        "lambda": 1.0,
    }
    base = {name: torch.zeros_like(tensor) for name, tensor in tasks[0].items()}
    return lambda: {
        name: ties.merge_group(
            TensorGroup.from_tensors([base[name], *(t[name] for t in tasks)], base_index=0), **parameters
        )
        for name in base
    }


def fusion_bench_ties(tasks: list[dict[str, Any]], peers: Path) -> Callable[[], Any]:
    """FusionBench's own TIES, over the whole vector; its file is loaded alone, since the package needs many others."""
    import torch

    types_module = types.ModuleType("fusion_bench.utils.type")
    types_module.StateDictType = dict  # type: ignore[attr-defined]
    sys.modules.update({"fusion_bench.utils.type": types_module})
    sys.modules.update({name: types.ModuleType(name) for name in ("fusion_bench", "fusion_bench.utils")})
    path = peers / "fusion_bench" / "method" / "ties_merging" / "ties_merging_utils.py"
    spec = importlib.util.spec_from_file_location("fusion_bench_ties", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flat = torch.stack([torch.cat([tensor.reshape(-1) for tensor in task.values()]) for task in tasks])

    def merge() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return module.ties_merging(flat, reset_thresh=int(100 * DENSITY), merge_func="mean")

    return merge


def floors(size: int) -> dict[str, Callable[[], Any]]:
    """What moves as many numbers as a vector of a stream has to, and the flat ``lerp_`` alone."""
    import torch

    kept, new, negative = torch.randn(3, size)
    counts = torch.zeros(2, size, dtype=torch.uint8)

    def one_sum() -> None:
        torch.dot(new, new)
        kept.lerp_(new, 1e-3)

    def ties() -> None:
        one_sum()
        negative.mul_(1.0)
        counts.add_(1)

    return {"limit": lambda: kept.lerp_(new, 1e-3), "floor: one sum": one_sum, "floor: TIES": ties}


def speed(model: str, peers: Path | None, rounds: int) -> dict[str, float]:
    """Milliseconds of each contestant, the lowest of the rounds in which all take turns."""
    import torch

    from lightning_merge.combiners import TIES, Average, Breadcrumbs, Combiner, ExponentialAverage, MagMax, Sum

    tasks = vectors(model, TASKS)
    size = sum(tensor.numel() for tensor in tasks[0].values())

    def stream(combiner: Combiner, check: bool) -> Callable[[], None]:
        state = combiner.init(tasks[0])

        def run() -> None:
            for number, task in enumerate(tasks):
                if check:
                    combiner.update(state, task, task=number)
                else:
                    combiner._take(state, task, number)
                    state["updates"] += 1

        return run

    quick = {
        **floors(size),
        "at once: Sum": lambda: Sum(0.3).combine(tasks),
        "at once: Average": lambda: Average().combine(tasks),
        "at once: MagMax": lambda: MagMax().combine(tasks),
        "at once: ExponentialAverage": lambda: ExponentialAverage().combine(tasks),
        "stream: Sum": stream(Sum(0.3), check=False),
        "stream: Sum, with the check for NaN": stream(Sum(0.3), check=True),
        "stream: MagMax, with the check for NaN": stream(MagMax(), check=True),
    }
    official: dict[str, Any] = {"scope": "global", "topk_rule": "official_plus_one", "zero_sign": "official"}
    slow: dict[str, Callable[[], Any]] = {
        "at once: TIES": lambda: TIES(DENSITY, zero_sign="positive").combine(tasks),
        "stream: TIES, with the check for NaN": stream(TIES(DENSITY, zero_sign="positive"), check=True),
        "at once: TIES, ranked over the whole vector": lambda: TIES(DENSITY, **official).combine(tasks),
        "stream: Breadcrumbs, with the check for NaN": stream(Breadcrumbs(), check=True),
        "at once: Breadcrumbs": lambda: Breadcrumbs().combine(tasks),
    }
    if peers is not None:
        sys.path.append(str(peers))
        slow["peer: mergekit TIES"] = mergekit_ties(tasks)
        slow["peer: FusionBench TIES"] = fusion_bench_ties(tasks, peers)
    times: dict[str, list[float]] = {name: [] for name in (*quick, *slow)}
    with torch.no_grad():
        for number in range(rounds + 1):
            quick["at once: Sum"]()  # so that the first to be timed need not get its memory back from the system
            for name, run in quick.items() if number < rounds else (quick | slow).items():
                times[name].append(1e3 * seconds(run, clock_of(torch.get_num_threads())))
            progress(f"round {number} of {rounds}")
        result = {name: min(values) for name, values in times.items()}
        if peers is not None:
            ours = slow["at once: TIES"]()
            theirs = slow["peer: mergekit TIES"]()
            result["difference from mergekit"] = max(float((ours[n] - theirs[n]).abs().max()) for n in ours)
            whole = torch.cat([t.reshape(-1) for t in slow["at once: TIES, ranked over the whole vector"]().values()])
            result["difference from FusionBench"] = float((whole - slow["peer: FusionBench TIES"]()).abs().max())
    return result


def resident() -> int:
    """Bytes of memory in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(rule: str, count: int, model: str) -> dict[str, float]:
    """Peak of a stream of vectors, beyond the memory before it, in copies of the model and in MB."""
    import torch

    from lightning_merge import combiners

    layout = shapes(model)
    size = 4 * sum(shape.numel() for shape in layout.values())

    def stream() -> Iterator[dict[str, Any]]:
        for task in range(count):
            generator = torch.Generator().manual_seed(task)
            yield {name: torch.empty(shape).uniform_(-1, 1, generator=generator) for name, shape in layout.items()}

    combiner = getattr(combiners, rule)()
    combiner.combine([{"w": torch.ones(10)}])  # what is loaded once
    before = resident()
    merged = combiner.combine(stream())
    assert merged
    return {"copies": (peak() - before) / size, "MB": (peak() - before) / 1e6}


def files(rule: str, count: int, model: str) -> dict[str, float]:
    """Peak of merging files, mapped pages included, beyond the memory before it."""
    import torch

    from lightning_merge import combiners

    size = 4 * sum(shape.numel() for shape in shapes(model).values())
    with tempfile.TemporaryDirectory() as folder:
        script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from combiners import vectors
for number in range({count} + 1):
    torch.save({{"state_dict": vectors({model!r}, 1)[0]}}, f"{folder}/{{number}}.ckpt")
"""
        subprocess.run([sys.executable, "-c", script], check=True)
        combiner = getattr(combiners, rule)()
        combiner.combine([{"w": torch.ones(10)}])
        paths = [f"{folder}/{number}.ckpt" for number in range(1, count + 1)]
        before = resident()
        start = time.perf_counter()
        merged = combiners.combine_files(combiner, f"{folder}/0.ckpt", paths)
        seconds = time.perf_counter() - start
        assert merged
    return {"copies": (peak() - before) / size, "MB": (peak() - before) / 1e6, "seconds": seconds}


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Ratios to the limit and to the peers: median, lowest, highest over processes."""

    names = [name for name in runs[0] if name.startswith(tuple(COPIES))]
    limit = {name: COPIES[name.partition(":")[0]] for name in names}
    result: dict[str, Any] = {
        "lerp_ms": spread([run["limit"] for run in runs]),
        "over_limit": {name: spread([run[name] / (limit[name] * run["limit"]) for run in runs]) for name in names},
    }
    checked = [name for name in names if name.endswith("check for NaN")]
    floor = {name: "floor: TIES" if "TIES" in name else "floor: one sum" for name in checked}
    result["stream_over_floor"] = {
        name: spread([run[name] / (TASKS * run[floor[name]]) for run in runs]) for name in checked
    }
    for peer, ours in (("mergekit", "at once: TIES"), ("FusionBench", "at once: TIES, ranked over the whole vector")):
        if f"peer: {peer} TIES" in runs[0]:
            result[f"{peer}_over_ours"] = spread([run[f"peer: {peer} TIES"] / run[ours] for run in runs])
            result[f"{peer}_difference"] = max(run[f"difference from {peer}"] for run in runs)
    return result


def child(arguments: argparse.Namespace, *task: str, **environment: str) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--child",
        *task,
        "--model",
        arguments.model,
        "--rounds",
        str(arguments.rounds),
    ]
    command += ["--peers", str(arguments.peers)] if arguments.peers else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--processes", type=int, default=5)
    options.add_argument("--rounds", type=int, default=7, help="of the quick contestants; the slow ones run once")
    options.add_argument("--model", default="vit_base_patch16_224", help="of timm, for the shapes of its tensors")
    options.add_argument("--peers", type=Path, help="folder with mergekit and fusion_bench")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure, by default all")
    options.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        what, *rest = arguments.child
        if what == "speed":
            print(json.dumps(speed(arguments.model, arguments.peers, arguments.rounds)))
        else:
            run = {"memory": memory, "files": files}[what]
            print(json.dumps(run(rest[0], int(rest[1]), arguments.model)))
        return

    result: dict[str, Any] = {
        **header(threads=True),
        "columns": "median, lowest, highest over processes",
        "model": arguments.model,
        "seed": 0,
    }

    def keep() -> None:
        write(result, arguments.output)

    for key, environment in (("stream_peak", {}), ("stream_peak, returned", {"MALLOC_MMAP_THRESHOLD_": "131072"})):
        for rule, count in itertools.product(MEMORY, (8, 32)) if "memory" in arguments.parts else ():
            progress(f"{key}: {rule}, {count} tasks")
            peaks = result.setdefault(key, {})
            peaks[f"{rule}, {count} tasks"] = child(arguments, "memory", rule, str(count), **environment)
            keep()
    for rule, count in itertools.product(("Sum", "TIES"), (2, 8)) if "files" in arguments.parts else ():
        progress(f"{rule}, {count} files")
        peaks = result.setdefault("files_peak", {})
        peaks[f"{rule}, {count} files"] = child(arguments, "files", rule, str(count))
        keep()
    runs = []
    for number in range(arguments.processes if "speed" in arguments.parts else 0):
        progress(f"speed: process {number + 1} of {arguments.processes}")
        runs.append(child(arguments, "speed"))
        result |= summary(runs)
        keep()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
