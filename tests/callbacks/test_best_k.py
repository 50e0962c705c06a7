"""BestK: which validations it keeps, what it publishes, and that nothing is copied between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import WalkParts, of, steps, trainer

from lightning_merge.callbacks import EMA, BestK
from lightning_merge.rules import BestMean


class ScoredParts(WalkParts):
    """A weight that grows by one per step; each validation logs the next of the scores."""

    def __init__(self, scores: tuple[float, ...]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        epoch = min(self.current_epoch, len(self.scores) - 1)
        self.log("val/loss", torch.tensor(self.scores[epoch]))
        self.log("val/acc", -torch.tensor(self.scores[epoch]))


def fitted(callback: BestK, scores: tuple[float, ...], root: Path, epochs: int | None = None, **settings: Any) -> Any:
    module = of(ScoredParts)(scores)
    saved = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
    run = trainer(root, [callback, saved], max_epochs=epochs or len(scores))
    run.fit(module, steps(2), steps(1), **settings)
    return module


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ((3.0, 1.0, 2.0, 9.0), 2, (4 + 6) / 2),  # the weights are 2, 4, 6, 8
        ((3.0, 1.0, 2.0, 9.0), 1, 4),
        ((3.0, 1.0), 5, (2 + 4) / 2),
        ((1.0, 1.0, 1.0), 2, (2 + 4) / 2),  # the earliest of equals
        ((float("nan"), 1.0, float("inf"), 2.0), 3, (4 + 8) / 2),
    ],
)
def test_published_is_the_mean_of_the_best_validations(
    scores: tuple[float, ...], k: int, expected: float, tmp_path: Path
) -> None:
    for monitor in ("val/loss", "val/acc"):
        best = BestK(monitor, k)
        assert fitted(best, scores, tmp_path / monitor[-3:]).w.item() == expected
        assert best.updates >= 1


def test_nothing_is_copied_between_validations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    taken = BestMean.evaluate
    monkeypatch.setattr(BestMean, "evaluate", lambda *arguments: (calls.append(1), taken(*arguments))[1])
    monkeypatch.setattr(BestMean, "update", lambda *arguments: pytest.fail("a step was taken in"))
    fitted(BestK("val/loss", 2), (3.0, 1.0, 2.0), tmp_path)
    assert len(calls) == 3


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    scores = (3.0, 1.0, 2.0, 0.5)
    whole, first, again = (BestK("val/loss", 2) for _ in range(3))
    expected = fitted(whole, scores, tmp_path / "whole").w.item()
    fitted(first, scores, tmp_path / "first", epochs=2)
    resumed = fitted(again, scores, tmp_path / "again", 4, ckpt_path=str(tmp_path / "first" / "epoch=1.ckpt"))
    assert resumed.w.item() == expected == (4 + 8) / 2
    assert again.update_window == whole.update_window == (2, 8)


def test_weights_with_a_nan_are_not_kept_whatever_they_score(tmp_path: Path) -> None:
    class Spoiled(of(ScoredParts)):
        def on_validation_start(self) -> None:
            if self.current_epoch == 1:
                self.w.data.fill_(torch.nan)

    best, module = BestK("val/loss", 2), Spoiled((3.0, 1.0))
    with pytest.warns(UserWarning, match="`w` holds a NaN or an infinity after applied step 4"):
        trainer(tmp_path, [best], max_epochs=2).fit(module, steps(2), steps(1))
    assert (best.skipped_nonfinite, module.w.item()) == (1, 2.0)


def test_the_metric_must_say_which_score_is_better_and_be_logged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`mode` of BestK must be given for 'val/x'"):
        BestK("val/x")
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        BestK("val/loss", 0)
    run = trainer(tmp_path, [BestK("val/none", mode="min"), EMA(0.5)], max_epochs=1)
    with pytest.raises(ValueError, match="BestK 'best_k': `monitor` must be a metric that validation logs"):
        run.fit(of(ScoredParts)((1.0,)), steps(2), steps(1))
