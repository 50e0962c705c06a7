"""What the recipes of ``digits/`` and ``continual/digits`` end with, as they stand, over seeds.

    python benchmarks/digits_recipes.py --seeds 5 --output benchmarks/results/digits-recipes.json

Each run is that of the command line. ``merged`` and ``raw`` are the last values in its ``metrics.csv``, on the 449
validation images. ``digits/search`` is its two commands, with 40 candidates: losses of the searched soup and of the
last file. Of a stream they are the final accuracies, told the task and not. ``digits/swa`` has a file of its own. A
command that was stopped goes on with its file.
"""

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from _shared import header, parser, progress, silence, write

from lightning_merge.cli import main as lightning_merge
from lightning_merge.recipes._catalog import recipes

LORA = ("--merge.preset", "lora-arithmetic")
STREAMS = {
    "continual/digits": (),
    "continual/digits, LoRA": LORA,
    "continual/digits, LoRA, 10 samples of each class": (*LORA, "--merge.store_samples_per_class", "10"),
}


def command(*arguments: str) -> None:
    """Runs a command without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = lightning_merge(list(arguments))
    if code:
        raise RuntimeError(f"`lightning-merge {' '.join(arguments)}` ended with code {code}.")


def last_row(folder: Path) -> dict[str, float]:
    """The last value of every metric that a run has logged."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def of_recipe(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Accuracies at the end of a run, and losses."""
    command("run", name, "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder))
    found = last_row(folder)
    if name == "digits/search":
        return {"merged": searched(folder), "raw": found["val/loss"]}
    if "raw/val/acc" in found:
        return {"merged": found["val/acc"], "raw": found["raw/val/acc"]}
    # A rule that decides by how raw weights do leaves them the plain name.
    own = next((key for key in found if key.endswith("/val/acc")), None)
    return {"raw": found["val/acc"]} | ({} if own is None else {"merged": found[own]})


def searched(folder: Path) -> float:
    """The loss of the soup that the second command of ``digits/search`` finds."""
    (config,) = folder.rglob("config.yaml")
    run, soup = config.parent, folder / "soup.ckpt"
    how = ("--rule", "lcsc", "--config", str(config), "--last", "10", "--budget", "40", "--monitor", "val/loss")
    command("average", str(run), "--pattern", "**/step*.ckpt", *how, "--out", str(soup))
    return float(torch.load(soup, weights_only=True)["provenance"]["score"])


def of_stream(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Final accuracies of a stream."""
    place = ("--seed_everything", str(seed), "--trainer.default_root_dir", str(folder))
    command("run", "continual/digits", *place, *STREAMS[name])
    metrics = json.loads((folder / "stream.json").read_text())["metrics"]
    kinds = {"seen": "accuracy", "told": "accuracy_in_task"}
    return {called: metrics[kind]["final_average"] for called, kind in kinds.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=5, help="2 or more")
    arguments = options.parse_args()
    silence()
    work = {name: of_recipe for name in recipes() if name.startswith("digits/") and name != "digits/swa"}
    work |= dict.fromkeys(STREAMS, of_stream)
    output = arguments.output
    runs: list[dict[str, Any]] = json.loads(output.read_text())["runs"] if output and output.exists() else []
    for seed in range(arguments.seeds):
        for name, measure in work.items():
            if any((run["recipe"], run["seed"]) == (name, seed) for run in runs):
                continue
            with tempfile.TemporaryDirectory() as folder:
                run = {"recipe": name, "seed": seed, **measure(name, seed, Path(folder))}
            runs.append(run)
            progress(json.dumps(run))
            write({**header("torch", "lightning"), "images": 449, "runs": runs}, output)


if __name__ == "__main__":
    main()
