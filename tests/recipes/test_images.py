"""CIFAR and ImageNet: what is loaded, what is refused, and that their recipes run."""

import hashlib
import pickle
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from tiny_images import CLASSES, tiny_options, write_images
from torch.nn.functional import pad
from torchvision.datasets import CIFAR10

from lightning_merge.cli import main
from lightning_merge.recipes import CIFAR, CifarResNet18, Classifier, ImageNet, SmallResNet, WarmupCosine, WideResNet
from lightning_merge.recipes._catalog import recipes
from lightning_merge.recipes.vision._cifar import in_turn

REAL = Path(__file__).resolve().parents[3] / "shared/data"
METHODS = {"plain", "ema", "swa", "lawa", "swad", "lookaround", "twa", "aswa", "forkmerge"}
# test_stream.py runs the streams, test_two_process_recipes.py those that start a second process.
ELSEWHERE = ("digits/", "preference/", "continual/", "cifar10/ema-")
TINY_OPTIONS = ("digits/anneal", "digits/lawa", "digits/swad", "digits/twa")
OURS = [name for name in recipes() if not name.startswith(ELSEWHERE) or name in TINY_OPTIONS]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other would take most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ready(data: LightningDataModule, stage: str = "fit") -> Any:
    data.prepare_data()
    data.setup(stage)
    return data


def cifar(root: Path, **arguments: Any) -> Any:
    return ready(CIFAR(root=str(root), **{"batch_size": 4, "val_images": 3} | arguments))


def imagenet(root: Path, **arguments: Any) -> Any:
    return ready(ImageNet(root=str(root), **{"batch_size": 4, "num_workers": 0, "image_size": 32} | arguments))


# ---- recipes


def test_every_method_has_a_recipe_for_every_data_set() -> None:
    for dataset in ("cifar10", "cifar100", "imagenet", "digits"):
        assert {name.partition("/")[2] for name in recipes() if name.startswith(f"{dataset}/")} >= METHODS


@pytest.mark.parametrize("name", OURS)
def test_recipe_runs_two_steps_and_merges(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path / 'run'}"]

    assert main(["run", name, *short, *quiet, *tiny_options(name, tmp_path)]) == 0

    method = name.partition("/")[2]
    rows = re.findall(r"│ (\w+) +│ +[01]\.\d+ │", capsys.readouterr().out)
    assert rows == ["raw"] + [method] * (method != "plain")
    assert len(list(tmp_path.rglob(f"checkpoints/{method}-final.ckpt"))) == (method != "plain")


def test_one_option_sets_the_classes_of_head_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cifar10/ema", "imagenet/ema"):
        assert main(["run", name, "--model.num_classes=7", "--print_config"]) == 0
        assert capsys.readouterr().out.count("num_classes: 7") == 2


# ---- CIFAR


def test_folders_of_images_become_disjoint_balanced_sets(tmp_path: Path) -> None:
    data = cifar(write_images(tmp_path, train=5, test=2), train_images=6)
    assert data.train.labels.bincount().tolist() == [2] * CLASSES
    assert data.val.labels.bincount().tolist() == [1] * CLASSES
    ready(data, "test")
    assert data.test.labels.bincount().tolist() == [2] * CLASSES
    everything = torch.cat([data.train.pixels, data.val.pixels, data.test.pixels])
    assert len({image.numpy().tobytes() for image in everything}) == len(everything) == 15
    assert everything.dtype == torch.uint8


def test_labels_belong_to_their_images(tmp_path: Path) -> None:
    from PIL import Image

    root = write_images(tmp_path, train=3, test=1)
    labels = {np.array(Image.open(f)).tobytes(): int(f.parent.name[-1]) for f in root.glob("train/*/*.png")}
    data = cifar(root)
    for part in (data.train, data.val):
        for pixels, label in zip(part.pixels, part.labels, strict=True):
            assert labels[pixels.permute(1, 2, 0).contiguous().numpy().tobytes()] == label


def test_split_depends_on_its_seed_only() -> None:
    labels = torch.arange(10).repeat(20)
    seed_everything(1)
    one = in_turn(labels, 0)
    seed_everything(2)
    assert torch.equal(one, in_turn(labels, 0))
    assert not torch.equal(one, in_turn(labels, 1))
    assert one.sort().values.equal(torch.arange(200))
    assert all(sorted(labels[turn].tolist()) == list(range(10)) for turn in one.view(20, 10))


def test_in_turn_takes_unequal_classes_as_far_as_they_go() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    assert labels[in_turn(labels, 0)][:3].sort().values.tolist() == [0, 1, 2]
    assert labels[in_turn(labels, 0)][3:5].sort().values.tolist() == [1, 2]


def test_without_validation_images_the_test_images_are_measured(tmp_path: Path) -> None:
    data = cifar(write_images(tmp_path, train=4, test=2), val_images=0)
    assert (len(data.train), len(data.val)) == (12, 6)


def test_training_images_are_moved_by_up_to_four_pixels_and_mirrored(tmp_path: Path) -> None:
    data = cifar(write_images(tmp_path, train=4, test=1))
    image = pad(data.train.pixels[0], (4,) * 4)
    windows = [image[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    expected = {w.numpy().tobytes() for window in windows for w in (window, window.flip(2))}
    seen, _ = data.train.__getitems__([0] * 3000)
    pixels = (seen / data.train.scale + data.train.mean).round().to(torch.uint8)
    assert {picture.numpy().tobytes() for picture in pixels} == expected


def test_batches_are_scaled_and_validation_is_left_in_place(tmp_path: Path) -> None:
    data = cifar(write_images(tmp_path, train=4, test=1))
    images, labels = next(iter(data.val_dataloader()))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    torch.testing.assert_close(images, (data.val.pixels / 255 - mean) / std)
    assert torch.equal(labels, data.val.labels)
    assert torch.equal(data.val[1][0], images[1])
    assert [x.shape for x, _ in data.train_dataloader()] == [(4, 3, 32, 32)] * 2


def test_workers_prepare_the_same_kind_of_batches(tmp_path: Path) -> None:
    data = cifar(write_images(tmp_path, train=4, test=1), num_workers=1)
    assert [(x.shape, y.shape) for x, y in data.train_dataloader()] == [((4, 3, 32, 32), (4,))] * 2


def test_files_of_torchvision_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    values = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(images: int) -> dict[str, Any]:
        pixels = values.integers(0, 256, (images, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [i % 2 for i in range(images)]}

    train = batch(12)
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", train)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(4))])
    meta = write("batches.meta", {"label_names": ["a", "b"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})

    data = cifar(tmp_path, val_images=4)
    read = torch.cat([data.train.pixels, data.val.pixels]).flatten(1)
    labels = torch.cat([data.train.labels, data.val.labels])
    order = [train["data"].tolist().index(row) for row in read.tolist()]
    assert sorted(order) == list(range(12))
    assert labels.tolist() == [index % 2 for index in order]
    assert data.val.labels.bincount().tolist() == [2, 2]


# ---- ImageNet


def test_imagenet_layout_is_read(tmp_path: Path) -> None:
    data = imagenet(write_images(tmp_path, size=50, train=4, val=2), image_size=24)
    batches = list(data.train_dataloader())
    assert [(x.shape, x.dtype, len(y)) for x, y in batches] == [((4, 3, 24, 24), torch.float32, 4)] * 3
    one, two = (next(iter(data.val_dataloader())) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.cat([y for _, y in data.val_dataloader()]).tolist() == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(data.train[0][0], data.train[0][0])


def test_policy_of_timm_is_used(tmp_path: Path) -> None:
    root = write_images(tmp_path, train=2, val=1)
    assert "RandAugment" in repr(imagenet(root, auto_augment="rand-m7-mstd0.5").train.transform)
    assert "RandAugment" not in repr(imagenet(root).train.transform)


# ---- bad input


def _missing_part(root: Path) -> Path:
    return write_images(root, train=1)


def _one_deeper(root: Path) -> Path:
    write_images(root / "set", train=1, val=1, test=1)
    return root


def _no_images(root: Path) -> Path:
    write_images(root, train=0, val=0, test=0)
    return root


def _one_class_empty(root: Path) -> Path:
    write_images(root, train=1, val=1, test=1)
    for file in (root / "train/class1").iterdir():
        file.unlink()
    return root


def _nothing_below(root: Path) -> Path:
    for part in ("train", "val", "test"):
        (root / part).mkdir(parents=True)
    return root


def _flat(root: Path) -> Path:
    write_images(root, train=1, val=1, test=1)
    for part in ("val", "test"):
        for file in list((root / part).glob("*/*.png")):
            file.rename(root / part / f"{file.parent.name}-{file.name}")
        for folder in (root / part).glob("*/"):
            folder.rmdir()
    return root


def _other_classes(root: Path) -> Path:
    write_images(root, train=1, val=1, test=1)
    for part in ("val", "test"):
        (root / part / "class1").rename(root / part / "class9")
    return root


def _archive_inside(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w"):
        return root


def _archives_of_classes(root: Path) -> Path:
    write_images(root, val=1)
    (root / "train").mkdir()
    for name in ("n01440764", "n01443537"):
        (root / "train" / f"{name}.tar").touch()
    return root


def _archive_itself(root: Path) -> Path:
    path = root / "images.tar.xz"
    path.touch()
    return path


def _other_file(root: Path) -> Path:
    path = root / "images.txt"
    path.touch()
    return path


BAD_FOLDERS: list[tuple[Callable[[Path], Any], Callable[[Path], Path], str]] = [
    (cifar, _missing_part, r"`data\.root` .* has no folder test/\. It needs train/<class>/ and test/<class>/"),
    (imagenet, _missing_part, r"`data\.root` .* has no folder val/\. It needs train/<class>/ and val/<class>/"),
    (imagenet, _one_deeper, r"has no folder train/\. Did you mean .*/set\?"),
    (cifar, _one_deeper, r"holds neither .* nor cifar-10-batches-py/, but set\.\nName the folder that does"),
    (cifar, _no_images, r"no images in .*/train/class0, nor in 2 more of 3 class folders\. Image files end in \.jpg"),
    (imagenet, _no_images, r"no images in .*/train/class0, nor in 2 more"),
    (imagenet, _one_class_empty, r"no images in .*/train/class1, nor in 0 more"),
    (imagenet, _nothing_below, r"no images in .*/train\. It needs a folder of images per class"),
    (imagenet, _flat, r"/val is flat: 3 files and no class folders\. Sort it as `valprep` .* loop over the\ndevkit's"),
    (cifar, _flat, r"/test is flat: 3 files and no class folders\. Sort it into a folder of images per class"),
    (cifar, _other_classes, r"train/ and test/ .* differ: 'class1' is in train/ only \(2 such folders\)\.\nA label"),
    (imagenet, _other_classes, r"train/ and val/ .* differ: 'class1' is in train/ only"),
    (imagenet, _archive_inside, r"train\.tar was not unpacked.*\nmkdir -p (\S+)/train && tar -xf \S+ -C \1/train$"),
    (imagenet, _archives_of_classes, r"2 archives .* n01440764\.tar first\. Each needs a folder:\ncd .*tar -xf"),
    (
        cifar,
        _archive_itself,
        r"is an archive\. Unpack it and use `--data\.root (\S+)/images`:\nmkdir -p \1/images && tar",
    ),
    (imagenet, _archive_itself, r"is an archive\. Unpack it"),
    (cifar, _archive_inside, r"ILSVRC2012_img_train\.tar was not unpacked"),
    (cifar, _other_file, r"`data\.root` must be a folder, got the file .*images\.txt"),
    (imagenet, lambda root: root / "none", r"no ImageNet in .*/none\. Put train/.* `--data\.root`\.\nThe digits/"),
    (
        lambda root: cifar(root, batch_size=400),
        lambda r: write_images(r, train=2, test=1),
        r"`val_images` 3 leaves 3 of",
    ),
    (
        lambda root: cifar(root, train_images=7),
        lambda r: write_images(r, train=3, test=1),
        r"at most 6, the 9 .* got 7",
    ),
    (lambda root: imagenet(root, batch_size=7), lambda r: write_images(r, train=2, val=1), r"at most the 6 .* got 7"),
    (cifar, lambda root: write_images(root, size=64, train=4, test=1), r"must be 32x32, .*\.png is 64x64"),
]


@pytest.mark.parametrize(("load", "make", "message"), BAD_FOLDERS)
def test_bad_folder_is_named_with_the_cure(
    load: Callable[[Path], Any], make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(make(tmp_path))
    assert len(str(caught.value).splitlines()) <= 2


def test_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path, train=4, test=1)
    (root / "train/class0/1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"class0/1\.png is not an image that can be read"):
        cifar(root)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_failed_download_says_where_files_go(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CIFAR(name).source, "url", (tmp_path / "nowhere.tar.gz").as_uri())
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"{name}/plain"]) == 2
    message = capsys.readouterr().err.partition("error: ")[2].strip()
    assert len(message.splitlines()) == 2
    for part in (f"no {name} in data/{name}, and the download failed (", "`--data.root`", "digits/...", ".tar.gz"):
        assert part in message


@pytest.mark.parametrize("name", ["cifar10/plain", "imagenet/plain"])
def test_model_for_another_number_of_classes_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for option in tiny_options(name, tmp_path) if "num_classes" not in option]
    assert main(["run", name, *options, f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"`model\.num_classes` is 10+, but .*/images has 3 classes\..*`--model\.num_classes 3`", error)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_head_that_differs_from_its_metrics_is_refused(tmp_path: Path) -> None:
    data = CIFAR(root=str(write_images(tmp_path, train=4, test=1)), batch_size=4, val_images=3)
    module = Classifier(SmallResNet(num_classes=4), num_classes=CLASSES)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"`model\.model\.num_classes` is 4, but .* has 3 classes"):
        trainer.fit(module, data)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "cifar"},
        {"batch_size": 0},
        {"num_workers": -1},
        {"val_images": -1},
        {"train_images": 127},
    ],
)
def test_cifar_refuses_values_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must .*got '?{next(iter(arguments.values()))}"):
        CIFAR(**arguments)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"num_workers": -1}, {"image_size": 0}])
def test_imagenet_refuses_values_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must"):
        ImageNet(**arguments)


# ---- network and schedule


@pytest.mark.parametrize(("blocks", "layers", "parameters"), [(1, 8, 78_042), (3, 20, 272_474)])
def test_small_resnet_has_six_layers_per_block_and_two(blocks: int, layers: int, parameters: int) -> None:
    model = SmallResNet(blocks=blocks)
    deep = [m for m in model.modules() if isinstance(m, torch.nn.Linear) or getattr(m, "kernel_size", None) == (3, 3)]
    assert len(deep) == layers
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert torch.nn.Sequential(*list(model)[:-3])(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)


# Published: 11.17 M for ResNet-18 with this stem; 36.5, 8.7 and 2.7 M in table 3 and 5 of "Wide residual networks".
@pytest.mark.parametrize(
    ("make", "convolutions", "millions"),
    [
        (CifarResNet18, 17, 11.17),
        (partial(WideResNet, depth=28, widen=10), 25, 36.5),
        (WideResNet, 13, 2.75),
        (partial(WideResNet, depth=22, widen=8), 19, 17.2),
    ],
)
def test_networks_for_a_gpu_are_those_of_the_papers(make: Any, convolutions: int, millions: float) -> None:
    with torch.device("meta"):
        model = make(num_classes=10)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(getattr(m, "kernel_size", None) == (3, 3) for m in model.modules()) == convolutions
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert model.num_classes == 10


@pytest.mark.parametrize("depth", [4, 15])
def test_a_wide_resnet_refuses_depths_that_it_cannot_have(depth: int) -> None:
    with pytest.raises(ValueError, match="`depth` must be"):
        WideResNet(depth=depth)


@pytest.mark.parametrize("arguments", [{"num_classes": 1}, {"blocks": 0}, {"width": 0}])
def test_small_resnet_refuses_values_out_of_range(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be at least"):
        SmallResNet(**arguments)


def rates(epochs: int, warmup_epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupCosine(optimizer, epochs, warmup_epochs)
    seen: list[float] = []
    for _ in range(epochs + 1):
        seen += map(float, schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return seen


def test_rate_warms_up_and_falls_to_zero_at_the_end() -> None:
    seen = rates(20, 5)
    assert seen[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert seen[5:] == sorted(seen[5:], reverse=True)
    assert seen[-1] == pytest.approx(0)
    assert rates(4, 0) == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
    assert rates(1, 5)[0] == 1  # a run of one epoch has a learning rate


@pytest.mark.parametrize("arguments", [{"epochs": 0}, {"epochs": 5, "warmup_epochs": -1}])
def test_schedule_refuses_values_out_of_range(arguments: dict[str, int]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=f"`{list(arguments)[-1]}` must be at least"):
        WarmupCosine(optimizer, **arguments)


# ---- real images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("archive", "recipe", "classes"), [("cifar10", "cifar10/ema", 10), ("tiny-imagenet-50", "imagenet/ema", 50)]
)
def test_recipe_reads_a_few_images_of_the_shared_archive(
    archive: str, recipe: str, classes: int, tmp_path: Path
) -> None:
    path = REAL / f"{archive}.tar.xz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    root = tmp_path / "images"
    taken: dict[Path, int] = {}
    with tarfile.open(path) as file:
        for member in file:
            folder = Path(member.name).parent
            if member.isfile() and len(folder.parts) >= 2 and taken.setdefault(folder, 0) < 3:
                taken[folder] += 1
                file.extract(member, root)
    assert set(taken.values()) == {3}
    assert len(taken) == 2 * classes

    options = [option for option in tiny_options(recipe, tmp_path / "unused") if "data.root" not in option]
    options += [f"--model.num_classes={classes}", f"--data.root={root}", f"--trainer.default_root_dir={tmp_path}"]
    options += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
    assert main(["run", recipe, *options]) == 0
    assert list(tmp_path.rglob("ema-final.ckpt"))
