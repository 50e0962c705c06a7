"""What ContinualMerging checks before a task is trained: its name, its classes, its model, its neighbours."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from stream_modules import BuiltLate, Cosine, Segmenter, Steps, Task, TwoHeads, images, rows
from tiny import Net, batches, trainer, values
from torch import nn

from lightning_merge.callbacks import EMA, ContinualMerging
from lightning_merge.selections import Selection


class Head(Net):  # type: ignore[misc, valid-type]
    """Four classes, and steps that are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Linear(8, 4)
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def fit(root: Path, module: Any, cl: Any, classes: Any = None, task: Any = None, *others: Any, **settings: Any) -> None:
    data = Task(rows, classes, (0, 1))
    if task is not None:
        data.task = task
    trainer(root, [cl, *others], **{"max_epochs": 1, **settings}).fit(module, datamodule=data)


# ---- classes and names


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog"], r"`classes` of Task must be the class numbers.*got \['cat', 'dog'\].*range\(2\)"),
        (10, r"`classes` of Task must be the class numbers of the task.*range\(10\)"),
        ([0.5, 1], r"`classes` of Task must be the class numbers"),
        ((), r"`classes` of Task must be the class numbers"),
        ((0, 0, 1), r"`classes` of Task must be distinct rows of the head.*got \[0, 0, 1\]"),
        ((-1, 1), r"must be distinct rows of the head, at least 0, got \[-1, 1\]"),
        ((0, 4), r"`classes` must be rows of the head, in \[0, 4\), got 4.*`net.2.weight` \(4, 8\)"),
    ],
    ids=str,
)
def test_classes_that_are_no_rows_are_refused_before_a_step(classes: Any, message: str, tmp_path: Path) -> None:
    module, cl = Head(), ContinualMerging("average", tmp_path / "bank")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, cl, classes)
    assert module.steps == 0


class Registered(Head):
    """Registers its layers twice, as modules do that keep the whole network and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.net[2]


@pytest.mark.parametrize("heads", ["grow", "freeze", "per_task"])
def test_a_head_that_is_registered_twice_is_one_head(heads: Any, tmp_path: Path) -> None:
    module, cl = Registered(), ContinualMerging("average", tmp_path / "bank", heads=heads)
    before = values({"w": module.head.weight})["w"]
    fit(tmp_path, module, cl, None if heads == "freeze" else (0, 1))
    assert not {"net.2.weight", "net.2.bias"} & set(cl.merged_vector() or ())
    moved = (module.head.weight - before).abs().amax(1) > 0
    assert moved.tolist() == [heads != "freeze"] * 2 + [heads == "per_task"] * 2


class Compiled(Head):
    """A head that is compiled on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = torch.compile(self.net[2], backend="eager")


def test_a_head_that_is_compiled_is_the_head_with_its_bias(tmp_path: Path) -> None:
    module, cl = Compiled(), ContinualMerging("average", tmp_path / "bank")
    fit(tmp_path, module, cl, (0, 1))
    assert set(cl.merged_vector() or ()) == {"net.0.weight", "net.0.bias"}


class Normed(Head):
    """A norm after the logits, with a scale for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.BatchNorm1d(4))


def test_a_number_for_each_class_after_the_logits_is_kept_as_the_rows_are(tmp_path: Path) -> None:
    module = Normed()
    fit(tmp_path, module, ContinualMerging("average", tmp_path / "bank"), (0, 1))
    norm: Any = module.net[3]
    assert norm.bias[:2].abs().min() > 0
    assert not norm.bias[2:].any()


class Transposed(Head):
    """Logits out of a transposed convolution, as segmenters have."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Sequential(nn.Unflatten(1, (8, 1)), nn.ConvTranspose1d(8, 4, 1), nn.Flatten())


class Joined(Head):
    """Logits of two heads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.Identity()
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.net(x)
        return torch.cat([head(features) for head in self.heads], dim=1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Transposed, "classes are columns of `net.2.1.weight`"),
        (Joined, "chooses among 4 classes, which `heads.0.weight` and"),
    ],
)
def test_heads_without_a_row_for_each_class_are_refused_before_training(
    kind: Any, message: str, tmp_path: Path
) -> None:
    module, cl = kind(), ContinualMerging("average", tmp_path / "bank")
    before = values(dict(module.named_parameters()))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, cl, (0, 1))
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


class EarlyOptimizer(Head):
    """Makes its optimizer before there are adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.made


def test_adapters_that_no_optimizer_has_are_refused_at_the_start(tmp_path: Path) -> None:
    module = EarlyOptimizer()
    with pytest.raises(ValueError, match="no optimizer has the adapters"):
        fit(tmp_path, module, ContinualMerging("lora-arithmetic", tmp_path / "bank", lora_rank=2), (0, 1))
    assert module.steps == 0
    assert not any("lora" in name for name, _ in module.named_parameters())


class HeadFirst(Head):
    """Defines its head before a layer of its body."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle = self.net[2], nn.Linear(8, 8)
        self.net[2] = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.net(x)))


def test_a_head_with_an_adapter_is_called_as_the_user_calls_it(tmp_path: Path) -> None:
    cl = ContinualMerging("lora-arithmetic", tmp_path / "bank", lora_rank=2)
    with pytest.raises(ValueError, match=r"the logits come from `last`.*pass `head='last\.\*'`"):
        fit(tmp_path, HeadFirst(), cl, (0, 1))


@pytest.mark.parametrize(
    "classes", [range(2), torch.tensor([0, 1]), np.array([0, 1]), {0, 1}], ids=lambda c: type(c).__name__
)
def test_classes_may_be_any_numbers(classes: Any, tmp_path: Path) -> None:
    module, cl = Head(), ContinualMerging("average", tmp_path / "bank")
    before = values({"w": module.net[2].weight})["w"]
    fit(tmp_path, module, cl, classes)
    assert torch.equal(module.net[2].weight[2:], before[2:])
    assert not torch.equal(module.net[2].weight[:2], before[:2])


def test_names_of_classes_are_no_matter_of_heads_of_their_own(tmp_path: Path) -> None:
    cl = ContinualMerging("average", tmp_path / "bank", heads="per_task")
    fit(tmp_path, Head(), cl, ["cat", "dog"])
    assert cl.completed == 1


def test_one_class_alone_is_said_before_a_step_where_its_loss_is_nothing(tmp_path: Path, caplog: Any) -> None:
    class Masked(Head):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0])[:, :1], torch.zeros_like(batch[1]))

    for make, is_said in ((Masked, True), (Head, False)):
        caplog.clear()
        with caplog.at_level(logging.INFO), suppress(ValueError):
            fit(tmp_path, make(), ContinualMerging("average", tmp_path / make.__name__), (0,))
        assert ("`classes` should be at least two for this loss, got [0]" in caplog.text) is is_said


@pytest.mark.parametrize("task", ["../../out", "a/b", "", "a\nb", ".."])
def test_a_name_that_is_no_plain_one_is_refused(task: str, tmp_path: Path) -> None:
    module = Head()
    with pytest.raises(ValueError, match=r"`task` must be a word.*part of file names"):
        fit(tmp_path, module, ContinualMerging("average", tmp_path / "bank"), task=task)
    assert module.steps == 0


def test_a_name_that_is_in_the_bank_is_refused_and_what_is_no_name_is_no_name(tmp_path: Path) -> None:
    module, cl = Head(), ContinualMerging("average", tmp_path / "bank")
    fit(tmp_path, module, cl, task="cars")
    steps = module.steps
    with pytest.raises(ValueError, match=r"`task` of Task is 'cars'.*\['cars'\].*datamodule\.task = 'task1'"):
        fit(tmp_path, module, cl, task="cars")
    assert module.steps == steps
    fit(tmp_path, module, cl, task={"kind": "classification"})
    assert cl.tasks == ["cars", "task1"]


# ---- the model


def test_a_head_that_has_no_rows_is_refused_at_once(tmp_path: Path) -> None:
    module = Cosine()
    cl = ContinualMerging("average", tmp_path / "bank", head="scale")
    with pytest.raises(ValueError, match=r"`classes` must be rows of the head.*the head is `scale` \(\)"):
        fit(tmp_path, module, cl, (0, 1))
    assert module.steps == 0


@pytest.mark.parametrize("heads", ["grow", "per_task", "freeze"])
def test_a_number_may_be_of_the_head(heads: Any, tmp_path: Path) -> None:
    module, cl = Cosine(), ContinualMerging("average", tmp_path / "bank", heads=heads, head=["prototypes", "scale"])
    for _ in range(2):
        fit(tmp_path, module, cl)
    assert cl.completed == 2


def test_another_head_than_that_of_the_earlier_tasks_is_refused(tmp_path: Path) -> None:
    module = TwoHeads()
    fit(tmp_path, module, ContinualMerging("average", tmp_path / "bank", head="kinds.*"))
    with pytest.raises(ValueError, match=r"`head` must name the head of the earlier tasks.*kinds.*got \['places"):
        fit(tmp_path, module, ContinualMerging("average", tmp_path / "bank", head="places.*"))
    module.loss = lambda batch: nn.functional.cross_entropy(  # type: ignore[method-assign]
        module.places(module.body(batch[0]).relu()), batch[1]
    )
    with pytest.raises(ValueError, match=r"the logits of this task come from `places`.*earlier tasks is \['kinds"):
        fit(tmp_path, module, ContinualMerging("average", tmp_path / "bank"))


def test_a_layer_that_is_made_too_late_is_named(tmp_path: Path) -> None:
    class InTraining(Head):
        def on_train_start(self) -> None:
            self.net.append(nn.Linear(4, 4))

    with pytest.raises(ValueError, match=r"`net\.3\.weight` was made after the fit began.*`configure_model`"):
        fit(tmp_path, InTraining(), ContinualMerging("average", tmp_path / "bank"))
    module = Head()
    module.net[0] = nn.LazyLinear(8)
    with pytest.raises(ValueError, match=r"`net\.0\.weight` of Head has no shape yet.*run a batch"):
        fit(tmp_path, module, ContinualMerging("average", tmp_path / "other"))


def test_what_is_frozen_at_first_is_trained_later_only_if_the_vectors_have_it(tmp_path: Path) -> None:
    for everything in (False, True):
        module = BuiltLate()
        module.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
        settings = {"selection": Selection(buffers="recompute")} if everything else {}
        cl = ContinualMerging("average", tmp_path / str(everything), **settings)  # type: ignore[arg-type]
        module.body[0].requires_grad_(False)
        fit(tmp_path, module, cl)
        steps = module.steps
        module.body[0].requires_grad_(True)
        if not everything:
            with pytest.raises(ValueError, match=r"other parameters are trained than in the first task.*`body\.0\.wei"):
                fit(tmp_path, module, cl)
            assert module.steps == steps
        else:
            fit(tmp_path, module, cl)
            assert "body.0.weight" in (cl.merged_vector() or {})


def test_what_is_unfrozen_in_the_first_task_is_merged(tmp_path: Path) -> None:
    class Unfreezes(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.stem.requires_grad_(trainer.current_epoch > 0)

    module, cl = Segmenter(), ContinualMerging("average", tmp_path / "bank")
    module.stem.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    trainer(tmp_path, [cl, Unfreezes()], max_epochs=2).fit(module, datamodule=Task(images, (0, 1), (0, 1)))
    assert "stem.weight" in (cl.merged_vector() or {})
    start = Segmenter().stem.weight.detach()
    torch.testing.assert_close(module.stem.weight, start + (cl.merged_vector() or {})["stem.weight"])


def test_a_checkpoint_that_was_tested_between_tasks_is_no_other_base(tmp_path: Path) -> None:
    module, cl = Head(), ContinualMerging("average", tmp_path / "bank")
    fit(tmp_path, module, cl)
    with torch.no_grad():
        module.net[0].weight.add_(1.0)
    fit(tmp_path, module, cl)  # by this process, so it starts from the base all the same
    assert cl.completed == 2
    other = Head()
    with torch.no_grad():
        other.net[0].weight.add_(1.0)
    with pytest.raises(ValueError, match=r"is of another base.*test\(ckpt_path.*load_merged\(module\)"):
        fit(tmp_path, other, ContinualMerging("average", tmp_path / "bank"))


# ---- other callbacks


@pytest.mark.parametrize(
    "other", [WeightAveraging, lambda: StochasticWeightAveraging(1e-2), EMA], ids=["WA", "SWA", "EMA"]
)
def test_what_publishes_other_weights_comes_before(other: Any, tmp_path: Path) -> None:
    module, cl = Head(), ContinualMerging("average", tmp_path / "bank")
    with pytest.raises(ValueError, match=r"must come before ContinualMerging in `callbacks`"):
        fit(tmp_path, module, cl, None, None, other())
    assert module.steps == 0


@pytest.mark.parametrize("kind", ["average", "files"])
def test_an_average_and_a_saver_of_an_earlier_task_are_refused(kind: str, tmp_path: Path) -> None:
    module, cl = Head(), ContinualMerging("average", tmp_path / "bank")
    other = EMA() if kind == "average" else ModelCheckpoint(tmp_path / "files", monitor=None)

    def train() -> None:
        trainer(tmp_path, [other, cl], max_epochs=1).fit(module, datamodule=Task(rows, None, (0, 1)))

    train()
    steps, files = module.steps, {path.name: path.read_bytes() for path in tmp_path.glob("files/*")}
    with pytest.raises(ValueError, match=r"give the Trainer of each task a (EMA|ModelCheckpoint) of its own"):
        train()
    assert module.steps == steps
    assert files == {path.name: path.read_bytes() for path in tmp_path.glob("files/*")}


def test_labels_without_a_row_are_not_stored_and_said(tmp_path: Path) -> None:
    class Unlabelled(Head):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], ignore_index=-1)

    inputs, labels = torch.randn(8, 4), torch.tensor([-1, 0, 1, 9, 0, 1, -1, 0]).clamp(max=3)
    labels[0] = -1
    cl = ContinualMerging("average", tmp_path / "bank", store_samples_per_class=1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=4)
    with pytest.warns(UserWarning, match=r"No sample of label -1 is stored.*range\(0, 4\)"):
        trainer(tmp_path, [cl], max_epochs=1).fit(Unlabelled(), data)
    assert sorted(cl._stream.load(1)["samples"]) == ["0", "1", "3"]


def test_others_of_an_earlier_task_are_refused_too(tmp_path: Path) -> None:
    for name, other in (("a", WeightAveraging()), ("b", EarlyStopping("train/loss", patience=9))):
        module, cl = Net(), ContinualMerging("average", tmp_path / name)

        def train(module: Any = module, cl: Any = cl, other: Any = other) -> None:
            trainer(tmp_path, [other, cl], max_epochs=1, check_val_every_n_epoch=1).fit(module, batches())

        train()
        with pytest.raises(ValueError, match=r"of an earlier fit.* of its own"):
            train()
        assert cl.completed == 1


def test_a_module_of_which_all_but_the_head_is_frozen_is_told_how_to_unfreeze_later(tmp_path: Path) -> None:
    for selection in (None, Selection(buffers="recompute")):
        module, later = Segmenter(), BackboneFinetuning(1)
        module.backbone = module.stem  # what the callback of Lightning unfreezes
        cl = ContinualMerging("average", tmp_path / str(selection), selection=selection, head="classify.*")
        module.excite.requires_grad_(False)

        def train(module: Any = module, cl: Any = cl, later: Any = later) -> None:
            trainer(tmp_path, [later, cl], max_epochs=2).fit(module, datamodule=Task(images, None, (0, 1)))

        if selection is None:
            with pytest.raises(ValueError, match=r"nothing to merge.*are frozen: if they are trained later"):
                train()
        else:
            train()
            assert bool((cl.merged_vector() or {})["stem.weight"].any())


def test_a_head_that_samples_cannot_train_is_refused_though_the_step_cannot_be_tried(tmp_path: Path) -> None:
    module = Steps()  # has no `forward`, which the head would be trained through at the end
    cl = ContinualMerging("average", tmp_path / "bank", store_samples_per_class=1)
    with pytest.raises(NotImplementedError, match="forward"):
        fit(tmp_path, module, cl)
    assert module.steps == 1
