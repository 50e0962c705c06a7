"""Interpolate and Extrapolate: the model after the fit lies on the line through the start and the trained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Net, Walk, batches, steps, trainer, validation, values

from lightning_merge.callbacks import Extrapolate, Interpolate


@pytest.mark.parametrize("callback", [Interpolate(alpha=0.25), Extrapolate(alpha=1.5)])
def test_the_published_weights_lie_on_the_line(callback: Any, tmp_path: Path) -> None:
    module = Walk(start=2.0)
    run = trainer(tmp_path, [callback], max_epochs=3)
    run.fit(module, steps(4), steps(1))
    alpha = callback.rule.alpha
    assert module.w.item() == 2.0 + alpha * 12
    assert callback.raw_weights()["w"].item() == 2.0 + 12
    assert run.callback_metrics["val/w"] == 2.0 + alpha * 12


def test_the_anchor_may_be_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.tensor([10.0])}}, tmp_path / "anchor.ckpt")
    module = Walk(start=2.0)
    trainer(tmp_path, [Interpolate(0.5, str(tmp_path / "anchor.ckpt"))], max_epochs=1).fit(module, steps(4), steps(1))
    assert module.w.item() == 8.0


def test_several_strengths_are_measured_in_one_fit(tmp_path: Path) -> None:
    strengths = {f"a{alpha}": Interpolate(alpha, name=f"a{alpha}") for alpha in (0.25, 0.5)}
    run = trainer(tmp_path, list(strengths.values()), max_epochs=1)
    run.fit(Walk(), steps(4), steps(1))
    assert run.callback_metrics["val/w"] == 1.0
    assert run.callback_metrics["a0.5/val/w"] == 2.0


def test_no_line_about_the_share_of_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, [Interpolate(0.25)], max_epochs=1).fit(Net(), batches(), validation())
    assert "still the weights of the start" not in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interpolate(alpha=1.5), r"`alpha` must be in \(0, 1\], got 1.5. Above 1, use Extrapolate"),
        (lambda: Extrapolate(alpha=1.0), r"`alpha` must be in \(1, 10\], got 1.0. Up to 1, use Interpolate"),
    ],
)
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_anchor_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(values(Net()), tmp_path / "net.ckpt")
    run = trainer(tmp_path, [Interpolate(0.5, str(tmp_path / "net.ckpt"))], max_epochs=1)
    with pytest.raises(ValueError, match=r"`anchor`: .* is of another model: `w` of shape \(1,\) is missing"):
        run.fit(Walk(), steps(4), steps(1))
