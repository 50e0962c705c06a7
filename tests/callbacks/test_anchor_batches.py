"""Fisher information of single samples, cut out of batches of every make."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from stream_modules import Base, Segmenter, Task, TwoHeads, images, rows
from tiny import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.callbacks import Anchor
from lightning_merge.importance._samples import Samples

PICTURES = [torch.randn(3, 5, 5 + size) for size in (0, 1, 0, 2)]
BOXES = [{"boxes": torch.rand(count, 4)} for count in (1, 3, 2, 1)]
SAME = [torch.randn(3, 5, 5) for _ in range(4)]

# A batch of four, and what the third sample of it is.
BATCHES: dict[str, tuple[Any, Any]] = {
    "a tensor": (torch.arange(8).view(4, 2), torch.tensor([[4, 5]])),
    "a pair": ([torch.arange(4), torch.arange(4) * 2], [torch.tensor([2]), torch.tensor([4])]),
    "a number and a name": (
        {"x": torch.arange(4), "task": torch.tensor(1), "name": "a"},
        {"x": torch.tensor([2]), "task": torch.tensor(1), "name": "a"},
    ),
    "a constant before": (
        {"scale": torch.tensor([9]), "x": torch.arange(4)},
        {"scale": torch.tensor([9]), "x": torch.tensor([2])},
    ),
    "weights of classes": (
        [torch.arange(4), torch.arange(4), torch.arange(7)],
        [torch.tensor([2]), torch.tensor([2]), torch.arange(7)],
    ),
    "nested": (
        {"in": {"ids": torch.arange(4)}, "y": torch.arange(4)},
        {"in": {"ids": torch.tensor([2])}, "y": torch.tensor([2])},
    ),
    "two views": (
        [[torch.arange(4), torch.arange(4)], torch.arange(4)],
        [[torch.tensor([2]), torch.tensor([2])], torch.tensor([2])],
    ),
    "paths": ([torch.arange(4), ["a", "b", "c", "d"]], [torch.tensor([2]), ["c"]]),
    "a detector's": ((PICTURES, BOXES), ([PICTURES[2]], [BOXES[2]])),
    "a detector's of one size": ((SAME, BOXES), ([SAME[2]], [BOXES[2]])),
    "a detector's in a dict": ({"images": SAME, "targets": BOXES}, {"images": [SAME[2]], "targets": [BOXES[2]]}),
    "a list of samples": (list(zip(SAME, BOXES, strict=True)), [(SAME[2], BOXES[2])]),
    "a list of labelled samples": ([(each, torch.tensor(1)) for each in SAME], [(SAME[2], torch.tensor(1))]),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_a_sample_is_what_belongs_to_it(batch: Any) -> None:
    whole, third = batch
    samples = Samples(whole)
    assert samples.count == 4
    assert repr(samples[2]) == repr(third)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.arange(4), torch.arange(7)], r"lengths \[4, 7\], which could each be the batch's"),
        ({"task": 1}, "got none in dict"),
        ("text", "got none in str"),
    ],
)
def test_samples_that_cannot_be_told_apart_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"single samples are taken from batches of tensors.*{message}"):
        Samples(batch)


def fit(root: Path, module: Any, data: Any, **settings: Any) -> Anchor:
    anchor = Anchor(10.0, "fisher", at="last", samples=16, **settings)
    trainer(root, [anchor], max_epochs=1).fit(module, data)
    return anchor


class Detects(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
        self.given: list[tuple[int, ...]] = []

    def loss(self, batch: Any) -> Tensor:
        found, targets = batch
        self.given += [tuple(each.shape) for each in found]
        features = torch.stack([self.body(each).relu().mean((1, 2)) for each in found])
        return (self.head(features) - torch.stack([t["boxes"].mean(0) for t in targets])).square().mean()


def test_information_of_a_detector_is_the_mean_over_images(tmp_path: Path) -> None:
    module = Detects()
    data: Any = DataLoader(range(4), batch_size=4, collate_fn=lambda _: (PICTURES, BOXES))
    anchor = fit(tmp_path, module, data)
    expected = torch.zeros_like(module.body.weight)
    for image, boxes in zip(PICTURES, BOXES, strict=True):
        (gradient,) = torch.autograd.grad(module.loss(([image], [boxes])), [module.body.weight])
        expected += gradient.square() / 4
    torch.testing.assert_close(anchor._fisher["body.weight"], expected)


class Contrast(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.projection = nn.Linear(4, 8), nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        z = nn.functional.normalize(self.projection(self.body(batch[0]).relu()))
        return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))


class Spread(Contrast):
    def loss(self, batch: Any) -> Tensor:
        return self.projection(self.body(batch[0])).std(0).mean()


@pytest.mark.parametrize(("make", "message"), [(Contrast, "0 of each alone"), (Spread, "NaN or an infinity")])
def test_a_loss_that_compares_samples_is_refused_before_a_step(make: Any, message: str, tmp_path: Path) -> None:
    module = make()
    with pytest.raises(ValueError, match=rf"`importance='fisher'`.*{message}.*Choose `importance='identity'`"):
        fit(tmp_path, module, rows(torch.arange(16) % 2))
    assert module.steps == 0


def test_information_that_is_nothing_and_samples_that_fail_are_said_at_the_end(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.over = True

    class Module(Base):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.over = nn.Linear(4, 8), nn.Linear(8, 2), False

        def loss(self, batch: Any) -> Tensor:
            if self.over and (batch[1] == 0).all():
                raise RuntimeError("no box in this image")
            return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1]) * (0.0 if self.over else 1.0)

    anchor = Anchor(10.0, "fisher", at="last", samples=16)
    with (
        pytest.warns(UserWarning, match=r"Fisher information is of 8 samples; 8 more gave none.*no box in this image"),
        pytest.warns(UserWarning, match=r"all Fisher information of the 8 samples is 0, so nothing .* is held"),
    ):
        trainer(tmp_path, [Fails(), anchor], max_epochs=1).fit(Module(), rows(torch.arange(16) % 2))


def test_the_head_that_is_not_held_is_what_makes_the_logits(tmp_path: Path) -> None:
    module = Segmenter()
    anchor = Anchor(1e8)
    trainer(tmp_path, [anchor], max_epochs=1).fit(module, datamodule=Task(images, None, (0, 1)))
    start = Segmenter()
    torch.testing.assert_close(module.excite[2].weight, start.excite[2].weight)
    assert not torch.equal(module.classify.weight, start.classify.weight)
    assert "excite.2.weight" in anchor._anchor
    assert "classify.weight" not in anchor._anchor
    with pytest.raises(ValueError, match=r"Anchor cannot tell which layer is the head.*the others are held"):
        trainer(tmp_path, [Anchor(1.0)], max_epochs=1).fit(TwoHeads(), datamodule=Task(rows, None, (0, 1)))
