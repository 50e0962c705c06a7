"""What a new user sees: ``digits/swa`` as it stands, and the same run annealed instead of averaged, over seeds.

    python benchmarks/first_run.py --seeds 10 --output benchmarks/results/first-run.json

Each run is that of the command line, and the figures are the last ones in its ``metrics.csv``: accuracy on the 449
validation images, by which nothing was chosen. The annealed run has the same network, rate at the start and length, and
its learning rate falls to 0 along half a cosine. ``raw_measured_again`` are the raw weights with BatchNorm statistics
measured again, as the average's are: what of the gain is due to that.
"""

import contextlib
import csv
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from _shared import header, parser, progress, silence, write

from lightning_merge.cli import main as lightning_merge
from lightning_merge.recipes import Classifier, Digits, SmallConvNet
from lightning_merge.recipes._catalog import whole

IMAGES = 449
NAMES = ("raw", "raw_measured_again", "swa", "annealed", "raw_loss", "swa_loss")


def measured_again(folder: Path) -> float:
    """Accuracy of a run's raw weights with BatchNorm statistics of one pass over the training images."""
    (path,) = folder.rglob("last.ckpt")
    content = torch.load(path, weights_only=True)
    module = Classifier(SmallConvNet(), num_classes=10)
    module.load_state_dict({**content["state_dict"], **content["lightning_merge"].get("raw", {})})
    data = Digits()
    data.setup("fit")
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        module.train()
        for images, _ in data.train_dataloader():
            module(images)
        module.eval()
        images, labels = data.val.tensors
        return float((module(images).argmax(1) == labels).float().mean())


def last_row(recipe: str, seed: int, *options: str) -> dict[str, float]:
    """The metrics that a run of a recipe logged at its end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        silent = ("--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder)
        code = lightning_merge(["run", recipe, "--seed_everything", str(seed), *silent, *options])
        if code:
            raise RuntimeError(f"`lightning-merge run {recipe}` ended with code {code}.")
        (path,) = Path(folder).rglob("metrics.csv")
        with path.open() as file:
            found = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
        return found | ({"again": measured_again(Path(folder))} if recipe == "digits/swa" else {})


def annealed_options() -> list[str]:
    """The settings of ``digits/swa`` that ``digits/plain``, which anneals, does not have."""
    averaged, plain = (yaml.safe_load(whole(f"digits/{name}")) for name in ("swa", "plain"))
    found = [f"--trainer.max_epochs={averaged['trainer']['max_epochs']}"]
    ours, theirs = averaged["model"]["init_args"], plain["model"]["init_args"]
    for part in ("model", "optimizer"):
        given = ours[part].get("init_args", {})
        before = theirs[part].get("init_args", {})
        found += [f"--model.{part}.{key}={value}" for key, value in given.items() if before.get(key) != value]
    return found


def of(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation and range over the seeds."""
    return {
        "mean": round(statistics.fmean(values), 5),
        "standard_deviation": round(statistics.stdev(values), 5),
        "lowest": round(min(values), 5),
        "highest": round(max(values), 5),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each set over the seeds, the gain of each run, and by how many standard errors it is one."""
    gains = [run["swa"] - run["raw"] for run in runs]
    errors = [((run["swa"] * (1 - run["swa"]) + run["raw"] * (1 - run["raw"])) / IMAGES) ** 0.5 for run in runs]
    return {
        **{name: of([run[name] for run in runs]) for name in NAMES},
        "gain": of(gains),
        "gain_in_standard_errors": of([gain / error for gain, error in zip(gains, errors, strict=True)]),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=10, help="2 or more")
    arguments = options.parse_args()
    silence()
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        averaged = last_row("digits/swa", seed)
        run = {
            "seed": seed,
            "raw": averaged["raw/val/acc"],
            "swa": averaged["val/acc"],
            "raw_loss": averaged["raw/val/loss"],
            "swa_loss": averaged["val/loss"],
            "raw_measured_again": averaged["again"],
            "annealed": last_row("digits/plain", seed, *annealed_options())["val/acc"],
        }
        runs.append(run)
        progress(json.dumps(run))
        result = {**header("torch", "lightning"), "images": IMAGES, "annealed_options": annealed_options()}
        write(result | {"runs": runs} | ({"summary": summary(runs)} if len(runs) > 1 else {}), arguments.output)


if __name__ == "__main__":
    main()
