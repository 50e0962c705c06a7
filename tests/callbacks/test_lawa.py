"""LAWA in a real Trainer: when its snapshots are taken, and that it goes on from any file, as SWAD does."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, Walk, batches, differing, raw_of, read, steps, trainer, validation, values
from torch import Tensor

from lightning_merge.callbacks import LAWA, SWAD


def test_lawa_in_a_trainer_is_the_mean_of_the_last_snapshots_once_there_are_k(tmp_path: Path) -> None:
    lawa = LAWA(k=3, every_n_steps=2)
    seen = []

    class Probe(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None:
            merged = lawa.merged_weights()
            seen.append(None if merged is None else merged["w"].item())

    class Square(Walk):
        """The weight is the square of the number of steps."""

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return -self.w.sum() * (2 * self.global_step + 1)

    trainer(tmp_path, [lawa, Probe(save_top_k=0)], max_epochs=1, precision="64-true").fit(Square(), steps(12))
    nothing = [None] * 5
    assert seen == pytest.approx([*nothing, *[v for a in (56, 116, 200) for v in (a / 3,) * 2], 308 / 3], abs=1e-12)


@pytest.mark.parametrize("store", ["device", "cpu", "disk"])
def test_lawa_and_swad_go_on_bit_for_bit_from_any_file(store: Any, tmp_path: Path) -> None:
    def averages(where: str) -> list[Any]:
        directory = str(tmp_path / where) if store == "disk" else None
        return [LAWA(k=2, store=store, directory=directory), SWAD("val/loss", n_converge=2, n_tolerance=2, stop=False)]

    def fit(callbacks: list[Any], **settings: Any) -> None:
        trainer(tmp_path, callbacks, max_epochs=6).fit(Net(norm=True), batches(4), validation(), **settings)

    files = ModelCheckpoint(tmp_path / "files", filename="{epoch}", save_top_k=-1)
    whole = averages("whole")
    fit([*whole, files])
    for epoch in range(6):
        path = tmp_path / "files" / f"epoch={epoch}.ckpt"
        if store == "disk" and epoch < 4:
            continue  # snapshots are kept for the last two checkpoints, and the final file is one of them
        again = averages("whole")
        fit(again, ckpt_path=path)
        for one, other in zip(whole, again, strict=True):
            assert not differing(one.merged_weights(), other.merged_weights())
            assert (one.updates, one.evaluations) == (other.updates, other.evaluations)
        assert raw_of(read(path)).keys() == values(Net(norm=True)).keys()


def test_both_intervals_of_lawa_are_refused() -> None:
    with pytest.raises(ValueError, match="`every_n_epochs` or `every_n_steps`, not both"):
        LAWA(every_n_epochs=1, every_n_steps=1)
