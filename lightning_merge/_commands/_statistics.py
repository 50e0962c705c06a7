"""Statistics of a checkpoint, on the model and data of its run."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_merge._checks import whole
from lightning_merge._commands._runs import Bench, quiet
from lightning_merge._commands._target import refuse_input, refuse_target
from lightning_merge.callbacks._importance_run._fisher import FisherPass
from lightning_merge.callbacks._importance_run._grams import GramPass
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._user_step import transferred
from lightning_merge.files._layouts import open_set
from lightning_merge.importance import Statistics
from lightning_merge.importance._samples import Samples
from lightning_merge.selections import Selection


def measure(options: argparse.Namespace) -> str:
    """Measures, writes the file, and says what is in it.

    Raises:
        ValueError: If something does not fit; nothing is written then.
    """
    samples = whole("--samples", options.samples, 1)
    opened, chosen = open_set(options.file)
    out = options.out or Path(opened.path).with_name(f"{options.kind}-statistics.safetensors")
    refuse_target(out, "`--out`", (".safetensors",), options.force)
    refuse_input(out, [opened.path, options.config])
    bench = Bench(options.config)
    bench.metrics(dict(opened.choose(chosen).weights))  # sets up devices and data
    trainer, model = bench.trainer, bench.model
    model.to(trainer.strategy.root_device)
    recent = RecentBatches(_batches(bench, samples), batches=samples)
    held = Selection(trainable=True).parameters(model)
    with quiet():
        if options.kind == "fisher":
            cure = "Take `--kind gram`."
            fisher = FisherPass("statistics", "`--kind fisher`", cure, options.labels)
            squared = fisher.measured(trainer, model, held, recent, samples)
            facts: dict[str, Any] = {"samples": squared.samples, "labels": options.labels}
            found = Statistics.of(model, "fisher", squared.means, **facts)
        else:
            grams, count = GramPass("`--kind gram`").measured(trainer, model, held, recent, samples)
            tensors = grams.means()
            found = Statistics.of(model, "gram", tensors, samples=count, left_out=grams.left_out)
    found.write(out)
    return f"{out}: {found.summary}, of the {chosen} weights in {opened.path}{found.omissions}"


def _batches(bench: Bench, samples: int) -> Iterator[Any]:
    """Of the training loader, until there are so many samples."""
    count = 0
    for batch in bench.training_loader():
        if count >= samples:
            return
        count += Samples(batch).count
        yield transferred(bench.trainer, bench.model, batch)
