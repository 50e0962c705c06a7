"""Preference tuning: accuracy on held-out pairs against what is forgotten, one curve per method over its strength.

    python benchmarks/preference.py --pairs PAIRS.jsonl.gz --text TEXT.gz --output benchmarks/results/preference.json

A small byte-level GPT-2 is trained on plain text, once; then, for each seed, on dialogues (SFT), and from there by DPO
with each method at several strengths. Forgetting is the rise of the held-out language-model loss over that of the SFT
model, in nats per byte: on dialogues, which SFT taught. Pairs and dialogues that are held out are the same for all
seeds. Results are written after every seed; started again with the same output, it goes on after the last one that is
there. `--figure FILE` draws the curves of a result file.
"""

import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import header, parser, progress, write
from torch import Tensor

from lightning_merge.callbacks import EMA, OnlineMerging
from lightning_merge.combiners import DARE, TIES, Sum
from lightning_merge.recipes import DPO, LanguageModel, Preferences

CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 258,
    "n_positions": 128,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 2,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "bos_token_id": 256,
    "eos_token_id": 256,
}
SETTING = {
    "length": 128,
    "answer": 96,
    "val_share": 0.4,
    "language_model": {"batch_size": 32, "lr": 2e-3, "epochs": 1},
    "dpo": {"batch_size": 16, "lr": 5e-4, "steps": 60, "beta": 0.1, "density": 0.5},
    # Each method's strength: what makes it keep more of the SFT model from left to right.
    "strengths": {
        "AdamW, learning rate": [1.0, 0.3, 0.1],
        "AdamW, KL (beta)": [0.3, 1.0],
        "EMA, decay": [0.95, 0.98],
        "offline, linear": [0.25, 0.5, 0.75],
        "offline, DARE": [0.3, 0.6],
        "offline, TIES": [0.3, 0.6],
        # Shares of the task vector that all steps together add.
        "OnDARE": [0.0, 0.1, 0.3],
        "OnTIES": [0.0, 0.3],
    },
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "precision": "bf16-mixed",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Comparison:
    """All methods from one seed's SFT model."""

    def __init__(self, pairs: str, text: str, seed: int, folder: Path) -> None:
        self.seed = seed
        self.folder = folder
        self.base = folder / "base.ckpt"  # one for all seeds
        shared: dict[str, Any] = {
            "length": SETTING["length"],
            "answer": SETTING["answer"],
            "val_share": SETTING["val_share"],
            "split_seed": 0,
        }
        size = SETTING["language_model"]["batch_size"]
        self.text = Preferences(text=text, train_on="text", batch_size=size, **shared)
        self.dialogues = Preferences(pairs=pairs, train_on="chosen", batch_size=size, **shared)
        self.pairs = Preferences(pairs=pairs, train_on="pairs", batch_size=SETTING["dpo"]["batch_size"], **shared)
        self.known: dict[tuple[str, int], Tensor] = {}

    def prepare(self) -> None:
        """Trains the base and the SFT model."""
        if not self.base.exists():
            self._language_model(self.text, None, "base", seed=0)
        self.sft = self._language_model(self.dialogues, self.base, "sft", self.seed)
        self.module = self._module(1.0, SETTING["dpo"]["beta"])
        self.sft_weights = parameters(self.module)
        state = torch.load(self.base, weights_only=True)["state_dict"]
        self.base_weights = {name: state[name] for name in self.sft_weights}

    def results(self) -> Iterator[dict[str, Any]]:
        """Each method at each strength, as it is done."""
        strengths: dict[str, list[float]] = SETTING["strengths"]
        yield self._measure("SFT", 0.0, self.sft_weights)
        for rate in strengths["AdamW, learning rate"]:
            means = [EMA(decay, validate="raw", name=f"ema{decay}") for decay in strengths["EMA, decay"]]
            raw = self._tune(rate, SETTING["dpo"]["beta"], means if rate == 1 else [])
            yield self._measure("AdamW, learning rate", rate, raw)
            if rate != 1:
                continue
            for mean, decay in zip(means, strengths["EMA, decay"], strict=True):
                yield self._measure("EMA, decay", decay, mean.merged_weights() or {})
            for method in ("linear", "DARE", "TIES"):
                for weight in strengths[f"offline, {method}"]:
                    yield self._measure(f"offline, {method}", weight, self._offline(method, raw, weight))
        for beta in strengths["AdamW, KL (beta)"]:
            yield self._measure("AdamW, KL (beta)", beta, self._tune(1.0, beta, []))
        for name in ("OnDARE", "OnTIES"):
            for share in strengths[name]:
                density = SETTING["dpo"]["density"]
                online = OnlineMerging(
                    name.lower(),
                    pretrained=str(self.base),
                    density=density,
                    alpha=share / SETTING["dpo"]["steps"] / density,
                    seed=self.seed,
                )
                yield self._measure(name, share, self._tune(1.0, SETTING["dpo"]["beta"], [online]))

    def _language_model(self, data: Preferences, start: Path | None, name: str, seed: int) -> Path:
        settings = SETTING["language_model"]
        pl.seed_everything(seed, verbose=False)
        module = LanguageModel(
            config=CONFIG, start=None if start is None else str(start), optimizer=adamw(settings["lr"])
        )
        trainer = pl.Trainer(max_epochs=settings["epochs"], limit_val_batches=0, **QUIET)
        trainer.fit(module, data)
        trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=True)
        return self.folder / f"{name}.ckpt"

    def _module(self, rate: float, beta: float) -> DPO:
        module = DPO(str(self.sft), config=CONFIG, beta=beta, optimizer=adamw(rate * SETTING["dpo"]["lr"]))
        module._known = self.known  # the reference is the same for all
        return module

    def _tune(self, rate: float, beta: float, callbacks: list[Any]) -> dict[str, Tensor]:
        """The weights after DPO; raw ones if averages watched."""
        pl.seed_everything(self.seed, verbose=False)
        module = self._module(rate, beta)
        trainer = pl.Trainer(max_steps=SETTING["dpo"]["steps"], limit_val_batches=0, callbacks=list(callbacks), **QUIET)
        trainer.fit(module, self.pairs)
        return parameters(module) | (callbacks[0].raw_weights() if callbacks and isinstance(callbacks[0], EMA) else {})

    def _offline(self, method: str, tuned: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
        """Merges at the end: of ``weight`` parts SFT and the rest tuned."""
        first = {name: self.sft_weights[name] - self.base_weights[name] for name in tuned}
        second = {name: tuned[name] - self.base_weights[name] for name in tuned}
        if method == "linear":
            merged = {name: weight * first[name] + (1 - weight) * second[name] for name in tuned}
        else:
            scaled = [
                {name: 2 * weight * t for name, t in first.items()},
                {name: 2 * (1 - weight) * t for name, t in second.items()},
            ]
            density = SETTING["dpo"]["density"]
            combiner = DARE(Sum(0.5), density, self.seed) if method == "DARE" else TIES(density=density)
            merged = combiner.combine(scaled)
        return {name: self.base_weights[name] + t for name, t in merged.items()}

    def _measure(self, method: str, strength: float, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(weights[name])
        found = pl.Trainer(limit_val_batches=15, **QUIET).validate(self.module, self.pairs, verbose=False)
        measured = {key: value for part in found for key, value in part.items()}
        self.start_loss = measured["val/lm_loss"] if method == "SFT" else self.start_loss
        plain = pl.Trainer(limit_val_batches=3, **QUIET).validate(self.module, self.text, verbose=False)
        return {
            "method": method,
            "strength": strength,
            "accuracy": measured["val/acc"],
            "margin": measured["val/margin"],
            "forgetting": measured["val/lm_loss"] - self.start_loss,
            "lm_loss": measured["val/lm_loss"],
            "text_loss": plain[0]["val/lm_loss"],
        }


def parameters(module: DPO) -> dict[str, Tensor]:
    """Copies, tied ones under their first name only: a second one would be loaded over the first."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def adamw(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every point."""
    points: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        for point in run["points"]:
            points.setdefault((point["method"], point["strength"]), []).append(point)
    table = []
    for (method, strength), found in points.items():
        row: dict[str, Any] = {"method": method, "strength": strength, "n": len(found)}
        for key in ("accuracy", "margin", "forgetting", "text_loss"):
            values = [point[key] for point in found]
            row[key] = round(statistics.fmean(values), 5)
            row[f"{key}_sd"] = round(statistics.stdev(values), 5) if len(values) > 1 else math.nan
        table.append(row)
    return table


def figure(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    rows = [row for row in result["summary"] if row["method"] != "SFT"]
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        curve = [row for row in rows if row["method"] == method]
        n = math.sqrt(curve[0]["n"])
        axes.errorbar(
            [row["forgetting"] for row in curve],
            [row["accuracy"] for row in curve],
            [row["accuracy_sd"] / n for row in curve],
            [row["forgetting_sd"] / n for row in curve],
            label=method,
            marker="osD^v<>p"[i % 8],
            linewidth=2.5 if method.startswith("On") else 1,
            capsize=2,
        )
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set_xlabel("forgetting: rise of held-out dialogue loss over SFT (nats per byte)")
    axes.set_ylabel("accuracy on held-out pairs")
    axes.set_title("Mean of seeds, bars: one standard error", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    drawing.savefig(path)


def main() -> None:
    options = parser(__doc__, output=False)
    options.add_argument("--pairs", help="JSON lines with `chosen` and `rejected`")
    options.add_argument("--text", help="plain text for the base model")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--figure", type=Path, help="draw the curves of `--output` instead")
    arguments = options.parse_args()
    if arguments.figure:
        figure(json.loads(arguments.output.read_text()), arguments.figure)
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result = {**header("lightning", "transformers"), "setting": SETTING, "config": CONFIG}
    runs: list[dict[str, Any]] = []
    if arguments.output.exists():
        before = json.loads(arguments.output.read_text())
        if any(before[key] != result[key] for key in ("setting", "config", "versions")):
            options.error(f"{arguments.output} is of another setting or of other versions: name another file.")
        runs = before["runs"]
    done = {run["seed"] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            if seed in done:
                continue
            start = time.process_time()
            comparison = Comparison(arguments.pairs, arguments.text, seed, Path(folder))
            comparison.prepare()
            points = []
            for point in comparison.results():
                points.append(point)
                progress(json.dumps({"seed": seed, **point}))
                so_far = {"runs": runs, "summary": summary(runs), "seed_under_way": points}
                write(result | so_far, arguments.output)
            runs.append({"seed": seed, "cpu_seconds": round(time.process_time() - start, 1), "points": points})
            write({**result, "runs": runs, "summary": summary(runs)}, arguments.output)
    for row in summary(runs):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
