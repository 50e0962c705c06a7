"""A stream of three tasks on modules of every kind: it runs, or is refused before a step with what to pass."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_modules import KINDS, Kind, Task
from tiny import trainer, values

from lightning_merge.callbacks import ContinualMerging

TASKS = ((0, 1), (2, 3), (4, 5))


def test_the_table_is_not_empty() -> None:
    assert len(KINDS) > 10


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_stream_runs_or_is_refused_before_a_step(kind: Kind, tmp_path: Path, caplog: Any) -> None:
    if "etector" in getattr(kind.make, "__name__", ""):
        pytest.importorskip("torchvision")
    module: Any = kind.make()
    cl = ContinualMerging(kind.preset, tmp_path / "bank", **kind.settings)
    if kind.refused:
        before = values(module)
        with pytest.raises(ValueError, match=kind.refused):
            trainer(tmp_path, [cl], max_epochs=1).fit(module, datamodule=Task(kind.data, TASKS[0], TASKS[0]))
        assert module.steps == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in values(module).items())
        assert all(parameter.requires_grad for parameter in module.parameters())
        return
    ends = []
    for labels in TASKS:
        classes = labels if kind.by_class else None
        with caplog.at_level(logging.INFO):
            trainer(tmp_path, [cl], max_epochs=1).fit(module, datamodule=Task(kind.data, classes, labels))
        ends.append(values(dict(module.named_parameters())))
    said = [record.message for record in caplog.records if "is task 0" in record.message]
    assert len(said) == 1
    assert all(f"`{name}`" in said[0] for name in kind.head) if kind.head else "there is no head" in said[0]
    merged = cl.merged_vector()
    assert merged is not None
    assert merged
    assert not set(kind.head) & merged.keys()
    assert cl.completed == 3
    assert set(module.state_dict()) == set(_fresh(kind).state_dict())
    if kind.by_class:
        for name in kind.head:
            if ends[0][name].dim():
                _assert_rows_of_their_tasks(name, ends)


def _fresh(kind: Kind) -> Any:
    module: Any = kind.make()
    module.setup("fit")
    module.configure_model()
    return module


def _assert_rows_of_their_tasks(name: str, ends: list[dict[str, Any]]) -> None:
    for number, (earlier, now) in enumerate(pairwise(ends), start=1):
        own = list(TASKS[number])
        others = [row for row in range(6) if row not in own]
        assert torch.equal(earlier[name][others], now[name][others]), f"{name}: rows of other classes have moved"
        assert not torch.equal(earlier[name][own], now[name][own]), f"{name}: nothing was trained"
