"""The ``lightning-merge`` command: what users see, above all when something is wrong."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_merge import __version__, cli
from lightning_merge._commands import _needs
from lightning_merge.callbacks import EMA
from lightning_merge.cli import main

BORING = ["--model=lightning.pytorch.demos.boring_classes.BoringModel", "--trainer.accelerator=cpu"]
QUICK = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


class Scored(BoringModel):
    """Logs its validation loss as ``x``."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("x", self.step(batch))


class Answer:
    """What a command printed and returned."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def is_mistake(self, *parts: str) -> bool:
        """Exit 2, at most two lines, no traceback, and the parts in it."""
        lines = [line for line in self.err.splitlines() if line.startswith(("lightning-merge", "usage", "Traceback"))]
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        assert len(lines) in (1, 2)
        for part in parts:
            assert part in self.err
        return True


Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Answer:
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


# ---- without torch


def test_help_and_list_load_neither_torch_nor_lightning() -> None:
    code = """
import sys
from lightning_merge.cli import main
for arguments in (["--help"], ["recipes"], ["--version"], [], ["run", "--help"]):
    assert main(arguments) == 0
assert main(["run", "zzz"]) == 2
heavy = {"torch", "lightning", "numpy", "jsonargparse", "matplotlib", "rich", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_lists_the_commands(run: Run) -> None:
    for arguments in ([], ["--help"]):
        out = run(*arguments).out
        assert all(f"  {command} " in out for command in ("recipes", "run NAME", "fit |", "inspect FILE"))


def test_version(run: Run) -> None:
    assert run("--version").out == f"lightning-merge {__version__}\n"


def test_recipes_has_a_line_for_each(run: Run) -> None:
    lines = run("recipes").out.splitlines()
    assert any(line.startswith("digits/swa ") and "SWA" in line for line in lines)
    assert all(len(line) < 120 for line in lines)


def test_a_printed_recipe_runs_as_a_config(run: Run) -> None:
    text = run("recipes", "digits/plain").out
    assert text.startswith("# ")
    Path("mine.yaml").write_text(text)
    config = run("fit", "--config=mine.yaml", "--trainer.max_epochs=7", "--print_config").out
    assert "T_max: 7" in config


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nonsense"], ["'nonsense'", "inspect"]),
        (["run"], ["digits/swa"]),
        (["run", "--trainer.max_epochs=1"], ["digits/swa"]),
        (["run", "digits/sma"], ["'digits/sma'", "digits/swa"]),
        (["recipes", "digits/sma"], ["'digits/sma'", "digits/swa"]),
        (["inspect"], ["file"]),
        (["inspect", "nowhere.ckpt"], ["there is no file nowhere.ckpt"]),
        (["inspect", "."], ["is a folder"]),
        (["fit", "--config=nowhere.yaml"], ["nowhere.yaml"]),
        (["fit"], ["model"]),
        (["fit", *BORING, "--nonsense=1"], ["--nonsense"]),
        (["run", "digits/swa", "--trainer.max_epochs=some"], ["`trainer.max_epochs`", "expected int", "some"]),
        (["run", "digits/swa", "--data.batch_size=some"], ["Digits", "`batch_size`", "expected int", "some"]),
        (["run", "digits/swa", "--data.shift=-1"], ["`shift` must be at least 0, got -1."]),
        (["run", "digits/ema", "--trainer.callbacks.decay=1.5"], ["`decay` must be in [0, 1), got 1.5."]),
        (["run", "digits/plain", "--data.batch_size=${nowhere.at_all}"], ["nowhere.at_all"]),
        (["run", "digits/plain", "--trainer.accelerator=tpu"], ["torch_xla"]),
        (["run", "digits/plain", "--trainer.devices=0"], ["devices"]),
        (["run", "digits/plain", "--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt"]),
        (["fit", *BORING, "--trainer.callbacks=lightning_merge.rules.Mean"], ["Mean", "Callback"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else None,
)
def test_mistake_exits_2_with_the_cure(arguments: list[str], parts: list[str], run: Run) -> None:
    assert run(*arguments).is_mistake(*parts)


@pytest.mark.parametrize("module", ["matplotlib", "sklearn", "rich", "torchvision", "jsonargparse"])
def test_missing_extra_is_one_pip_line_away(module: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _needs.find_spec
    monkeypatch.setattr(_needs, "find_spec", lambda name: None if name == module else real(name))
    answer = run("run", "digits/swa")
    assert answer.is_mistake(module)
    assert answer.err.splitlines()[-1] == 'pip install "lightning-merge[recipes]"'


def test_checkpoint_that_was_cut_short_is_named(run: Run, checkpoints: Path) -> None:
    cut = Path("cut.ckpt")
    cut.write_bytes((checkpoints / "full.ckpt").read_bytes()[:2000])
    assert run("fit", *BORING, "--ckpt_path=cut.ckpt").is_mistake("cut.ckpt", "cut short", "earlier checkpoint")
    assert run("inspect", "cut.ckpt").is_mistake("cut.ckpt", "cut short", "earlier checkpoint")


def test_checkpoint_of_another_model_is_a_mistake(run: Run, checkpoints: Path, users_module: Path) -> None:
    users_module.write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "from torch import nn\n"
        "class Other(BoringModel):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.other = nn.Linear(3, 1)\n"
    )
    answer = run("validate", "--model=users_code.Other", f"--ckpt_path={checkpoints / 'full.ckpt'}", *QUICK)
    assert answer.is_mistake("Other", "other.weight")


# ---- what is not the user's mistake, or not a mistake


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "users_code.py"
    sys.modules.pop("users_code", None)


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError", "ImportError", "ZeroDivisionError"])
@pytest.mark.parametrize("method", ["__init__", "training_step"])
def test_error_in_users_code_keeps_its_traceback(error: str, method: str, run: Run, users_module: Path) -> None:
    users_module.write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Mine(BoringModel):\n"
        f"    def {method}(self, *args):\n"
        f"        raise {error}('of the user')\n"
    )
    with pytest.raises(Exception, match="of the user") as caught:
        run("fit", "--model=users_code.Mine", *QUICK)
    assert any("users_code" in str(entry.path) for entry in caught.traceback) or method == "__init__"


def test_ctrl_c_exits_130(run: Run, users_module: Path) -> None:
    users_module.write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Mine(BoringModel):\n"
        "    def training_step(self, *args):\n"
        "        raise KeyboardInterrupt\n"
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        answer = run("fit", "--model=users_code.Mine", *QUICK)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning switches it off
    assert answer.code == 130
    assert "Traceback" not in answer.err


def test_ctrl_c_before_training_exits_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert run("recipes").code == 130


def test_trainer_commands_take_any_model_and_config(run: Run) -> None:
    Path("mine.yaml").write_text(
        "model: lightning.pytorch.demos.boring_classes.BoringModel\n"
        "trainer:\n"
        "  accelerator: cpu\n"
        "  limit_val_batches: ${trainer.limit_train_batches}\n"
        "  limit_train_batches: 2\n"
    )
    for command in ("fit", "validate", "test", "predict"):
        assert run(command, "--config=mine.yaml", *QUICK).code == 0
    config = run("fit", "--config=mine.yaml", "--trainer.limit_train_batches=5", "--print_config").out
    assert "limit_val_batches: 5" in config


def test_tests_of_a_run_leave_no_config_behind(run: Run) -> None:
    for command, files in (("test", []), ("fit", ["config.yaml"])):
        assert (
            run(
                command,
                *BORING,
                *QUICK[1:],
                "--trainer.logger=false",
                "--trainer.limit_test_batches=1",
                "--trainer.max_steps=1",
                "--trainer.enable_checkpointing=false",
            ).code
            == 0
        )
        assert [path.name for path in Path().glob("*.yaml")] == files


def test_no_advertisement_is_shown(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run("fit", *BORING, *QUICK)
    assert "Tip" not in caplog.text


# ---- inspect


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds: with EMA full, weights-only and final; of Lightning's averaging; without any."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def fit(*callbacks: object) -> LightningModule:
        model = Scored()
        trainer = Trainer(
            max_epochs=1,
            limit_train_batches=3,
            limit_val_batches=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),  # type: ignore[arg-type]
        )
        trainer.fit(model)
        return model

    def save(name: str, **arguments: object) -> ModelCheckpoint:
        return ModelCheckpoint(folder, name, **arguments)  # type: ignore[arg-type]

    fit(
        EMA(decay=0.9, validate="both"),
        save("full", monitor="x"),
        save("raw", monitor="raw/x"),
        save("weights", monitor="x", mode="max", save_weights_only=True),  # Lightning tells two by their settings
    )
    fit(EMAWeightAveraging(), save("lightning"))
    torch.save(fit(save("plain")).state_dict(), folder / "state_dict.pt")
    return folder


def test_there_is_a_file_of_each_kind(checkpoints: Path) -> None:
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {
        *("full.ckpt", "raw.ckpt", "weights.ckpt", "ema-final.ckpt", "lightning.ckpt", "plain.ckpt", "state_dict.pt")
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "full.ckpt",
            [
                "a full checkpoint",
                "ema  EMA, ExponentialMean(decay=0.9, steps_per_update=1), 3 updates in 3 steps; in `state_dict`",
                "raw  to go on with",
                "`state_dict` holds: ema, 2 tensors, 66 numbers",
                "measured on ema",
                "trainer.fit(model, ckpt_path=",
            ],
        ),
        (
            "raw.ckpt",
            ["raw  in `state_dict`", "ema  EMA", "state, to go on with", "score: raw/x = ", "measured on raw"],
        ),
        ("weights.ckpt", ["a weights-only", "raw  not in this file", "training cannot go on from it", "score: x = "]),
        ("ema-final.ckpt", ["`state_dict` holds: ema", "metrics of ema: x = "]),
        (
            "lightning.ckpt",
            ["WeightAveraging", "average  in `state_dict`", "raw      in `current_model_state`", "score"],
        ),
        ("plain.ckpt", ["a plain Lightning checkpoint, written without lightning-merge", "keys: epoch, global_step"]),
        ("state_dict.pt", ["a state dict, written without lightning-merge", "layer.weight, layer.bias"]),
    ],
)
def test_inspect_says_what_is_in_a_file(name: str, parts: list[str], run: Run, checkpoints: Path) -> None:
    answer = run("inspect", str(checkpoints / name))
    assert answer.code == 0, answer.err
    for part in parts:
        assert part in answer.out, answer.out


@pytest.mark.parametrize(
    "name", ["full.ckpt", "raw.ckpt", "weights.ckpt", "lightning.ckpt", "plain.ckpt", "state_dict.pt"]
)
def test_the_line_on_loading_loads(name: str, run: Run, checkpoints: Path) -> None:
    out = run("inspect", str(checkpoints / name)).out
    (line,) = [line for line in out.splitlines() if line.startswith("  load: ")]
    exec(line.removeprefix("  load: "), {"torch": torch, "model": BoringModel()})


def test_inspect_of_an_unmeasured_set_says_so(run: Run, checkpoints: Path) -> None:
    content = torch.load(checkpoints / "full.ckpt", weights_only=True)
    content["lightning_merge"] |= {"measured": False, "score": None, "metrics": {}}
    torch.save(content, "unmeasured.ckpt")
    out = run("inspect", "unmeasured.ckpt").out
    assert "not measured: no validation ran on ema" in out
    assert "score:" not in out


def test_inspect_does_not_import_lightning(checkpoints: Path) -> None:
    code = (
        "import sys; from lightning_merge.cli import main;"
        f"assert main(['inspect', {str(checkpoints / 'full.ckpt')!r}]) == 0;"
        "assert 'torch' in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inspect_of_other_files(run: Run, checkpoints: Path) -> None:
    Path("text.ckpt").write_text("not a checkpoint")
    Path("empty.ckpt").write_bytes(b"")
    assert run("inspect", "text.ckpt").is_mistake("text.ckpt cannot be read")
    assert run("inspect", "empty.ckpt").is_mistake("empty.ckpt cannot be read")
    torch.save(BoringModel(), "module.pt")
    assert run("inspect", "module.pt").is_mistake("module.pt holds Python objects", "weights_only=False")
    torch.save([1, 2], "list.pt")
    assert "a list, not a checkpoint" in run("inspect", "list.pt").out
    torch.save({"model": {"w": torch.zeros(1)}, "epoch": 3}, "timm.pt")
    assert "keys: model, epoch" in run("inspect", "timm.pt").out
    content = torch.load(checkpoints / "full.ckpt", weights_only=True)
    content["lightning_merge"]["format"] = 2
    torch.save(content, "newer.ckpt")
    assert run("inspect", "newer.ckpt").is_mistake("format 2", "Update")
    torch.save({"w": torch.zeros(2)}, "old.pt", _use_new_zipfile_serialization=False)
    assert "a state dict" in run("inspect", "old.pt").out


def test_inspect_names_the_checkpoints_beside_a_missing_one(run: Run, checkpoints: Path) -> None:
    assert run("inspect", str(checkpoints / "last.ckpt")).is_mistake("full.ckpt", "raw.ckpt")
