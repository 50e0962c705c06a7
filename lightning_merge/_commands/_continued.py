"""``average --continue-from``: new checkpoints added to a merge, without the old ones."""

import argparse
import os
from pathlib import Path
from typing import Any

from lightning_merge.files import read
from lightning_merge.files._sets import sources_of
from lightning_merge.files._sharded import is_sharded_checkpoint, provenance_of
from lightning_merge.trajectory import Checkpoint, Trajectory, exponential

_RULES = ("mean", "ema")


def refuse_rule(rule: str) -> None:
    """Raises if a merge by this rule cannot grow."""
    if rule not in _RULES:
        raise ValueError(
            f"`--continue-from` goes with `--rule mean` and `--rule ema`, got {rule}: with it a further checkpoint"
            " changes the weights of the old ones beside each other, so all have to be read again. Leave"
            " `--continue-from` out."
        )


class Earlier:
    """A merge that goes on.

    Args:
        options: Of ``average``; ``continue_from`` is a file or folder that it wrote.

    Raises:
        ValueError: If the file does not say what it was merged from, or by another rule than the one that is asked for.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        path: Path = options.continue_from
        if is_sharded_checkpoint(path):
            about: Any = provenance_of(path)
        else:
            content = read(path, "meta")
            about = content.get("provenance") if isinstance(content, dict) else None
        if not sources_of({"provenance": about}):
            raise ValueError(
                f"`--continue-from` must name what `lightning-merge average` wrote, and {path} does not say of what it"
                " was merged."
            )
        for name in ("rule", "weights", *(("decay",) if options.rule == "ema" else ())):
            if about.get(name) != getattr(options, name):
                raise ValueError(
                    f"{path} was merged with `--{name} {about.get(name)}`, and goes on only so: got"
                    f" {getattr(options, name)}."
                )
        self.checkpoint = Checkpoint(path, options.weights)  # a folder may hold another set of its last input too
        self.in_order = options.rule == "ema"
        self.files: list[str] = _listed(about, "files", str, path)
        self.sets: list[str] = _listed(about, "sets", str, path)
        self.sha256: list[str] = _listed(about, "sha256", str, path)
        self.coefficients: list[float] = _listed(about, "coefficients", float, path)

    def with_new(self, trajectory: Trajectory) -> Trajectory:
        """The merge, and the checkpoints of a run that are not in it yet.

        Raises:
            ValueError: If there is none, or the rule goes by order and one is older than what is in the merge.
        """
        known = {Path(file).resolve() for file in self.files}
        is_new = [each.path.resolve() not in known and each.sha256() not in self.sha256 for each in trajectory]
        new = [each for each, new in zip(trajectory, is_new, strict=True) if new]  # a known one may have been moved
        if self.in_order and new:
            done = self.checkpoint.step
            late = done is not None and new[0].step is not None and new[0].step <= done
            if late or not all(is_new[is_new.index(True) :]):
                raise ValueError(
                    f"{new[0].path} comes before a checkpoint that {self.checkpoint.path} holds already, and an `ema`"
                    f" goes by order: leave older ones out with `--start`, or leave `--continue-from` out."
                )
        if not new:
            raise ValueError(f"{self.checkpoint.path} holds all of these {len(trajectory)} checkpoints already.")
        found = Trajectory([self.checkpoint, *new])
        found.left_out = trajectory.left_out
        return found

    def weights(self, options: argparse.Namespace, new: int) -> list[float]:
        """Those of the merge and of each new checkpoint, which together are what all of them would have had."""
        if options.rule == "ema":
            return list(exponential(new + 1, options.decay))
        count = len(self.files) + new
        return [len(self.files) / count, *([1 / count] * new)]

    def grown(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """What is written of the whole, given that of the merge and the new checkpoints."""
        share, *of_new = provenance["coefficients"]
        return {
            **provenance,
            "files": [*self.files, *provenance["files"][1:]],
            "sets": [*self.sets, *provenance["sets"][1:]],
            "sha256": [*self.sha256, *provenance["sha256"][1:]],
            "coefficients": [*(share * each for each in self.coefficients), *of_new],
            "continued_from": os.fspath(self.checkpoint.path),
        }


def _listed(about: dict[str, Any], name: str, kind: type, path: Path) -> list[Any]:
    """What the provenance of a merge has of each file.

    Raises:
        ValueError: If it has not, which is no work of ``average``.
    """
    found = about.get(name)
    if isinstance(found, list) and len(found) == len(about["files"]) and all(isinstance(each, kind) for each in found):
        return found
    raise ValueError(
        f"{path} cannot go on: `{name}` of what it says it was merged from is not as `average` writes it. It was"
        " changed since: merge all checkpoints again, without `--continue-from`."
    )
