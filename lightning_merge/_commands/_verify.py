"""``lightning-merge verify``: whether the files of a run hold the weights that their scores were measured on."""

from math import isfinite
from pathlib import Path
from typing import Any

from lightning_merge.files._label import Label
from lightning_merge.files._read import read
from lightning_merge.files._sets import sources_of
from lightning_merge.files._stand_ins import stands_for


def verify(run: Path, tolerance: float) -> tuple[str, bool]:
    """A line per file, and whether all that could be measured again agree with what was recorded.

    Args:
        run: The run folder: ``config.yaml`` and checkpoints anywhere below it.
        tolerance: Difference that counts as equal, as a share of the recorded value.

    Raises:
        ValueError: If it is no run folder, or no file of it records a metric.
    """
    from lightning_merge._commands._runs import Bench

    if not run.is_dir():
        raise ValueError(f"there is no folder {run}: give a run folder, as `runs/digits/swa/version_0`.")
    config = run / "config.yaml"
    if not config.is_file():
        below = [str(path.parent) for path in sorted(run.glob("**/config.yaml"))]
        cure = f" Run folders below it: {', '.join(below[:5])}." if below else ""
        raise ValueError(f"{run} has no config.yaml, so its files cannot be measured again.{cure}")
    if tolerance < 0:
        raise ValueError(f"`--tolerance` must be at least 0, got {tolerance}.")
    labels: dict[Path, Label | None] = {}
    merges: set[Path] = set()
    unread: dict[Path, dict[str, Any]] = {}  # weights of files that Lightning would not read: more than plain data
    for path in sorted(run.glob("**/*.ckpt")):
        labels[path] = Label.of(content := read(path), path)
        if sources_of(content):
            merges.add(path)
        if labels[path] is not None and stands_for(content) is not None:
            unread[path] = content["state_dict"]
    recorded = {path: label for path, label in labels.items() if label is not None and label.metrics}
    if not recorded:
        raise ValueError(
            f"no checkpoint below {run} records a metric ({len(labels)} found): nothing to compare with. Files written"
            " beside an average of lightning-merge record what validation measured on the weights they hold."
        )
    bench = Bench(config)
    lines, agrees = [], True
    for path in labels:
        shown = path.relative_to(run)
        if path not in recorded:
            why = "written without lightning-merge" if labels[path] is None else "its weights were not measured"
            why = "merged by lightning-merge, and not measured" if path in merges else why
            lines.append(f"  skipped  {shown}: {why}")
            continue
        metrics, holds = recorded[path].metrics, recorded[path].holds
        again = bench.metrics(path=path) if path not in unread else bench.metrics(unread[path])
        same = all(_equal(value, again.get(name), tolerance) for name, value in metrics.items())
        agrees &= same
        figures = "; ".join(f"{k} recorded {v:.6g}, measured {_show(again.get(k))}" for k, v in metrics.items())
        lines.append(f"  {'equal  ' if same else 'DIFFERS'}  {shown} ({holds}): {figures}")
    verdict = "hold the weights their scores were measured on" if agrees else "do NOT all hold what was measured"
    return "\n".join([f"{run}: {len(recorded)} files {verdict}", *lines]), agrees


def _equal(recorded: float, measured: float | None, tolerance: float) -> bool:
    if measured is None:
        return False
    same = recorded == measured or (recorded != recorded and measured != measured)  # infinities, NaN
    return same or (isfinite(recorded) and abs(recorded - measured) <= tolerance * max(abs(recorded), 1e-12))


def _show(value: float | None) -> str:
    return "not logged" if value is None else f"{value:.6g}"
