"""What statistics for merging cost: memory of a merge of files, and time of the passes that measure them.

    python benchmarks/importance.py --output benchmarks/results/importance.json

Memory: ``combine_files`` of two models of N numbers with their statistics, in a process of its own; its peak beside
what was in memory before, against ``2 N + 200 MB``. Time, on one thread of a processor, the lowest of some rounds in
which contestants take turns: a pass of ``"fisher"`` against the forward and backward passes of as many single images,
and one of ``"gram"`` against 1.2 forward passes of a batch and the products of its patches.
"""

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _shared import child, clock_of, header, parser, progress, seconds, write

LAYERS, WIDTH = 6, 768
RULES = ("Average", "Fisher", "RegMean")


def files(folder: Path) -> None:
    """A base and two models of a transformer's matrices, and statistics of both kinds of each."""
    import torch

    from lightning_merge.importance import Statistics

    shapes = {"qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH)}
    layout = {f"{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for number in range(3):
        torch.manual_seed(number)
        torch.save({name: torch.randn(shape) for name, shape in layout.items()}, folder / f"{number}.pt")
        squares = {name: torch.rand(shape) for name, shape in layout.items()}
        Statistics("fisher", squares).write(folder / f"Fisher-{number}.safetensors")
        grams = {name: torch.eye(shape[1]) + 0.1 / shape[1] for name, shape in layout.items()}
        Statistics("gram", grams).write(folder / f"RegMean-{number}.safetensors")


def merged(rule: str, folder: Path) -> dict[str, float]:
    """The peak of a merge beside the memory before it."""
    from lightning_merge import combiners
    from lightning_merge.files._layouts import open_file

    open_file(folder / "0.pt")  # what reading imports is no matter of the merge
    known = {task: folder / f"{rule}-{task + 1}.safetensors" for task in range(2)}
    combiner = getattr(combiners, rule)(*([] if rule == "Average" else [known]))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    clock = clock_of(1)
    start = clock()
    found = combiners.combine_files(combiner, folder / "0.pt", [folder / f"{number}.pt" for number in (1, 2)])
    numbers = 4 * sum(tensor.numel() for tensor in found.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    limit = 2 * numbers + 2e8
    return {"N MB": numbers / 1e6, "peak MB": peak / 1e6, "over limit": peak / limit, "s": clock() - start}


def patches_of(model: Any, images: Any) -> list[Any]:
    """What each layer multiplies its weight with, in rows."""
    import torch
    from torch import nn

    from lightning_merge.importance._grams import _inputs

    kept: list[Any] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, given: kept.extend(_inputs(layer, given[0].detach())))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return kept


def passes(images: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each pass and of what it needs, and their ratios."""
    import timm
    import torch
    from torch import nn

    from lightning_merge.importance._grams import InputGrams
    from lightning_merge.importance._squared import squared_gradients

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()
    held = dict(model.named_parameters())
    batch = torch.randn(images, 3, 224, 224), torch.randint(1000, (images,))
    kept = patches_of(model, batch[0])

    def loss(single: Any) -> Any:
        return nn.functional.cross_entropy(model(single[0]), single[1])

    def alone() -> None:
        for index in range(images):
            torch.autograd.grad(loss((batch[0][index : index + 1], batch[1][index : index + 1])), list(held.values()))

    @torch.no_grad()
    def forward() -> None:
        model(batch[0])

    @torch.no_grad()
    def grams() -> None:
        with InputGrams(model, held, 4608) as found:
            model(batch[0])
        found.means()

    def products() -> None:
        for rows in kept:
            rows.T @ rows

    work: dict[str, Callable[[], Any]] = {
        "forward and backward": alone,
        "fisher": lambda: squared_gradients(held, [lambda: batch], loss, images),
        "forward": forward,
        "products": products,
        "gram": grams,
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            times[name].append(1e3 * seconds(run, clock_of(1)))
        progress(f"round {number} of {rounds}")
    best = {name: min(values[1:]) for name, values in times.items()}
    return {
        "ms": best,
        "fisher over its backward passes": best["fisher"] / best["forward and backward"],
        "gram over 1.2 forward and products": best["gram"] / (1.2 * best["forward"] + best["products"]),
    }


def main(options: argparse.Namespace) -> None:
    result: dict[str, Any] = {**header("timm", threads=True), "memory": {}}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        child(__file__, "--child", "files", "--folder", folder)
        for rule in RULES:
            result["memory"][rule] = child(__file__, "--child", rule, "--folder", folder)
            progress(f"{rule}: {result['memory'][rule]}")
            write(result, options.output)
    result["passes"] = child(__file__, "--child", "passes", "--rounds", str(options.rounds))
    write(result, options.output)
    print(result)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--scratch", type=Path, help="folder for 2 GB of files")
    options.add_argument("--child", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child is None:
        main(chosen)
        sys.exit()
    import json

    if chosen.child == "files":
        found: Any = files(chosen.folder)
    else:
        found = passes(4, chosen.rounds) if chosen.child == "passes" else merged(chosen.child, chosen.folder)
    print(json.dumps(found))
