"""Compares averages of one run that are trained, gated or searched, at equal cost, paired over seeds.

    python benchmarks/trajectory_quality.py --root data/cifar10 --output benchmarks/results/trajectory-quality.json

ResNet-8 on 10,000 images of CIFAR-10 in bfloat16. The unit of cost is one gradient step on 64 images, which is three
forward passes of 64 images, and every method has the same number of them. SWA, ASWA, TWA, greedy and LCSC read the
checkpoints of one run at a constant learning rate, as far as each can afford: what a method spends on its own steps or
on scoring candidates (images to score on, and images to measure BatchNorm statistics on) it is behind in that run.
``cosine`` is a second run whose learning rate falls to 0. BatchNorm statistics of everything but the two plain runs are
measured again, which nobody is charged for at the end; ``plain, BatchNorm`` says what that alone does.

Methods choose by 2,000 images that were not trained on. Accuracy is on the 10,000 test images, which nothing was chosen
by. TWA's learning rate is chosen by the validation accuracy of one more seed, which is not reported.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import t as student
from torch import Tensor
from torch.optim import Optimizer

from lightning_merge.calibration import recalibrated_statistics
from lightning_merge.callbacks import TWA
from lightning_merge.recipes import CIFAR, Classifier, SmallResNet
from lightning_merge.rules import GatedMean
from lightning_merge.search import Evolutionary, Greedy, search
from lightning_merge.trajectory import Trajectory, mean
from lightning_merge.weights import Weights

BATCH, IMAGES, SCORED = 64, 10_000, 2000
PER_EPOCH = IMAGES // BATCH
STATISTICS = 20  # batches
EVALUATION = math.ceil((SCORED + STATISTICS * BATCH) / (3 * BATCH))  # in gradient steps
CADENCE = PER_EPOCH // 2
RATES = (0.02, 0.1, 0.5, 2.0)
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "precision": "bf16-mixed",
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


class Loaded(CIFAR):
    """Reads the images once, whatever number of fits it is used in."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "test" if stage == "test" else "train"):
            super().setup(stage)


class Bench:
    """Data and network of one seed, and what is measured with them."""

    def __init__(self, root: str, seed: int) -> None:
        self.seed = seed
        self.data = Loaded("cifar10", root=root, batch_size=BATCH, train_images=IMAGES, val_images=SCORED)
        self.module = self.network()
        pl.Trainer(**QUIET, enable_checkpointing=False, max_steps=1).fit(self.module, self.data)
        self.data.setup("test")
        pl.seed_everything(seed, verbose=False)
        batches = iter(self.data.train_dataloader())
        self.batches = [next(batches) for _ in range(STATISTICS)]
        self.evaluations = 0

    def network(self, cosine_over: int | None = None) -> Classifier:
        def sgd(parameters: Any) -> Optimizer:
            return torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)

        pl.seed_everything(self.seed, verbose=False)
        module = Classifier(
            SmallResNet(blocks=1, width=16).to(memory_format=torch.channels_last), num_classes=10, optimizer=sgd
        )
        if cosine_over is not None:
            configure = module.configure_optimizers

            def with_schedule() -> Any:
                optimizer = configure()
                assert isinstance(optimizer, Optimizer)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cosine_over)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

            module.configure_optimizers = with_schedule
        return module

    def train(self, steps: int, folder: Path, cosine: bool = False) -> Weights:
        module = self.network(steps if cosine else None)
        files = ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=CADENCE, save_top_k=-1, save_weights_only=True
        )
        pl.Trainer(**QUIET, max_steps=steps, max_epochs=-1, callbacks=[files]).fit(module, self.data)
        return module.state_dict()

    def twa(self, files: Trajectory, steps: int, lr: float) -> Weights:
        module = self.network()
        twa = TWA(checkpoints=files, lr=lr)
        trainer = pl.Trainer(**QUIET, max_steps=steps, max_epochs=-1, callbacks=[twa], enable_checkpointing=False)
        trainer.fit(module, self.data)
        return module.state_dict()

    @torch.no_grad()
    def fitted(self, weights: Mapping[str, Tensor]) -> Weights:
        """The weights with BatchNorm statistics measured under them."""
        self.module.load_state_dict(weights)

        def forward(batch: Any) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                self.module(batch[0].to(memory_format=torch.channels_last))

        return {**weights, **recalibrated_statistics(self.module, self.batches, forward)}

    @torch.no_grad()
    def accuracy(self, weights: Mapping[str, Tensor], loader: Any) -> float:
        self.module.load_state_dict(weights)
        self.module.eval()
        right = seen = 0
        for images, labels in loader:
            with torch.autocast("cpu", torch.bfloat16):
                guess = self.module(images.to(memory_format=torch.channels_last)).argmax(1)
            right, seen = right + int((guess == labels).sum()), seen + len(labels)
        return right / seen

    def score(self, weights: Mapping[str, Tensor]) -> float:
        self.evaluations += 1
        return self.accuracy(self.fitted(weights), self.data.val_dataloader())

    def test(self, weights: Mapping[str, Tensor]) -> float:
        return self.accuracy(weights, self.data.test_dataloader())


def gated(bench: Bench, files: Trajectory) -> tuple[Weights, float]:
    """ASWA over the ends of epochs of the second half of the run, and the accuracy it decided by last."""
    rule = GatedMean()
    stream = files.stream()
    first = next(stream)
    floats = {name for name, tensor in first.items() if tensor.is_floating_point()}
    state = rule.init({name: first[name] for name in floats})
    for weights in (first, *stream):
        part = {name: weights[name] for name in floats}
        rule.offer(state, part, lambda found, weights=weights: bench.score({**weights, **found}))
    return {**first, **(rule.result(state) or {})}, state["score"]


def one_seed(root: str, seed: int, steps: int, rates: tuple[float, ...]) -> dict[str, Any]:
    """Test accuracy of every method; of TWA with each of the rates, with validation accuracy."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    bench = Bench(root, seed)
    test: dict[str, float] = {}
    cost: dict[str, int] = {}
    stage = steps // 10

    def affordable(spent: int, last: int) -> Trajectory:
        return Trajectory.of_run(folder, end=steps - spent, last=last, weights="published")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "constant"
        plain = bench.train(steps, folder)
        test["plain"], test["plain, BatchNorm"] = bench.test(plain), bench.test(bench.fitted(plain))
        cosine = bench.train(steps, Path(name) / "cosine", cosine=True)
        test["cosine"] = bench.test(cosine)
        everything = Trajectory.of_run(folder, weights="published")
        tail = [c for c in everything if c.step is not None and c.step >= 0.75 * steps and not c.step % (2 * CADENCE)]
        test["SWA"] = bench.test(bench.fitted(Trajectory(tail).combine(mean(len(tail)))))

        twa = {}
        for rate in rates:
            weights = bench.fitted(bench.twa(affordable(stage, 12), stage, rate))
            twa[rate] = {"val": bench.accuracy(weights, bench.data.val_dataloader()), "test": bench.test(weights)}
        start_of_stage = affordable(stage, 12)
        test["mean of TWA's snapshots"] = bench.test(bench.fitted(start_of_stage.combine(mean(len(start_of_stage)))))

        offers = steps // (2 * CADENCE) // 2
        ends = affordable(offers * EVALUATION, 4 * offers)
        chosen = [c for c in ends if c.step is not None and c.step >= steps // 2 and not c.step % (2 * CADENCE)]
        cost["ASWA"] = -bench.evaluations
        test["ASWA"] = bench.test(bench.fitted(gated(bench, Trajectory(chosen))[0]))
        cost["ASWA"] += bench.evaluations

        for label, method, last, budget in (("greedy", Greedy(), 8, 15), ("LCSC", Evolutionary(8), 8, 24)):
            files = affordable(budget * EVALUATION, last)
            before = bench.evaluations
            found = search(
                lambda a, files=files: bench.score(files.combine(a)),
                len(files),
                method,
                space="negative",
                budget=budget,
                seed=seed,
            )
            test[label] = bench.test(bench.fitted(files.combine(found.coefficients)))
            cost[label] = bench.evaluations - before
    return {
        "seed": seed,
        "test": test,
        "twa": twa,
        "evaluations": cost,
        "seconds": round(time.perf_counter() - start, 1),
    }


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half the width of its 95 % interval (Student)."""
    half = math.inf
    if len(values) > 1:
        half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": round(statistics.fmean(values), 5), "half_width": round(float(half), 5), "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    steps = arguments.epochs * PER_EPOCH
    tuning = one_seed(arguments.root, 1000, steps, RATES)
    rate = max(RATES, key=lambda each: tuning["twa"][each]["val"])
    print(json.dumps({"tuning": tuning, "rate": rate}), flush=True)
    versions = {"torch": torch.__version__, "lightning": pl.__version__, "python": sys.version.split()[0]}
    result: dict[str, Any] = {"command": " ".join(sys.argv), "versions": versions, "steps": steps}
    result |= {"evaluation_costs_steps": EVALUATION, "twa_lr": rate, "tuning": tuning, "runs": []}
    for seed in range(arguments.seeds):
        run = one_seed(arguments.root, seed, steps, (rate,))
        run["test"]["TWA"] = run["twa"][rate]["test"]
        result["runs"].append(run)
        tests = [each["test"] for each in result["runs"]]
        result["test_accuracy"] = {name: interval([test[name] for test in tests]) for name in run["test"]}
        result["difference_to_plain"] = {
            name: interval([test[name] - test["plain"] for test in tests]) for name in run["test"] if name != "plain"
        }
        print(json.dumps(run), flush=True)
        if arguments.output:  # at once, so that a run that is stopped is not lost
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("test_accuracy", "difference_to_plain")}, indent=1))


if __name__ == "__main__":
    main()
