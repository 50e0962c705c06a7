"""Which files ``average`` and ``soup`` take, which of their sets, and that Lightning loads what they write."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_merge._commands._verify import _equal
from lightning_merge.trajectory import Trajectory

Run = Callable[..., tuple[int, str, str]]


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def number(path: Path) -> float:
    return float(load(path)["state_dict"]["w"])


def write(path: Path, value: float, step: int | None = None, raw: float | None = None) -> Path:
    """A file of one number, and with ``raw`` beside the average that its ``state_dict`` holds."""
    content: dict[str, Any] = {"state_dict": {"w": torch.tensor(value)}}
    content |= {} if step is None else {"global_step": step, "epoch": 0}
    if raw is not None:
        about = {"class": "EMA", "rule": "ExponentialMean()", "steps": 1, "updates": 1}
        content["lightning_merge"] = {"format": 1, "holds": "ema", "raw": {"w": torch.tensor(raw)}, "states": {}}
        content["lightning_merge"]["averages"] = {"ema": about}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("command", ["average", "soup"])
@pytest.mark.parametrize("weights", [None, "raw", "published"])
def test_the_set_that_was_taken_is_printed_and_in_the_file(
    command: str, weights: str | None, run: Run, tmp_path: Path
) -> None:
    files = [write(tmp_path / "run" / f"{k}.ckpt", 10.0 * k, k, raw=float(k)) for k in (1, 2)]
    options = [] if weights is None else ["--weights", weights]
    code, out, _ = run(command, *([tmp_path / "run"] if command == "average" else files), "--out", "m.pt", *options)
    taken = weights or ("raw" if command == "average" else "published")
    assert code == 0
    assert f"of each file the {taken} weights" in out
    assert out.count("  raw\n" if taken == "raw" else "  ema\n") == 2
    assert number(Path("m.pt")) == (1.5 if taken == "raw" else 15.0)
    provenance = load(Path("m.pt"))["provenance"]
    assert provenance["weights"] == taken
    assert provenance["sets"] == ["raw" if taken == "raw" else "ema"] * 2
    assert f"{taken} weights" in run("inspect", "m.pt")[1]


@pytest.mark.parametrize("through", ["name", "link", "hard link", "other way"])
@pytest.mark.parametrize("command", ["average", "soup", "export"])
def test_no_command_writes_over_its_input(through: str, command: str, run: Run, tmp_path: Path) -> None:
    files = [write(tmp_path / "run" / f"{k}.ckpt", float(k), k) for k in (1, 2)]
    before = files[0].read_bytes()
    suffix = ".pt" if command == "export" else ".ckpt"
    source = files[0].rename(files[0].with_suffix(suffix)) if command == "export" else files[0]
    out = {"name": source, "other way": source.parent / ".." / "run" / source.name}.get(through)
    if out is None:
        out = tmp_path / f"other{suffix}"
        (os.symlink if through == "link" else os.link)(source, out)
    given = {"average": [tmp_path / "run", "--out"], "soup": [*files, "--out"], "export": [source]}[command]
    code, _, err = run(command, *given, out, "--force")
    assert code == 2
    assert f"{out} is one of the inputs" in err
    assert source.read_bytes() == before


# Files by their place below the folder, with the number each holds and its step; and what `average` says or gives.
FOLDERS: dict[str, tuple[dict[str, tuple[float, int | None]], str | float]] = {
    "two versions of a logger": (
        {"version_0/checkpoints/a.ckpt": (1, 1), "version_1/checkpoints/b.ckpt": (9, 2)},
        "2 runs",
    ),
    "folds": ({"fold_0/a.ckpt": (1, 1), "fold_1/b.ckpt": (9, 2)}, "2 runs"),
    "seeds": ({"Seed-1/best/a.ckpt": (1, 1), "Seed-2/best/b.ckpt": (9, 2)}, "2 runs"),
    "checkpoints in folders of their own": ({"step_1/a.ckpt": (1, 1), "step_2/a.ckpt": (3, 2)}, 2.0),
    "folders of two runs": ({"x/checkpoints/a.ckpt": (1, 1), "y/checkpoints/b.ckpt": (9, 2)}, "2 runs"),
    "other weights at one step": ({"x/a.ckpt": (1, 1), "y/b.ckpt": (9, 1)}, "at step 1 they differ"),
    "two callbacks of one run": ({"checkpoints/best/a.ckpt": (1, 1), "checkpoints/every/b.ckpt": (3, 2)}, 2.0),
    "copies in another folder": ({"best/a.ckpt": (1, 1), "every/a.ckpt": (1, 1), "every/b.ckpt": (3, 2)}, 2.0),
    "a pair of NeMo": ({"a.ckpt": (1, 1), "a-EMA.ckpt": (9, 1), "b.ckpt": (3, 2), "b-EMA.ckpt": (9, 2)}, 2.0),
    "what a run writes at its end": ({"ema-final.ckpt": (9, 2), "step=1.ckpt": (1, 1), "step=2.ckpt": (3, 2)}, 2.0),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_only_the_files_of_one_run_are_averaged(name: str, run: Run, tmp_path: Path) -> None:
    files, expected = FOLDERS[name]
    for place, (value, step) in files.items():
        write(tmp_path / "logs" / place, float(value), step)
    code, out, err = run("average", tmp_path / "logs", "--out", "m.pt")
    if isinstance(expected, str):
        assert code == 2
        assert expected in err
        assert "soup" in err
        assert not Path("m.pt").exists()
    else:
        assert code == 0, err
        assert number(Path("m.pt")) == expected
        assert out.count("left out: ") == len(files) - 2


def test_a_folder_that_is_none_is_called_what_it_is(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", 1.0, 1)
    for name, message in (("a.ckpt", "a.ckpt is a file: name the folder"), ("nope", "there is no folder of that name")):
        code, _, err = run("average", tmp_path / name, "--out", "m.pt")
        assert code == 2
        assert message in err


def test_folders_with_the_settings_of_a_run_are_runs(tmp_path: Path) -> None:
    for name, step in (("0", 1), ("1", 2)):
        write(tmp_path / name / "a.ckpt", 1.0, step)
        (tmp_path / name / "hparams.yaml").write_text("lr: 1\n")
    with pytest.raises(ValueError, match=r"2 runs \(.*0, .*1\)"):
        Trajectory.of_run(tmp_path)
    assert len(Trajectory.of_run(tmp_path / "0")) == 1


def test_what_was_merged_before_is_no_checkpoint_of_the_run(run: Run, tmp_path: Path) -> None:
    for k in (1, 2):
        write(tmp_path / "run" / f"{k}.ckpt", float(k), k)
    for _ in range(2):
        code, out, _ = run("average", tmp_path / "run", "--out", tmp_path / "run" / "mean.ckpt", "--force")
        assert code == 0
        assert number(tmp_path / "run" / "mean.ckpt") == 1.5
    assert "mean.ckpt, merged by lightning-merge out of 2 files" in out
    for k in (1, 2):
        (tmp_path / "run" / f"{k}.ckpt").unlink()
    assert "Left out: mean.ckpt (merged" in run("average", tmp_path / "run", "--out", "m.pt")[2]


class Wide(LightningModule):
    """Takes an argument, and writes a word of its own into its checkpoints, without which it does not load."""

    def __init__(self, width: int, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Linear(width, 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["words"] = {"a": 1}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["words"] == {"a": 1}

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("x", self.body(batch).mean())


@pytest.fixture
def trainer() -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", **quiet)


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.2)], ids=["equal", "different"])
@pytest.mark.parametrize("suffix", ["ckpt", "pt"])
def test_lightning_loads_a_soup_as_it_loads_its_files(
    rates: tuple[float, float], suffix: str, run: Run, trainer: Trainer, tmp_path: Path
) -> None:
    for name, rate in zip("ab", rates, strict=True):
        trainer.strategy.connect(module := Wide(4, rate))
        nn.init.constant_(module.body.weight, 1.0 if name == "a" else 3.0)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    out = f"soup.{suffix}"
    code, said, _ = run("soup", tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--out", out)
    assert code == 0
    loaded = Wide.load_from_checkpoint(out, weights_only=True)
    assert loaded.hparams["width"] == 4
    assert loaded.body.weight.tolist() == [[2.0] * 4]
    assert ("hyper_parameters.lr" in said) == (rates[0] != rates[1])
    loader: Any = torch.utils.data.DataLoader(torch.zeros(2, 4))
    bias = float(loaded.body.bias.detach())
    assert trainer.test(Wide(4), loader, ckpt_path=out, verbose=False) == [{"x": pytest.approx(bias)}]


def test_figures_that_are_undefined_agree_where_both_are() -> None:
    nan, inf = float("nan"), float("inf")
    assert _equal(nan, nan, 0.0)
    assert _equal(-inf, -inf, 0.0)
    assert not any(_equal(*each, 0.1) for each in ((nan, 1.0), (1.0, nan), (inf, -inf), (nan, None), (inf, 1.0)))


@pytest.mark.parametrize("same", [True, False])
def test_the_start_of_linear_networks_stays_with_their_weights(same: bool, run: Run, tmp_path: Path) -> None:
    for k in (1, 2):
        start = {"start": {"w": torch.tensor(5.0 if same else float(k))}}
        content = {**load(write(tmp_path / f"{k}.ckpt", float(k), k)), "lightning_merge_linearize": start}
        torch.save({**content, "pytorch-lightning_version": "2.6.6"}, tmp_path / f"{k}.ckpt")
    code, out, _ = run("soup", tmp_path / "1.ckpt", tmp_path / "2.ckpt", "--out", "m.pt")
    assert code == 0
    assert ("lightning_merge_linearize" in load(Path("m.pt"))) is same
    assert ("left out, since it differs or is no plain data: lightning_merge_linearize" in out) is not same
