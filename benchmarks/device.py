"""Measures on one device what training with averages and merging costs there, all in one command, beside others.

    python benchmarks/device.py --seconds 240
    python benchmarks/device.py --seconds 60 --device cpu      (a dry run: tiny models)

Parts run in order of worth: host waits per step of every callback, the step of a launch-bound model with and without
averages, one update at four sizes, combiners and online optimizers, ResNet-50, FSDP2, peak memory, ``torch.compile``.
Each has a share of the time and is cut off at its end; an exception is a line of the results. Lines of JSON are
printed as they come and the file is written after each. Contestants take turns within a part. timm, ``swa_utils`` and
Lightning's ``EMAWeightAveraging`` are measured beside ours, and ema-pytorch if it is installed.

On CUDA the results go to ``benchmarks/results/device-NAME.json``, unless ``--output`` says where.
"""

import faulthandler
import logging
import re
import warnings
from pathlib import Path

import torch
from _device._memory import memory
from _device._merging import combiners, online
from _device._reads import reads
from _device._session import Session
from _device._sharded import sharded
from _device._steps import compiled_steps, large_steps, small_steps
from _device._updates import updates
from _shared import parser, silence

PARTS = {
    "reads": (reads, 0.18),
    "small": (small_steps, 0.2),
    "updates": (updates, 0.18),
    "combiners": (combiners, 0.1),
    "online": (online, 0.1),
    "large": (large_steps, 0.2),
    "sharded": (sharded, 0.08),
    "memory": (memory, 0.12),
    "compiled": (compiled_steps, 0.2),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=240, help="for everything")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="by default all")
    arguments = options.parse_args()
    faulthandler.dump_traceback_later(arguments.seconds + 30, exit=True)  # what hangs in C code ends here
    silence()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    device = torch.device(arguments.device)
    output = arguments.output
    if output is None and device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        output = Path(__file__).parent / "results" / f"device-{name}.json"
    Session(device, arguments.seconds, output).run({name: PARTS[name] for name in arguments.parts})


if __name__ == "__main__":
    main()
