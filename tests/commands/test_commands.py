"""``diff``, ``export``, ``verify`` and ``doctor``: what they say, and what they refuse."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import timm
import torch
import yaml
from foreign_files import Line
from safetensors.torch import load_file, save_file

from lightning_merge.cli import main
from lightning_merge.compat import read_weights

Run = Callable[..., tuple[int, str, str]]

# A run of a second: what `lightning-merge run` leaves is what `verify` and `doctor` read.
SMALL = ["--trainer.max_epochs=4", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of ``digits/swa`` with its files."""
    root = tmp_path_factory.mktemp("run")
    assert main(["run", "digits/swa", *SMALL, f"--trainer.default_root_dir={root}"]) == 0
    return root / "version_0"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Path]:
    """Files of all sorts, good and bad, by name."""
    root = tmp_path_factory.mktemp("files")
    found = {path.name: path for path in folder.glob("checkpoints/*.ckpt")}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(t.shape, generator=generator) for name, t in Line().net.state_dict().items()}
    broken = weights | {"2.bias": torch.tensor([float("nan")])}
    for name, content in {
        "line.pt": weights,
        "other.pt": {name: t + 0.1 for name, t in weights.items()},
        "nan.pt": broken,
        "wide.pt": weights | {"0.weight": torch.zeros(5, 4)},
        "more.pt": weights | {"head.weight": torch.zeros(2)},
        "module.pt": Line().net,
        "list.pt": [1],
        "numbers.pt": {"a": 1},
        "newer.ckpt": {"lightning_merge": {"format": 9}, "state_dict": weights},
    }.items():
        torch.save(content, root / name)
        found[name] = root / name
    save_file(weights, root / "line.safetensors")
    for name, bytes_ in {"cut.pt": (root / "line.pt").read_bytes()[:300], "cut.safetensors": b"123"}.items():
        (root / name).write_bytes(bytes_)
    (root / "text.yaml").write_text("just text")
    (root / "no_model.yaml").write_text("trainer: {max_epochs: 1}")
    (root / "bad_model.yaml").write_text("model: {class_path: nowhere.Model}")
    (root / "bare").mkdir()
    (root / "unmeasured").mkdir()
    (root / "unmeasured" / "config.yaml").write_text((folder / "config.yaml").read_text())
    torch.save({"state_dict": weights}, root / "unmeasured" / "plain.ckpt")
    return found | {path.name: path for path in root.iterdir()} | {"run": folder}


# ---- mistakes: exit 2, no traceback, the cure in the message

MISTAKES: list[tuple[str, list[str]]] = [
    ("inspect cut.safetensors", ["cannot be read", "cut short"]),
    ("inspect newer.ckpt", ["format 9", "Update"]),
    ("inspect module.pt", ["Python objects", "torch.save(", "weights_only=False"]),
    ("diff", ["FILE[:SET]"]),
    ("diff nowhere.pt line.pt", ["there is no file nowhere.pt"]),
    ("diff line.pt", ["one set of weights only", "second FILE"]),
    ("diff line.pt wide.pt", ["different models", "`0.weight`", "(3, 4)", "(5, 4)"]),
    ("diff line.pt more.pt", ["different models", "`head.weight` is in", "more.pt only", "--strip"]),
    ("diff swa-final.ckpt:ema swa-final.ckpt:raw", ["no set called 'ema'", "swa, raw"]),
    ("diff cut.pt line.pt", ["cannot be read", "earlier checkpoint"]),
    ("diff bare line.pt", ["is a folder", "Name a file"]),
    ("diff list.pt line.pt", ["no weights", "inspect"]),
    ("diff numbers.pt line.pt", ["no weights", "inspect"]),
    ("export line.pt", ["out"]),
    ("export line.pt weights.onnx", ["must end in .safetensors, .pt, .pth, .bin", "weights.onnx"]),
    ("export line.pt line.safetensors", ["exists already", "--force"]),
    ("export line.pt nowhere/x.pt", ["no folder nowhere"]),
    ("export line.pt x.pt --set average", ["no set called 'average'", "weights"]),
    ("export line.pt x.pt --strip model.", ["begins with 'model.'", "0.weight"]),
    ("export line.pt x.pt --timm resnet1", ["no model called 'resnet1'", "resnet18"]),
    ("export line.pt x.pt --timm resnet18", ["do not fit timm's resnet18", "conv1.weight"]),
    ("export module.pt x.pt", ["Python objects", "weights_only=False"]),
    ("verify", ["run"]),
    ("verify nowhere", ["no folder nowhere", "runs/digits/swa"]),
    ("verify bare", ["no config.yaml"]),
    ("verify unmeasured", ["no checkpoint", "records a metric"]),
    ("verify run --tolerance -1", ["`--tolerance` must be at least 0, got -1.0"]),
    ("verify run --tolerance some", ["--tolerance", "some"]),
    ("doctor", ["FILE[:SET]"]),
    ("doctor line.pt wide.pt", ["different models", "`0.weight`"]),
    ("doctor line.pt other.pt --base more.pt", ["different models", "head.weight"]),
    ("doctor line.pt other.pt --points 0", ["`points` must be at least 1, got 0"]),
    ("doctor line.pt other.pt --config nowhere.yaml", ["no file nowhere.yaml", "config.yaml"]),
    ("doctor line.pt other.pt --config no_model.yaml", ["names no `model`"]),
    ("doctor line.pt other.pt --config text.yaml", ["names no `model`"]),
    ("doctor line.pt other.pt --config bad_model.yaml", ["nowhere"]),
    ("doctor line.pt other.pt --config run/config.yaml", ["0.weight"]),
    ("doctor swa-final.ckpt --config run/config.yaml --monitor val/los", ["`--monitor`", "val/los", "val/loss"]),
]


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 25


@pytest.mark.parametrize(("command", "parts"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_mistake_exits_2_and_names_the_cure(command: str, parts: list[str], run: Run, files: dict[str, Path]) -> None:
    def named(word: str) -> str:
        head, *tail = word.replace(":", "/:", 1).split("/")
        return "/".join([str(files.get(head, head)), *tail]).replace("/:", ":")

    first, *words = command.split()
    code, _, err = run(first, *map(named, words))
    assert code == 2
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err
    assert not Path("x.pt").exists()


def test_the_conversion_that_a_pickled_file_is_refused_with_works(run: Run, files: dict[str, Path]) -> None:
    _, _, err = run("inspect", files["module.pt"])
    (line,) = [line.strip() for line in err.splitlines() if "torch.save" in line]
    subprocess.run(line.replace("python", sys.executable, 1), shell=True, check=True)
    code, out, _ = run("inspect", files["module.pt"].with_suffix(".weights.pt"))
    assert (code, "a state dict" in out) == (0, True)


@pytest.mark.parametrize(
    ("library", "parts"),
    [
        ("timm", ["a checkpoint of timm", "average  in `state_dict_ema`", "raw      in `state_dict`"]),
        ("mmengine", ["MMEngine's EMAHook", "average  in `state_dict`", "raw      in `ema_state_dict`", ": 9"]),
        ("ema_pytorch", ["ema-pytorch", "average  in `ema`", "--set average"]),
        (
            "nemo",
            ["a pair of files as NeMo's", "raw      in `state_dict`", "average  in `state_dict` of nemo-EMA.ckpt"],
        ),
    ],
)
def test_inspect_knows_the_files_of_other_libraries(library: str, parts: list[str], run: Run, tmp_path: Path) -> None:
    path, expected = getattr(foreign_files, library)(tmp_path)
    code, out, err = run("inspect", path)
    assert code == 0, err
    for part in parts:
        assert part in out, out
    for name, weights in expected.items():
        model = Line() if library == "nemo" else Line().net
        model.load_state_dict(read_weights(path, name))
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


# ---- diff


def test_diff_gives_distance_and_angle(run: Run, tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.tensor([3.0, -4.0]), "b": torch.zeros(2)}, tmp_path / "b.pt")
    code, out, _ = run("diff", "a.pt", "b.pt")
    assert code == 0
    assert "1 of 2 tensors are equal" in out
    assert "length of a 5, of b 5; distance 8 (160.00% of a); cosine -0.280000" in out
    assert "entries of opposite sign: 50.00%" in out


def test_diff_of_one_file_compares_its_sets(run: Run, files: dict[str, Path]) -> None:
    out = run("diff", files["swa-final.ckpt"])[1]
    assert f"a: {files['swa-final.ckpt']}, swa" in out
    assert f"b: {files['swa-final.ckpt']}, raw" in out
    assert "running_mean" in out.splitlines()[-1]
    raw = f"{files['swa-final.ckpt']}:raw"
    assert "the same weights: all 20 tensors" in run("diff", raw, raw)[1]
    assert "NaN or infinity in 1 tensors, first `2.bias`" in run("diff", files["line.pt"], files["nan.pt"])[1]


# ---- export


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("chosen", [None, "raw"])
def test_exported_set_loads_without_us(name: str, chosen: str | None, run: Run, files: dict[str, Path]) -> None:
    from lightning_merge.files._layouts import open_file
    from lightning_merge.recipes import SmallConvNet

    path = files["swa-final.ckpt"]
    code, out, _ = run("export", path, name, "--strip", "model.", *(["--set", chosen] if chosen else []))
    assert code == 0
    weights = load_file(name) if name.endswith("s") else torch.load(name, weights_only=True)
    SmallConvNet().load_state_dict(weights)
    expected = open_file(path).choose(chosen or "swa").weights
    assert all(torch.equal(tensor, expected[f"model.{key}"]) for key, tensor in weights.items())
    assert f"{chosen or 'swa'} of {path}" in out


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_export_for_timm_loads_in_timm(name: str, run: Run, tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=7)
    torch.save(
        {"state_dict": {f"net.{key}": t for key, t in model.state_dict().items()} | {"x": torch.ones(1)}}, "a.pt"
    )
    code, out, err = run("export", "a.pt", name, "--strip", "net.", "--timm", "mobilenetv3_small_050")
    assert code == 0, err
    assert "left out, without the prefix 'net.': x (1 in all)" in out
    (line,) = [line for line in out.splitlines() if "load:" in line]
    loaded: Any = eval(line.partition("load: ")[2], {"timm": timm})
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in loaded.state_dict().items())


def test_export_of_a_foreign_file_takes_the_average(run: Run, tmp_path: Path) -> None:
    path, expected = foreign_files.mmengine(tmp_path)
    assert run("export", path, "x.pt")[0] == 0
    weights = torch.load("x.pt", weights_only=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected["average"].items())
    assert run("export", path, "x.pt", "--set", "raw", "--force")[0] == 0
    assert torch.equal(torch.load("x.pt", weights_only=True)["0.weight"], expected["raw"]["0.weight"])


# ---- verify


def test_files_of_a_run_hold_what_was_measured(run: Run, files: dict[str, Path]) -> None:
    code, out, _ = run("verify", files["run"])
    assert code == 0, out
    assert out.splitlines()[0].endswith("3 files hold the weights their scores were measured on")
    assert out.count("  equal ") == 3


def test_a_file_with_objects_among_its_hyperparameters_is_measured_too(
    run: Run, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text((files["run"] / "config.yaml").read_text())
    content = torch.load(files["swa-final.ckpt"], weights_only=True)
    torch.save(content | {"hyper_parameters": {"net": torch.nn.Linear(1, 1)}}, tmp_path / "objects.ckpt")
    code, out, err = run("verify", tmp_path)
    assert (code, out.count("  equal ")) == (0, 1), out + err


def test_a_file_whose_weights_were_exchanged_is_found(run: Run, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((files["run"] / "config.yaml").read_text())
    content = torch.load(files["swa-final.ckpt"], weights_only=True)
    torch.save(content, tmp_path / "good.ckpt")
    content["state_dict"] |= content["lightning_merge"]["raw"]
    torch.save(content, tmp_path / "exchanged.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    code, out, _ = run("verify", tmp_path)
    assert code == 1
    assert "do NOT all hold what was measured" in out
    assert "DIFFERS  exchanged.ckpt (swa)" in out
    assert "equal    good.ckpt" in out
    assert "skipped  plain.ckpt: written without lightning-merge" in out


# ---- doctor (its verdicts are in test_diagnostics.py)


def test_doctor_says_what_it_did_not_look_for(run: Run, files: dict[str, Path]) -> None:
    code, out, _ = run("doctor", files["line.pt"], files["other.pt"])
    assert code == 0
    assert out.startswith("verdict: merge")
    assert "`--config FILE` measures them" in out
    assert run("doctor", files["line.pt"], files["line.pt"])[1].startswith(
        "verdict: do not merge as they are (identical)"
    )
    assert "`2.bias` of nan.pt" in run("doctor", files["line.pt"], files["nan.pt"])[1]


def test_doctor_measures_the_line_between_the_sets_of_a_run(run: Run, files: dict[str, Path]) -> None:
    code, out, err = run("doctor", files["swa-final.ckpt"], "--config", files["run"] / "config.yaml", "--points", 1)
    assert code == 0, err
    assert "loss on the line: 0% " in out
    assert "shift of BatchNorm statistics of raw" in out
    config = yaml.safe_load((files["run"] / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 4
