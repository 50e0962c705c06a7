"""``lightning-merge unlearn``: a task taken out of a stream's merged model, if the others keep their accuracy."""

import json
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule
from rich.console import Console

from lightning_merge.combiners import add_vector, ethos, ext_sub, negate
from lightning_merge.continual import Bank, StreamState
from lightning_merge.files import atomic
from lightning_merge.recipes.streams._command import merging_of, parse
from lightning_merge.recipes.streams._run import accuracies
from lightning_merge.weights import copy_, named_tensors

Projection: TypeAlias = Literal["none", "ext-sub", "ethos"]


def unlearn(folder: Path, task: str, keep: float, projection: Projection = "none", scale: float = 1.0) -> bool:
    """Subtracts a task's vector from a finished stream, and prints the effect on it and on the control tasks.

    Args:
        folder: Of the stream; its bank must have kept every vector, or merge by a sum or mean.
        task: Which one.
        keep: The share of their mean accuracy that the control tasks must keep, in (0, 1]; else nothing is changed.
        projection: What is subtracted besides, from the merge of the other tasks: nothing, or a part of the vector.
        scale: How much of that part; above 0.

    Returns:
        Whether they did.

    Raises:
        ValueError: If ``keep`` or ``scale`` is out of range, or the folder holds no stream, or no such task.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"`keep` must be in (0, 1], got {keep}.")
    if not 0 < scale < float("inf") or (projection == "none" and scale != 1):
        raise ValueError(f"`scale` must be above 0, and left out without a projection, got {scale} and {projection}.")
    for name in ("config.yaml", "stream.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no stream: it has no {name}. Name the folder of a `run continual/...`.")
    cli = parse(["--config", str(folder / "config.yaml")])
    tasks, _ = cli.config_init["stream"].of(cli.datamodule)
    merging = merging_of(cli, folder)
    names = [each.task for each in tasks]
    tester = cli.trainer_of([])

    merging.load_merged(cli.model)
    before = accuracies(tester, cli.model, tasks, merging.completed - 1)["accuracy"]
    merging.load_merged(cli.model, without=task)
    if projection != "none":
        _subtract(cli.model, merging.folder, task, projection, scale)
    after = accuracies(tester, cli.model, tasks, merging.completed - 1)["accuracy"]
    console = Console()
    merged = [index for index, name in enumerate(names) if name in merging.tasks]
    for index in merged:
        role = "unlearned" if names[index] == task else "control"
        console.print(f"{names[index]:10} {before[index]:7.1%} -> {after[index]:7.1%}  {role}")
    control = [index for index in merged if names[index] != task]
    was, now = (sum(row[index] for index in control) / max(1, len(control)) for row in (before, after))
    kept = now >= keep * was
    console.print(f"control tasks: {was:.1%} -> {now:.1%}; {keep:.0%} of it must be kept")
    if kept:
        with atomic(folder / f"without-{task}.ckpt") as file:
            torch.save({"state_dict": cli.model.state_dict()}, file)
        Bank(merging.folder).remove(task)
        console.print(f"{task} is unlearned; the merged model is in {folder / f'without-{task}.ckpt'}")
        entry = {"task": task, "projection": projection, "scale": scale, "before": before, "after": after}
        _record(folder, entry)
    else:
        console.print("Nothing was changed: the other tasks would lose too much. A lower `--keep` accepts it.")
    return kept


@torch.no_grad()
def _subtract(module: LightningModule, folder: Path, task: str, projection: Projection, scale: float) -> None:
    """Goes on from the merge of the other tasks, which is in the module, away from the task."""
    vector, base = Bank(folder).vector(task), StreamState(folder).base()
    live = named_tensors(module)
    others = {name: live[name].to(vector[name]) for name in vector}
    if projection == "ethos":
        part = ethos(vector, others)
    else:
        part = ext_sub(vector, {name: tensor - base[name].to(tensor) for name, tensor in others.items()})
    copy_({name: live[name] for name in vector}, add_vector(others, negate(part, scale)))


def _record(folder: Path, entry: dict[str, object]) -> None:
    record = json.loads((folder / "stream.json").read_text())
    record.setdefault("unlearned", []).append(entry)
    with atomic(folder / "stream.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
