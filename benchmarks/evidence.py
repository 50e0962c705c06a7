"""Shows methods where their papers claim to work: protocols, each with seeds, paired differences and intervals.

    python benchmarks/evidence.py domains --seeds 5 --data data      (one protocol)
    python benchmarks/evidence.py --seconds 540                      (all, in order of worth, as far as time goes)
    python benchmarks/evidence.py domains --check                    (a fresh seed beside the committed ones)
    python benchmarks/evidence.py --size full --device cuda          (whole networks, on a GPU)

A protocol's results are in ``benchmarks/results/evidence-NAME.json`` (``-full`` for the full size), written after each
seed; started again, it goes on after the last seed that is there. What is searched is searched alike for all, on
validation data, with a seed that is not reported. ``data`` holds ``cifar10/train/<class>/`` and ``test/<class>/``, and
for ``merging`` ``tiny-imagenet-50/train/<class>/`` and ``val/<class>/``.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from _evidence._bench import check, fill, read
from _evidence._protocol import Place, Protocol
from _evidence._shown import figure, table
from _shared import OutOfTime, alarm, parser, progress, silence

RESULTS = Path(__file__).parent / "results"


def protocols() -> dict[str, Callable[[str], Protocol]]:
    """By name and in order of worth, what makes each in a size."""
    from _evidence._alignment import alignment
    from _evidence._averages import averages
    from _evidence._budgets import cifar10_budgets, digits_budgets
    from _evidence._domains import domains
    from _evidence._federated import federated
    from _evidence._forkmerge import forkmerge
    from _evidence._lookaround import lookaround
    from _evidence._merging import merging
    from _evidence._population import population
    from _evidence._soups import soups
    from _evidence._tangent import tangent_space
    from _evidence._tasks import tasks
    from _evidence._unlearning import unlearning

    return {
        "domains": domains,
        "averages": averages,
        "population": population,
        "federated": federated,
        "forkmerge": forkmerge,
        "lookaround": lookaround,
        "budgets-digits": digits_budgets,
        "budgets-cifar10": cifar10_budgets,
        "soups": soups,
        "tasks": tasks,
        "tangent": tangent_space,
        "unlearning": unlearning,
        "merging": merging,
        "alignment": alignment,
    }


def main(known: Mapping[str, Callable[[str], Protocol]], argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; by default all")
    options.add_argument("--seeds", type=int, default=5, help="of each protocol, from 0")
    options.add_argument("--seconds", type=float, default=math.inf, help="for everything")
    options.add_argument("--size", choices=("small", "full"), default="small")
    options.add_argument("--device", default="cpu", help="cpu, or cuda")
    options.add_argument("--data", type=Path, default=Path("data"), help="folder that holds cifar10/")
    options.add_argument("--cache", type=Path, help="folder for what is computed once; by default in --data")
    options.add_argument("--figure", type=Path, help="where to draw the figure of each file, as a folder")
    options.add_argument("--check", action="store_true", help="measure a fresh seed and write nothing")
    chosen = options.parse_args(argv)
    if unknown := [name for name in chosen.names if name not in known]:
        options.error(f"no protocol is called {', '.join(unknown)}; there are {', '.join(known)}.")
    names = chosen.names or list(known)
    if chosen.output and len(names) > 1:
        options.error("--output is one file: name one protocol.")
    place = Place(chosen.size, chosen.device, chosen.data, chosen.cache or chosen.data / "evidence")
    end, failed = time.perf_counter() + chosen.seconds, 0
    for name in names:
        suffix = "" if chosen.size == "small" else f"-{chosen.size}"
        output = chosen.output or RESULTS / f"evidence-{name}{suffix}.json"
        protocol = known[name](chosen.size)
        progress(name)
        try:
            with alarm(min(end - time.perf_counter(), 10**8)):
                if chosen.check:
                    failed += check(protocol, place, output)
                    continue
                fill(name, protocol, place, output, chosen.seeds, lambda: end - time.perf_counter())
        except OutOfTime:
            progress(f"{name}: the time is over; a seed that was running is not counted")
        except (OSError, ImportError) as error:
            progress(f"{name} is left out: {error}")
            failed += 1
        show(output, chosen.figure)
    return int(failed > 0)


def show(output: Path, folder: Path | None) -> None:
    """The table of a file, and its figure."""
    result = read(output)
    if result is None:
        return
    print(table(result))
    if folder is not None:
        figure(result, folder / f"{output.stem}.svg")


if __name__ == "__main__":
    known = protocols()
    silence()  # what they imported
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # two threads take other sums, so a run would depend on the machine
    sys.exit(main(known))
