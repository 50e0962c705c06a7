"""Compares averages of one run that are trained, gated or searched, at equal cost, paired over seeds.

    python benchmarks/trajectory_quality.py --root data/cifar10 --output benchmarks/results/trajectory-quality.json

ResNet-8 on 45,000 images of CIFAR-10 in bfloat16. The unit of cost is one gradient step on 64 images, which is three
forward passes of 64 images, and every method has the same number of them. SWA, ASWA, TWA, greedy and LCSC read the
checkpoints of one run at a constant learning rate, as far as each can afford: what a method spends on its own steps or
on scoring candidates (images to score on, and images to measure BatchNorm statistics on) it is behind in that run.
``cost`` in the result says what each spent; a method that spends more than the plain run stops the benchmark.
``cosine`` is a second run whose learning rate falls to 0. BatchNorm statistics of everything but the two plain runs are
measured again, which nobody is charged for at the end; ``plain, BatchNorm`` says what that alone does.

Methods choose by 2,000 images that were not trained on. Accuracy is on the 10,000 test images, which nothing was chosen
by. TWA's learning rate is chosen by the validation accuracy of one more seed, which is not reported.

Results are written after every seed. Started again with the same output, it goes on after the last seed that is there.
"""

import json
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import header, interval, parser, progress, write
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from lightning_merge.calibration import recalibrated_statistics
from lightning_merge.callbacks import TWA
from lightning_merge.recipes import CIFAR, Classifier, SmallResNet
from lightning_merge.rules import GatedMean
from lightning_merge.search import Evolutionary, Greedy, search
from lightning_merge.trajectory import Trajectory, mean
from lightning_merge.weights import Weights

BATCH, IMAGES, SCORED = 64, 45_000, 2000
STATISTICS = 20  # batches
EVALUATION = math.ceil((SCORED + STATISTICS * BATCH) / (3 * BATCH))  # in gradient steps
CADENCE = 50  # steps between checkpoints
RATES = (0.1, 0.5, 2.0, 8.0)
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

    def __init__(self, root: str) -> None:
        super().__init__("cifar10", root=root, batch_size=BATCH, train_images=IMAGES, val_images=SCORED)
        for stage in ("fit", "test"):
            super().setup(stage)

    def setup(self, stage: str) -> None:
        pass


class Bench:
    """Network of one seed, and what is measured with it."""

    def __init__(self, data: Loaded, seed: int) -> None:
        self.seed = seed
        self.data = data
        self.module = self.network()
        batches = iter(data.train_dataloader())
        self.batches = [next(batches) for _ in range(STATISTICS)]
        self.evaluations = 0

    def network(self, cosine_over: int | None = None) -> Classifier:
        def sgd(parameters: Any) -> Optimizer:
            return torch.optim.SGD(parameters, 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)

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
    """ASWA over the given checkpoints, and the accuracy it decided by last."""
    rule = GatedMean()
    stream = files.stream()
    first = next(stream)
    floats = {name for name, tensor in first.items() if tensor.is_floating_point()}
    state = rule.init({name: first[name] for name in floats})
    for weights in (first, *stream):
        part = {name: weights[name] for name in floats}
        rule.offer(state, part, lambda found, weights=weights: bench.score({**weights, **found}))
    return {**first, **(rule.result(state) or {})}, state["score"]


def one_seed(data: Loaded, seed: int, steps: int, rates: tuple[float, ...]) -> dict[str, Any]:
    """Test accuracy of every method; of TWA with each of the rates, with validation accuracy; and what each cost."""
    start = time.perf_counter()
    bench = Bench(data, seed)
    test: dict[str, float] = {}
    cost: dict[str, dict[str, int]] = {}

    def charge(method: str, trained: int | None, stage: int = 0, evaluations: int = 0) -> None:
        """Notes what a method spent: on the run until its last checkpoint, on steps of its own, and on scores."""
        assert trained is not None
        total = trained + stage + evaluations * EVALUATION
        if total > steps:
            raise RuntimeError(f"{method} spent {total} steps, the plain run {steps}")
        cost[method] = {"trained": trained, "stage": stage, "evaluations": evaluations, "steps": total}

    def affordable(spent: int, last: int) -> Trajectory:
        return Trajectory.of_run(folder, end=steps - spent, last=last, weights="published")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "constant"
        plain = bench.train(steps, folder)
        test["plain"], test["plain, BatchNorm"] = bench.test(plain), bench.test(bench.fitted(plain))
        cosine = bench.train(steps, Path(name) / "cosine", cosine=True)
        test["cosine"] = bench.test(cosine)

        tail = Trajectory.of_run(folder, start=math.ceil(0.75 * steps), weights="published")
        test["SWA"] = bench.test(bench.fitted(tail.combine(mean(len(tail)))))
        charge("SWA", tail[-1].step)

        twa, stage = {}, steps // 10
        snapshots = affordable(stage, 12)
        for rate in rates:
            weights = bench.fitted(bench.twa(snapshots, stage, rate))
            twa[rate] = {"val": bench.accuracy(weights, data.val_dataloader()), "test": bench.test(weights)}
        charge("TWA", snapshots[-1].step, stage)
        test["mean of TWA's snapshots"] = bench.test(bench.fitted(snapshots.combine(mean(len(snapshots)))))

        offers = 5
        ends = affordable(offers * EVALUATION, 4 * offers)
        offered = Trajectory(ends[i] for i in reversed(range(len(ends) - 1, -1, -4)))
        before = bench.evaluations
        weights, _ = gated(bench, offered)
        charge("ASWA", offered[-1].step, evaluations=bench.evaluations - before)
        test["ASWA"] = bench.test(bench.fitted(weights))

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
            charge(label, files[-1].step, evaluations=bench.evaluations - before)
            test[label] = bench.test(bench.fitted(files.combine(found.coefficients)))
    seconds = round(time.perf_counter() - start, 1)
    return {"seed": seed, "test": test, "twa": twa, "cost": cost, "seconds": seconds}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Test accuracy of every method, and its difference to plain, paired."""
    tests = [run["test"] for run in runs]
    return {
        "test_accuracy": {name: interval([test[name] for test in tests]) for name in tests[0]},
        "difference_to_plain": {
            name: interval([test[name] - test["plain"] for test in tests]) for name in tests[0] if name != "plain"
        },
    }


def main() -> None:
    options = parser(__doc__, output=False)
    options.add_argument("--root", required=True, help="folder of CIFAR-10")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--steps", type=int, default=2000, help="that every method has")
    options.add_argument("--output", type=Path, required=True)
    arguments = options.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    top = header("lightning")
    setting = {"steps": arguments.steps, "images": IMAGES, "cadence": CADENCE, "evaluation_costs_steps": EVALUATION}
    result: dict[str, Any] = {**top, "setting": setting, "runs": []}
    if arguments.output.exists():
        result = json.loads(arguments.output.read_text())
        if (result["setting"], result["versions"]) != (setting, top["versions"]):
            options.error(f"{arguments.output} is of another setting or of other versions: name another file.")
    data = Loaded(arguments.root)

    if "tuning" not in result:
        result["tuning"] = one_seed(data, 1000, arguments.steps, RATES)
        result["twa_lr"] = max(RATES, key=lambda each: result["tuning"]["twa"][each]["val"])
        write(result, arguments.output)
        progress(json.dumps({"tuning": result["tuning"], "rate": result["twa_lr"]}))
    done = {run["seed"] for run in result["runs"]}
    for seed in range(arguments.seeds):
        if seed in done:
            continue
        run = one_seed(data, seed, arguments.steps, (result["twa_lr"],))
        run["test"]["TWA"] = run["twa"][result["twa_lr"]]["test"]
        result["runs"].append(run)
        result |= summary(result["runs"])
        write(result, arguments.output)
        progress(json.dumps(run))
    print(json.dumps(summary(result["runs"]), indent=1))


if __name__ == "__main__":
    main()
