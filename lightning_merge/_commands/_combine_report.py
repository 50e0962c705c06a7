"""What ``average`` and ``soup`` print."""

import argparse
from collections.abc import Sequence
from typing import Any

from lightning_merge._commands._target import folder_of, literal, loading
from lightning_merge.files._sharded import META
from lightning_merge.trajectory import Trajectory


def _which(options: argparse.Namespace, trajectory: Trajectory) -> str:
    """Which of the sets of each file was taken, where there are several."""
    several = any(len(checkpoint.sets) > 1 for checkpoint in trajectory)
    return f"; of each file the {options.weights} weights (`--weights`)" if several else ""


def report(
    options: argparse.Namespace,
    trajectory: Trajectory,
    provenance: dict[str, Any],
    lost: list[str],
    remarks: Sequence[str] = (),
) -> str:
    """What was merged into what, how to load it, and all that was left out."""
    size = sum(tensor.numel() for tensor in trajectory[0].like.values())
    lines = [
        f"{options.out}: {options.rule} of {len(trajectory)} checkpoints, {size:,} numbers{_which(options, trajectory)}"
    ]
    if provenance["coefficients"] is not None:
        width = max(len(str(checkpoint.path)) for checkpoint in trajectory)
        for checkpoint, coefficient in zip(trajectory, provenance["coefficients"], strict=True):
            of_set = f"  {checkpoint.holds}" if len(checkpoint.sets) > 1 else ""
            lines.append(f"  {checkpoint.path!s:{width}}  {coefficient:8.4f}{of_set}")
    if provenance["score"] is not None:
        tied = f", {ties} others the same: the last is taken" if (ties := provenance["ties"]) else ""
        lines.append(
            f"  {options.monitor} = {provenance['score']:.6g} after {provenance['evaluations']} evaluations{tied}; the"
            " data it was chosen on flatter it, so test on other data"
        )
    lines += [f"  {remark}" for remark in remarks]
    lines += [f"  left out: {path}, {why}" for path, why in trajectory.left_out.items()]
    if trajectory.differing:
        lines.append(f"  counters that differ, those of the last file: {', '.join(trajectory.differing[:8])}")
    if lost:
        lines.append(
            f"  left out, since it differs or is no plain data: {', '.join(lost[:8])}; of hyperparameters, hand what is"
            " missing to `load_from_checkpoint`"
        )
    if options.config is None and any(name.endswith("running_mean") for name in trajectory[0].places):
        lines.append("  BatchNorm statistics are averaged, which fits badly; `--config FILE` measures them again")
    return "\n".join([*lines, f"  {_how_to_load(options.out)}"])


def _how_to_load(out: str) -> str:
    """The line that loads what was written."""
    folder = folder_of(out)
    if folder is None:
        how = loading(out, 'torch.load({path}, weights_only=True)["state_dict"]')
        return f"load: {how}"
    if (folder / META).exists():
        return f"go on under a strategy that shards: trainer.fit(model, ckpt_path={literal(folder)})"
    return f"load: torch.distributed.checkpoint.load(state_dict, checkpoint_id={literal(folder)})"
