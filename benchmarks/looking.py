"""Times what an average asks of a module at each step beside its update: are these still the tensors that it has?

    python benchmarks/looking.py --output benchmarks/results/looking.json

After a step neither the dicts of a module nor its tensors are in a cache of the processor, and whoever touches them
first waits for memory. A look that is timed alone is charged with all of that, also with what the update that follows
would have waited for. So the update is timed with and without the look before it, in turns, and what a look costs is
the difference. Caches are emptied before ("cold") or hold all from the call before ("warm"). Parameters are cut to 64
numbers, since reading and writing them is the same in both. Microseconds: medians over rounds of paired differences.
"""

import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from _shared import header, parser, progress, seconds, write

from lightning_merge import weights
from lightning_merge.rules import ExponentialMean
from lightning_merge.weights import Fixed, Inventory

MODELS = ("resnet18", "resnet50", "vit_base_patch16_224")
EMPTIED = 2**24
"""Numbers that are read and written to empty the caches: 64 MB."""


def contestants(name: str) -> tuple[Inventory, dict[str, Callable[[], Any]]]:
    """The look, the update and its check, and both."""
    module = timm.create_model(name, pretrained=False)
    for parameter in module.parameters():
        parameter.data = parameter.data.flatten()[:64].clone()
    inventory, rule = Inventory(module), ExponentialMean(0.999)
    state, copied = rule.init(inventory.parameters), weights.copies(inventory.buffers)
    checked = Fixed(inventory.tensors)

    def update() -> None:
        weights.find_nonfinite(checked)
        weights.copy_(copied, inventory.buffers)
        rule.update(state, inventory.parameters)

    def both() -> None:
        inventory.refresh()
        update()

    return inventory, {"look alone": inventory.refresh, "update": update, "both": both}


def measure(name: str, rounds: int) -> dict[str, Any]:
    inventory, works = contestants(name)
    memory, objects = torch.zeros(EMPTIED), [object() for _ in range(300_000)]
    cold: dict[str, list[float]] = {key: [] for key in works}
    warm: dict[str, list[float]] = {key: [] for key in works}
    with torch.no_grad():
        for _ in range(rounds):
            for key, work in works.items():
                memory.add_(1.0)
                sum(map(id, objects))
                cold[key].append(1e6 * seconds(work))
                warm[key].append(1e6 * seconds(work))
    found: dict[str, Any] = {"parameters": len(inventory.parameters), "buffers": len(inventory.buffers)}
    for kind, times in (("cold", cold), ("warm", warm)):
        more = [both - update for both, update in zip(times["both"], times["update"], strict=True)]
        found[kind] = {
            "look alone": round(statistics.median(times["look alone"])),
            "update": round(statistics.median(times["update"])),
            "look before an update": round(statistics.median(more)),
        }
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=100)
    arguments = options.parse_args()
    result: dict[str, Any] = {**header("timm", threads=True), "microseconds": {}}
    for name in MODELS:
        progress(name)
        result["microseconds"][name] = measure(name, arguments.rounds)
        write(result, arguments.output)


if __name__ == "__main__":
    main()
