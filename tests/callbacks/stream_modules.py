"""Modules of other people's kinds, small, each with the data of a task: what a stream of tasks is tried on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.utils.data import DataLoader, TensorDataset

SIZE = 16


class Task(pl.LightningDataModule):
    """A task: loaders of ``SIZE`` samples whose inputs and targets are made by a function of its classes."""

    def __init__(self, make: Callable[[Tensor], Any], classes: Sequence[int] | None, labels: Sequence[int]) -> None:
        super().__init__()
        self.make, self.labels = make, labels
        if classes is not None:
            self.classes = classes

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(min(self.labels))
        labels = torch.tensor(self.labels)[torch.arange(SIZE) % len(self.labels)]
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(1000, (1,), generator=generator)))
            return self.make(labels)


def tensors(*made: Tensor) -> Any:
    return DataLoader(TensorDataset(*made), batch_size=4)


class Base(pl.LightningModule):
    """Steps that are counted, and an optimizer over what is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, weight_decay=0.01)


class Segmenter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.excite = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid())
        self.classify = nn.Conv2d(4, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).relu()
        return self.classify(features * self.excite(features.mean((2, 3)))[:, :, None, None])


class TwoHeads(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kinds, self.places = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def loss(self, batch: Any) -> Tensor:
        features = self.body(batch[0]).relu()
        return cross_entropy(self.kinds(features), batch[1]) + cross_entropy(self.places(features), batch[1])


class HeadsInAList(Base):
    """One head a task: the batch says which."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 8), nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

    def loss(self, batch: Any) -> Tensor:
        task = int(batch[1].max()) // 2
        return cross_entropy(self.heads[task](self.body(batch[0]).relu()), batch[1] % 2)


class Cosine(Base):
    """As CLIP: unit vectors, and a temperature that is learned; a projection for another loss comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.prototypes = nn.Parameter(torch.randn(6, 8))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.projection = nn.Linear(8, 3)

    def loss(self, batch: Any) -> Tensor:
        features = self.body(batch[0])
        logits = self.scale.exp() * (normalize(features) @ normalize(self.prototypes).T)
        return cross_entropy(logits, batch[1]) + 0.1 * self.projection(features).square().mean()


class Encoder(Base):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 6)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.encoder(words).mean(1))


class Regression(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, batch: Any) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])


class BuiltLate(Base):
    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Module | None = None
        self.head: nn.Module | None = None

    def setup(self, stage: str) -> None:
        self.body = self.body or nn.Linear(4, 8)

    def configure_model(self) -> None:
        self.head = self.head or nn.Linear(8, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).relu())


class Steps(Base):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head, self.unused = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.head(self.body(batch[0]).relu()), batch[1]))
        optimizer.step()


class TiedWords(Base):
    """A language model whose output is its embedding: no head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.out.weight = self.words.weight

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.out(self.mix(self.words(batch[1])).tanh()), batch[1])


def detector() -> Base:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    class Detector(Base):
        def __init__(self) -> None:
            super().__init__()
            backbone: Any = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU())
            backbone.out_channels = 4
            self.model = FasterRCNN(
                backbone,
                num_classes=None,
                rpn_anchor_generator=AnchorGenerator(((8,),), ((1.0,),)),
                box_roi_pool=MultiScaleRoIAlign(["0"], 2, 0),
                min_size=32,
                max_size=32,
                rpn_pre_nms_top_n_train=8,
                rpn_post_nms_top_n_train=4,
                box_head=nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU()),
                box_predictor=_Predictor(),
            )

        def loss(self, batch: Any) -> Tensor:
            return torch.stack(list(self.model(*batch).values())).sum()

    return Detector()


class _Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(8, 6), nn.Linear(8, 24)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(features), self.bbox_pred(features)


def rows(labels: Tensor) -> Any:
    return tensors(torch.randn(SIZE, 4), labels)


def images(labels: Tensor) -> Any:
    return tensors(torch.randn(SIZE, 3, 4, 4), labels[:, None, None].expand(-1, 4, 4).contiguous())


def sentences(labels: Tensor) -> Any:
    return tensors(torch.randn(SIZE, 3, 8), labels)


def numbers(labels: Tensor) -> Any:
    return tensors(torch.randn(SIZE, 4), torch.randn(SIZE, 1))


def boxes(labels: Tensor) -> Any:
    def collate(found: list[int]) -> Any:
        box = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
        targets = [{"boxes": box, "labels": labels[number : number + 1]} for number in found]
        return [torch.rand(3, 32, 28 + 4 * (n % 2)) for n in found], targets

    return DataLoader(range(8), batch_size=4, collate_fn=collate)  # type: ignore[arg-type]


@dataclass
class Kind:
    """A module, and what becomes of a stream of it.

    Attributes:
        make: The module.
        data: Loader of a task, from labels.
        settings: Of ``ContinualMerging``.
        head: Names of the head that is found.
        by_class: Whether the data names its classes.
        refused: What the refusal says, if it is refused.
        preset: Of ``ContinualMerging``.
    """

    make: Callable[[], Base]
    data: Callable[[Tensor], Any] = rows
    settings: dict[str, Any] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    by_class: bool = True
    refused: str = ""
    preset: str = "average"


KINDS: dict[str, Kind] = {
    "a segmenter": Kind(Segmenter, images, head=("classify.weight", "classify.bias")),
    "two heads": Kind(TwoHeads, refused=r"`kinds` and `places` make\. Name .*`head='kinds\.\*'`"),
    "two heads, one named": Kind(TwoHeads, settings={"head": "kinds.*"}, head=("kinds.weight", "kinds.bias")),
    "two heads, both named": Kind(
        TwoHeads,
        settings={"head": ["kinds.*", "places.*"]},
        head=("kinds.weight", "kinds.bias", "places.weight", "places.bias"),
    ),
    "a head for each task in a list": Kind(
        HeadsInAList, by_class=False, head=tuple(f"heads.{i}.{n}" for i in range(3) for n in ("weight", "bias"))
    ),
    "a cosine head with a temperature": Kind(Cosine, head=("prototypes", "scale")),
    "an encoder with adapters": Kind(Encoder, sentences, head=("head.weight", "head.bias"), preset="lora-arithmetic"),
    "an encoder": Kind(Encoder, sentences, head=("head.weight", "head.bias")),
    "a detector": Kind(detector, boxes, refused=r"cannot tell which layer is the head.*cls_score.*`head="),
    "a detector whose head is named": Kind(
        detector,
        boxes,
        settings={"head": "*box_predictor.cls_score.*"},
        head=("model.roi_heads.box_predictor.cls_score.weight", "model.roi_heads.box_predictor.cls_score.bias"),
    ),
    "a regression": Kind(Regression, numbers, by_class=False, head=("net.2.weight", "net.2.bias")),
    "built in its own hooks": Kind(BuiltLate, head=("head.weight", "head.bias")),
    "manual optimization": Kind(Steps, head=("head.weight", "head.bias")),
    "a tied output": Kind(TiedWords, by_class=False),
    "a frozen head that cannot be told": Kind(
        Segmenter, images, settings={"heads": "freeze"}, refused=r"after `excite\.2`.*has `classify\.bias`.*`head="
    ),
    "a frozen head that was taken for another": Kind(
        lambda: _with_a_layer_before(Steps()), settings={"heads": "freeze"}, refused=r"`head='head\.\*'`"
    ),
    "rows that classes do not have": Kind(
        Regression, numbers, refused=r"`classes` must be rows of the head, in \[0, 1\), got 1"
    ),
}


def _with_a_layer_before(module: Any) -> Base:
    """Of ``Steps`` the loss by automatic optimization: the last layer by definition has no part in it."""

    class Automatic(Base):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.unused = module.body, module.head, module.unused

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.body(inputs).relu())

    return Automatic()
