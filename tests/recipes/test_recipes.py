"""Every recipe runs; what recipes are made of does what it says."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn

import lightning_merge.recipes
from lightning_merge.cli import main
from lightning_merge.recipes import Classifier, CPUThreads, Digits, SmallConvNet
from lightning_merge.recipes._catalog import find, recipes, summary, whole

RECIPES = recipes()
# test_images.py runs the others, which need images or other options to merge within two steps.
ELSEWHERE = ("digits/anneal", "digits/lawa", "digits/swad", "digits/twa")
HERE = [name for name in RECIPES if name.startswith("digits/") and name not in ELSEWHERE]


def test_the_table_of_recipes_is_not_empty() -> None:
    assert set(HERE) >= {"digits/plain", "digits/ema", "digits/swa"}


@pytest.mark.parametrize("name", HERE)
def test_recipe_runs_two_steps(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]

    assert main(["run", name, *short, *quiet]) == 0

    assert not [warning for warning in recwarn if "treespec" in str(warning.message)]
    out = capsys.readouterr().out
    averages = [path.name.removesuffix("-final.ckpt") for path in tmp_path.rglob("*-final.ckpt")]
    merges = "lightning_merge.callbacks" in whole(name).replace("lightning_merge.callbacks.RandomState", "")
    assert bool(averages) == merges
    for row in ("raw", *averages):
        assert re.search(rf"│ {row} +│ +[01]\.\d+ │", out), out
    assert list(tmp_path.rglob("checkpoints/last.ckpt"))
    assert list(tmp_path.rglob("curves.png"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_to_expect(name: str) -> None:
    comment = whole(name).partition("\nseed_everything")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert 20 < len(summary(RECIPES[name])) <= 100
    for word in ("Hardware:", "Time:", "Expect:"):
        assert word in comment


def test_lengths_in_a_recipe_follow_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "digits/plain", "--trainer.max_epochs=7", f"--trainer.default_root_dir={tmp_path}", "--print_config"])
    config = capsys.readouterr().out
    assert "T_max: 7" in config
    assert f"save_dir: {tmp_path}" in config


def test_options_reach_the_average(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "digits/ema", "--trainer.callbacks.decay=0.5", "--print_config"])
    assert "decay: 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ("digits/swb", r"Did you mean digits/swa"),
        ("swa", r"Did you mean .*digits/swa"),
        ("zzz", r"There are: .*digits/plain"),
    ],
)
def test_unknown_recipe_gets_the_nearest_names(wrong: str, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        find(wrong)


def test_bare_import_of_the_folder_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("recipes", lightning_merge.recipes.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"lightning_merge\.recipes"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_public_names_are_there() -> None:
    names = set(lightning_merge.recipes.__all__)
    assert names >= {"Classifier", "CPUThreads", "Digits", "RunReport", "SmallConvNet"}
    assert {getattr(lightning_merge.recipes, name).__name__ for name in names} == names
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = lightning_merge.recipes.Nonsense


# ---- threads


def test_threads_are_set_for_the_run_only() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads = CPUThreads(1)
    threads.setup(None, None, "fit")  # type: ignore[arg-type]
    assert torch.get_num_threads() == 1
    threads.teardown(None, None, "fit")  # type: ignore[arg-type]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    with pytest.raises(ValueError, match="`count`"):
        CPUThreads(0)


# ---- digits


def digits(**arguments: float) -> Digits:
    data = Digits(**arguments)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_split_uses_every_image_once_and_keeps_the_share_of_each_digit() -> None:
    data = digits(shift=0)
    parts = [(part.images, part.labels) for part in [data.train]] + [part.tensors for part in (data.val, data.test)]
    images = torch.cat([images for images, _ in parts])
    assert len(images) == len(images.unique(dim=0)) == 1797
    assert [len(labels) for _, labels in parts] == [898, 449, 450]
    for _, labels in parts:
        share = labels.bincount(minlength=10) / len(labels)
        torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_split_depends_on_its_seed_only() -> None:
    seed_everything(1)
    one = digits().val.tensors[0]
    seed_everything(2)
    assert torch.equal(one, digits().val.tensors[0])
    assert not torch.equal(one, digits(split_seed=1).val.tensors[0])


def test_training_images_move_by_at_most_shift_pixels() -> None:
    still, moving = digits(shift=0).train, digits(shift=1).train
    image = still[0][0]
    around = nn.functional.pad(image, (1,) * 4)
    moved = [around[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    seen = [moving[0][0] for _ in range(200)]
    assert all(any(torch.equal(found, m) for m in moved) for found in seen)
    assert all(any(torch.equal(found, m) for found in seen) for m in moved)
    assert torch.equal(still[0][0], image)


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"val_share": 0}, {"val_share": 0.5, "test_share": 0.5}, {"shift": -1}]
)
def test_digits_refuses_values_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        Digits(**arguments)  # type: ignore[arg-type]


def test_digits_refuses_a_batch_larger_than_the_training_set() -> None:
    with pytest.raises(ValueError, match="898"):
        digits(batch_size=899)


# ---- classifier


@pytest.mark.parametrize("arguments", [{"num_classes": 1}, {"num_classes": 10, "label_smoothing": 1.0}])
def test_classifier_refuses_values_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{list(arguments)[-1]}` must"):
        Classifier(SmallConvNet(), **arguments)  # type: ignore[arg-type]


def test_classifier_uses_the_optimizer_and_the_schedule_it_is_given() -> None:
    sgd = partial(torch.optim.SGD, lr=0.3)
    assert Classifier(SmallConvNet(), 10, optimizer=sgd).configure_optimizers().defaults["lr"] == 0.3
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    both = Classifier(SmallConvNet(), 10, optimizer=sgd, lr_scheduler=step, lr_interval="step").configure_optimizers()
    assert both["lr_scheduler"]["interval"] == "step"
    assert both["lr_scheduler"]["scheduler"].optimizer is both["optimizer"]
    plateau = partial(ReduceLROnPlateau, monitor="val/loss")
    settings = Classifier(SmallConvNet(), 10, optimizer=sgd, lr_scheduler=plateau).configure_optimizers()
    assert settings["lr_scheduler"]["monitor"] == "val/loss"


def test_classifier_smooths_labels_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Classifier(nn.Flatten(), 2, label_smoothing=0.5)
    logged: dict[str, object] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.__setitem__(name, value))
    batch = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([0])
    sharp = torch.tensor(2.0).neg().exp().log1p()
    torch.testing.assert_close(module.training_step(batch, 0), sharp + 0.5)  # a quarter of 2 on either class
    module.validation_step(batch, 0)
    torch.testing.assert_close(logged["val/loss"], sharp)
    assert torch.equal(module.predict_step(batch, 0), torch.tensor([0]))
