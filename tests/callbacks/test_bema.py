"""BEMA: what it publishes in a run, that start and average are in its files, and that it serves as a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, Walk, batches, differing, read, steps, trainer, values
from torch import Tensor

from lightning_merge.callbacks import BEMA, teacher
from lightning_merge.selections import Selection


def by_hand(path: list[float], every: int = 1) -> float:
    """The published weights after a path whose first is the start."""
    start, average = path[0], path[0]
    for update, weight in enumerate(path[1:], 1):
        average += (10 + update * every) ** -0.5 * (weight - average)
    return average + (10 + (len(path) - 1) * every) ** -0.2 * (path[-1] - start)


@pytest.mark.parametrize(
    ("arguments", "path", "every"),
    [
        ({}, range(9), 1),
        ({"start_step": 3}, range(3, 9), 1),
        ({"every_n_steps": 2}, range(0, 9, 2), 2),
    ],
    ids=str,
)
def test_it_is_the_average_moved_on_from_where_it_started(
    arguments: dict[str, Any], path: range, every: int, tmp_path: Path
) -> None:
    module = Walk()
    trainer(tmp_path, [BEMA(**arguments)], max_epochs=1).fit(module, steps(8), steps(1))
    assert module.w.item() == pytest.approx(by_hand([float(weight) for weight in path], every))


def test_a_resumed_run_ends_as_the_uninterrupted_one_since_the_file_has_start_and_average(tmp_path: Path) -> None:
    def fitted(root: Path, **settings: Any) -> BEMA:
        average = BEMA(0.7)
        files = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
        trainer(root, [average, files], max_epochs=3).fit(Net(norm=True), batches(4), batches(1), **settings)
        return average

    whole = fitted(tmp_path / "whole")
    file = tmp_path / "whole" / "epoch=0.ckpt"
    state = read(file)["lightning_merge"]["states"]["bema"]["state"]
    started = values(Net(norm=True))
    for name, tensor in state["start"].items():
        assert torch.equal(tensor, started[name])
    assert {"start", "average"} <= state.keys()
    resumed = fitted(tmp_path / "again", ckpt_path=str(file))
    assert resumed.updates == whole.updates == 12
    assert differing(resumed.merged_weights(), whole.merged_weights()) == []
    assert differing(resumed.raw_weights(), whole.raw_weights()) == []


def test_it_serves_as_a_teacher(tmp_path: Path) -> None:
    class Taught(Net):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with teacher(self, "bema"):
                target = self(batch[0])
            self.seen.append(values(average.merged_weights() or {}))
            self.targets.append(target)
            return (self(batch[0]) - target).square().mean() + self.loss(batch)

    average, module = BEMA(selection=Selection(buffers="copy"), validate="raw"), Taught()
    module.seen, module.targets = [], []
    trainer(tmp_path, [average], max_epochs=1).fit(module, batches(4), batches(1))
    plain = Net()
    for merged, target, batch in zip(module.seen[1:], module.targets[1:], list(batches(4))[1:], strict=True):
        plain.load_state_dict(merged)
        torch.testing.assert_close(plain(batch[0]), target)


def test_a_variance_that_falls_stays_one(tmp_path: Path) -> None:
    average = BEMA(0.1, bias_power=0, multiplier=5, selection=Selection(buffers="average"))
    module = Net(norm=True)
    module.net[1].running_var.fill_(100.0)
    trainer(tmp_path, [average], max_epochs=2).fit(module, batches(4), batches(1))
    assert (module.net[1].running_var > 0).all()


def test_what_it_does_not_take_is_refused_by_name() -> None:
    for arguments, message in (
        ({"ema_power": 1.5}, r"`ema_power` must be in \[0, 1\], got 1.5"),
        ({"bias_power": -0.1}, "`bias_power` must be at least 0, got -0.1"),
        ({"lag": -1}, "`lag` must be at least 0, got -1"),
        ({"multiplier": -1}, "`multiplier` must be at least 0, got -1"),
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        ({"start_step": 1.5}, "`start_step` must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            BEMA(**arguments)
