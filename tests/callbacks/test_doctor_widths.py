"""The width of a post-hoc average that would have been best, as the doctor measures it."""

from pathlib import Path

import pytest
from tiny import WalkParts, of, steps, trainer
from torch import Tensor

from lightning_merge.callbacks import EMA, Doctor, PostHocEMA
from lightning_merge.recipes.report import _page

MIDDLE = (0.05 * 0.1) ** 0.5


class NearParts(WalkParts):
    """The loss is the distance of the weight, which is the step, from a target."""

    target = 0.0

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", (self.w.detach() - self.target).abs().sum())


def fitted(folder: Path, target: float = 0.0) -> tuple[PostHocEMA, Doctor]:
    ema, doctor, module = PostHocEMA(every=2), Doctor(points=1), of(NearParts)()
    module.target = target
    trainer(folder, [ema, doctor], max_steps=40).fit(module, steps(40), steps(1))
    return ema, doctor


def value(ema: PostHocEMA, sigma: float) -> float:
    return float(ema.synthesise(sigma)["w"])


def test_widths_between_the_tracked_ones_are_measured(tmp_path: Path) -> None:
    ema, doctor = fitted(tmp_path)
    losses = doctor.widths["posthoc-ema"]
    assert list(losses) == [0.05, pytest.approx(MIDDLE), 0.1]
    assert list(losses.values()) == pytest.approx([value(ema, sigma) for sigma in losses])
    assert value(ema, 0.05) > value(ema, MIDDLE) > value(ema, 0.1)


@pytest.mark.parametrize(
    ("best", "said"),
    [
        (
            MIDDLE,
            "has the lowest loss, 0, where 0.1 is published, with {}. `synthesise(0.07071)` makes it.",
        ),
        (0.05, "`synthesise(0.05)` makes it; it is the narrowest one that is tracked: try `sigmas=(0.025, 0.05)`."),
        (0.1, "and is published. It is the widest one that is tracked: try `sigmas=(0.1, 0.2)`."),
    ],
)
def test_the_best_width_is_said_with_what_to_type(
    best: float, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ema, _ = fitted(tmp_path)
    target = value(ema, best)
    with caplog.at_level("INFO"):
        again, doctor = fitted(tmp_path, target)
    losses = doctor.widths["posthoc-ema"]
    assert min(losses, key=losses.__getitem__) == pytest.approx(best)
    assert said.format(f"{abs(value(again, 0.1) - target):.4g}") in caplog.text


def test_an_average_of_one_width_has_none_to_choose(tmp_path: Path) -> None:
    doctor = Doctor(points=1)
    trainer(tmp_path, [EMA(decay=0.9), doctor], max_steps=4).fit(of(NearParts)(), steps(4), steps(1))
    assert doctor.widths == {}


def test_the_page_shows_the_loss_by_width() -> None:
    html = _page.widths("posthoc-ema", {0.05: 0.4, MIDDLE: 0.3, 0.1: 0.5})
    assert 'alt="loss of posthoc-ema by its width"' in html
    assert html.count("data:image/png;base64,") == 1
