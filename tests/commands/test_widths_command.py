"""``doctor FILE --widths FOLDER``: the width of a post-hoc average that would have been best, and its weights."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_merge.cli import main
from lightning_merge.files._layouts import open_file
from lightning_merge.recipes import Classifier, SmallConvNet

Run = Callable[..., tuple[int, str, str]]

CALLBACKS = """
trainer:
  callbacks+:
    - class_path: lightning_merge.callbacks.EMA
      init_args: {decay: 0.9, validate: raw}
    - class_path: lightning_merge.callbacks.PostHocEMA
      init_args: {every: 4, validate: raw}
"""
SMALL = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=12", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of digits with a post-hoc average beside an EMA."""
    root = tmp_path_factory.mktemp("run")
    (root / "more.yaml").write_text(CALLBACKS)
    assert (
        main(["run", "digits/plain", "--config", str(root / "more.yaml"), *SMALL, f"--trainer.default_root_dir={root}"])
        == 0
    )
    return root / "version_0"


def test_the_best_width_is_measured_drawn_and_written(folder: Path, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, config = folder / "checkpoints" / "posthoc-ema-final.ckpt", folder / "config.yaml"
    code, out, err = run("doctor", file, "--config", config, "--points", 1, "--widths", tmp_path / "new" / "widths")
    assert code == 0, err
    written = tmp_path / "new" / "widths"
    head, *rows = csv.reader((written / "widths.csv").open())
    assert head == ["width", "val/loss"]
    losses = {float(sigma): float(loss) for sigma, loss in rows}
    assert list(losses) == pytest.approx([0.05, (0.05 * 0.1) ** 0.5, 0.1])
    assert len(set(losses.values())) == 3
    assert (written / "widths.png").stat().st_size > 1000

    best = min(losses, key=losses.__getitem__)
    content = torch.load(written / "best.ckpt", weights_only=True)
    assert content["provenance"]["sigma"] == best
    Classifier(SmallConvNet(), num_classes=10).load_state_dict(content["state_dict"])
    from lightning_merge._commands._runs import Bench

    assert Bench(config).metrics(path=written / "best.ckpt")["val/loss"] == losses[best]
    assert f"{losses[best]:.6g}" in out.splitlines()[0]
    assert len(open_file(written / "best.ckpt").sets) == 1


def test_the_widest_is_the_average_that_was_published(folder: Path) -> None:
    from lightning_merge.files._ours import synthesiser

    file = open_file(folder / "checkpoints" / "posthoc-ema-final.ckpt")
    rule, made = synthesiser(file, "posthoc-ema")
    widest, published = made(rule.sigmas[-1]).weights, file.sets["posthoc-ema"].weights
    assert widest.keys() == published.keys()
    for name in widest:
        torch.testing.assert_close(widest[name], published[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("FINAL --widths OUT", "`--widths FOLDER` measures the widths of one file: give FILE and `--config FILE`"),
        ("FINAL FINAL --config CONFIG --widths OUT", "measures the widths of one file"),
        ("FINAL --config CONFIG --widths OUT --points 0", "`points` must be at least 1, got 0"),
        ("FINAL --config CONFIG --widths CONFIG", "`--widths` must be a folder"),
        ("FINAL:ema --config CONFIG --widths OUT", "does not have of 'ema'. Give a full checkpoint"),
        ("FINAL:raw --config CONFIG --widths OUT", "(post-hoc averages in it: posthoc-ema)"),
        ("FINAL --config CONFIG --widths OUT --monitor val/los", "`--monitor` must be a loss that validation logs"),
    ],
)
def test_what_has_no_widths_is_said(arguments: str, says: str, folder: Path, run: Run, tmp_path: Path) -> None:
    final = folder / "checkpoints" / "posthoc-ema-final.ckpt"
    places = {"FINAL": final, "CONFIG": folder / "config.yaml", "OUT": tmp_path / "out"}
    words = arguments
    for name, path in places.items():
        words = words.replace(name, str(path))
    code, _, err = run("doctor", *words.split())
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_files_of_other_libraries_and_slim_ones_have_none(folder: Path, run: Run, tmp_path: Path) -> None:
    final, config = folder / "checkpoints" / "posthoc-ema-final.ckpt", folder / "config.yaml"
    content = torch.load(final, weights_only=True)
    slim = {key: value for key, value in content.items() if key in ("state_dict", "pytorch-lightning_version")}
    torch.save(slim, tmp_path / "slim.ckpt")
    code, _, err = run("doctor", tmp_path / "slim.ckpt", "--config", config, "--widths", tmp_path / "out")
    assert code == 2
    assert "(post-hoc averages in it: none)" in err
    assert yaml.safe_load(config.read_text())["trainer"]["max_epochs"] == 2
