"""``average`` and ``soup`` of sharded checkpoints: read and written tensor by tensor, and merges that grow."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import launch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_merge.cli import main
from lightning_merge.files._sharded import sharded_reader
from lightning_merge.trajectory import Checkpoint, Trajectory

pytestmark = pytest.mark.multiprocess
Run = Callable[..., tuple[int, str, str]]
STEPS = (1, 2, 3, 4)


def weights(step: int, of: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + of)
    wide, narrow = torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)
    return {"net.weight": wide, "net.bias": narrow.bfloat16(), "count": torch.tensor(step)}


def write(root: Path) -> None:
    """The same weights as torchtitan, Lightning and lightning-merge lay them out, from two processes."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def sharded(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        return {prefix + k: distribute_tensor(t, mesh, [Shard(0)]) if t.dim() else t for k, t in state.items()}

    for step in STEPS:
        moments = {name: {"exp_avg": t} for name, t in sharded(weights(step, 1)).items()}
        of_optimizer = {"state": moments, "param_groups": [{"lr": 0.1 * step}]}
        training = {"train_state": {"step": torch.tensor(step)}, "lr_scheduler": {"last_epoch": step}}
        plain = {**sharded(weights(step)), "optimizer": of_optimizer, **training}
        save(plain, checkpoint_id=root / "torchtitan" / f"step-{step}")
        path = root / "lightning" / f"step={step}.ckpt"
        save({"state_dict": sharded(weights(step)), "optimizer_0": of_optimizer}, checkpoint_id=path)
        ours = root / "ours" / f"step={step}.ckpt"
        raw = {name: f"lightning_merge/0/{name}" for name in weights(step)}
        parts = sharded(weights(step), "lightning_merge/0/")
        content = {"state_dict": sharded(weights(step, 2)), "optimizer_0": of_optimizer, "optimizer_1": parts}
        save(content, checkpoint_id=ours)
        if dist.get_rank() == 0:
            meta = {"global_step": step, "epoch": 0, "pytorch-lightning_version": "2.6.0", "callbacks": {"a": step}}
            torch.save(meta, path / "meta.pt")
            average = {"class": "EMA", "rule": "ExponentialMean(decay=0.9)", "steps": step, "updates": step}
            label = {"format": 1, "holds": "ema", "averages": {"ema": average}, "raw": raw, "states": {}}
            callbacks = {"a": step, "lightning_merge.ema": average}
            torch.save({**meta, "callbacks": callbacks, "lightning_merge": label}, ours / "meta.pt")
    dist.barrier()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded")
    launch(2, write, place)
    for step in STEPS:
        torch.save({"state_dict": weights(step), "global_step": step}, place / f"{step}.ckpt")
    return place


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def expected(root: Path, *coefficients: float) -> dict[str, Tensor]:
    return Trajectory.of_files(root / f"{step}.ckpt" for step in STEPS).combine(coefficients)


@pytest.mark.parametrize("layout", ["torchtitan", "lightning", "ours"])
@pytest.mark.parametrize("out", ["merged", "merged.ckpt"])
def test_a_merge_of_folders_has_the_bits_of_that_of_files(run: Run, root: Path, layout: str, out: str) -> None:
    pattern = ["--pattern", "step-*"] if layout == "torchtitan" else []
    code, said, err = run("average", root / layout, *pattern, "--rule", "linear", "--out", out)
    assert code == 0, err
    assert Path(out).is_dir() == (out == "merged")
    same(Checkpoint(out).weights(), expected(root, 0.1, 0.2, 0.3, 0.4))
    assert Checkpoint(out).merged_from == 4
    assert "4 checkpoints, 23 numbers" in said


@pytest.mark.parametrize(("layout", "processes"), [("torchtitan", 1), ("ours", 1), ("ours", 2)])
def test_a_folder_keeps_the_layout_and_all_else_of_the_last_checkpoint(
    run: Run, root: Path, layout: str, processes: int
) -> None:
    last = root / layout / ("step-4" if layout == "torchtitan" else "step=4.ckpt")
    code, _, err = run(
        "average", root / layout, "--pattern", last.name.replace("4", "*"), "--out", "m", "--processes", processes
    )
    assert code == 0, err
    was, found = (sharded_reader(path).read_metadata() for path in (last, Path("m")))
    kept = {key: t for key, t in was.state_dict_metadata.items() if "lightning_merge/" not in key}
    assert found.state_dict_metadata.keys() == kept.keys()
    assert found.planner_data == {key: was.planner_data[key] for key in kept}
    for key, stored in kept.items():
        assert getattr(found.state_dict_metadata[key], "chunks", None) == getattr(stored, "chunks", None)
    prefix, optimizer = ("", "optimizer") if layout == "torchtitan" else ("state_dict.", "optimizer_0")
    moment = f"{optimizer}.state.net.weight.exp_avg"
    state: Any = {prefix + "net.weight": torch.zeros(5, 3), moment: torch.zeros(5, 3)}
    state[f"{optimizer}.param_groups.0.lr"] = 0.0
    load(state, checkpoint_id="m", no_dist=True)
    same(state, {
        prefix + "net.weight": expected(root, *[0.25] * 4)["net.weight"],
        moment: weights(4, 1)["net.weight"],
        f"{optimizer}.param_groups.0.lr": 0.4,
    })  # fmt: skip
    if layout == "ours":
        meta = torch.load("m/meta.pt", weights_only=True)
        assert meta["callbacks"] == {"a": 4}
        assert meta["global_step"] == 4
        assert not [key for key in meta if key.startswith("lightning_merge")]


def test_a_merge_holds_one_tensor_of_each_folder(root: Path) -> None:
    checkpoint = Checkpoint(root / "ours" / "step=4.ckpt", "raw")
    first = checkpoint.tensor("net.weight")
    assert checkpoint.sharded is not None
    assert [t.shape for t in vars(checkpoint.sharded._last).values() if isinstance(t, Tensor)] == [first.shape]
    checkpoint.tensor("net.bias")
    assert vars(checkpoint.sharded._last)["tensor"].shape == (7,)


@pytest.mark.parametrize("layout", ["torchtitan", "lightning", "ours"])
def test_inspect_and_diff_read_no_more_than_a_tensor_at_a_time(
    run: Run, root: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **settings: Any) -> None:
        raise AssertionError("all of it is read")

    monkeypatch.setattr("torch.distributed.checkpoint.state_dict_loader.load", refused)
    first, last = (root / layout / (f"step-{n}" if layout == "torchtitan" else f"step={n}.ckpt") for n in (1, 4))
    code, said, err = run("inspect", first)
    assert (code, "3 tensors, 23 numbers" in said) == (0, True), err
    of = ":raw" if layout == "ours" else ""  # the published ones are others
    code, said, err = run("diff", f"{first}{of}", f"{last}{of}")
    assert code == 0, err
    assert said.splitlines()[2:] == run("diff", root / "1.ckpt", root / "4.ckpt")[1].splitlines()[2:]
    code, said, err = run("diff", first, root / "1.ckpt")
    assert (code, "all 3 tensors are equal bit for bit" in said) == (0, layout != "ours"), err
    if layout == "ours":
        assert "farthest apart" in run("diff", first)[1]


@pytest.mark.parametrize("rule", [["mean"], ["ema", "--decay", "0.5"]])
@pytest.mark.parametrize("layout", ["ours", "torchtitan"])
def test_a_merge_goes_on_without_the_old_checkpoints(run: Run, root: Path, layout: str, rule: list[str]) -> None:
    names = ("step-{}", "step-[34]") if layout == "torchtitan" else ("step={}.ckpt", "step=[34].ckpt")
    common = ["average", root / layout, "--rule", *rule, "--pattern"]
    out = "old" if layout == "ours" else "old.ckpt"
    assert run(*common, names[0].format("[12]"), "--out", out)[0] == 0
    code, _, err = run(*common, names[1], "--out", "new", "--continue-from", out)
    assert code == 0, err
    assert run(*common, names[0].format("*"), "--out", "all.ckpt")[0] == 0
    whole = Checkpoint("all.ckpt").weights()
    for name, tensor in Checkpoint("new").weights().items():
        torch.testing.assert_close(
            tensor, whole[name], rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
    code, _, err = run(*common, names[0].format("*"), "--out", "more.ckpt", "--continue-from", "new")
    assert code == 2
    assert "holds all of these 4 checkpoints already" in err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("average {root}/ours --rule linear --out x.ckpt --continue-from {root}/1.ckpt", "goes with `--rule mean`"),
        ("average {root}/ours --out x.ckpt --continue-from {root}/1.ckpt", "does not say of what it was merged"),
        ("soup {root}/1.ckpt {root}/2.ckpt --out x", "2.ckpt is no sharded one: name a file"),
        ("soup {root}/1.ckpt {root}/2.ckpt --out x.ckpt --processes 2", "`--processes` is for a sharded output"),
        ("soup {root}/torchtitan/step-1 --out x --processes 0", "`--processes` must be at least 1, got 0"),
        ("soup {root}/torchtitan/step-1 --out {root}/ours --force", "is a folder with other things in it"),
        ("soup {root}/torchtitan/step-1 --out {root}/torchtitan/step-1 --force", "is one of the inputs"),
        ("soup {root}/torchtitan/step-1 --out {root}/torchtitan/step-2", "exists already; --force replaces it"),
        ("soup {root}/torchtitan/step-1 --out nowhere/x", "there is no folder nowhere"),
        ("soup {root}/torchtitan/step-1 other --out x", "is of another model than"),
        ("soup {root}/torchtitan/step-1 lacking --out x", "lacks parts, or they were cut short: __0_0.distcp"),
        ("soup {root}/torchtitan/step-1 nan --out x", "`net.weight` of nan holds a NaN or an infinity"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(run: Run, root: Path, command: str, said: str) -> None:
    save({"net.weight": torch.zeros(2)}, checkpoint_id="other", no_dist=True)
    save({"net.weight": torch.zeros(2)}, checkpoint_id="lacking", no_dist=True)
    Path("lacking/__0_0.distcp").unlink()
    save({**weights(1), "net.weight": torch.full((5, 3), torch.nan)}, checkpoint_id="nan", no_dist=True)
    before = sorted(Path().rglob("*"))
    code, _, err = run(*command.format(root=root).split())
    assert (code, said in err) == (2, True), err
    assert sorted(Path().rglob("*")) == before


def as_under_torchrun(root: Path, *arguments: str) -> tuple[int, str, str]:
    """The exit code, and what it printed."""
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as err:
        return main([*arguments]), printed.getvalue(), err.getvalue()


def test_under_torchrun_its_processes_share_the_work(run: Run, root: Path, tmp_path: Path) -> None:
    common = ["average", str(root / "torchtitan"), "--pattern", "step-*", "--out", str(tmp_path / "m")]
    first, second = launch(2, as_under_torchrun, tmp_path, *common)
    assert (first[0], second[0]) == (0, 0), first[2]
    assert "4 checkpoints, 23 numbers" in first[1]
    assert second[1] == ""
    same(Checkpoint(tmp_path / "m").weights(), expected(root, *[0.25] * 4))
    assert {path.name for path in (tmp_path / "m").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert Checkpoint(tmp_path / "m").merged_from == 4
    assert not list(tmp_path.glob("m.*"))
    for code, _, err in launch(2, as_under_torchrun, tmp_path, *common, "--force", "--processes", "2"):
        assert (code, "`--processes` must be left out under `torchrun`" in err) == (2, True)


def two_sets(root: Path) -> None:
    """Three plain folders with weights and an average, which the merges leave as the last has it."""
    for step in (1, 2, 3):
        sets = {"model": {"w": torch.full((2,), float(step))}, "model_ema": {"w": torch.full((2,), -9.0 * step)}}
        save(sets, checkpoint_id=root / f"two-{step}", no_dist=True)


def test_a_merge_of_folders_with_two_sets_goes_on_with_the_set_that_was_merged(run: Run) -> None:
    two_sets(Path())
    assert run("average", ".", "--pattern", "two-[12]", "--out", "old")[0] == 0
    code, _, err = run("average", ".", "--pattern", "two-*", "--out", "new", "--continue-from", "old")
    assert code == 0, err
    assert Checkpoint("new", "raw").tensor("w").tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("sha256", None), ("sha256", ["a"]), ("coefficients", ["a", "b"]), ("coefficients", {}), ("files", [1, 2])],
    ids=str,
)
def test_a_merge_whose_provenance_was_changed_does_not_go_on(run: Run, key: str, value: Any) -> None:
    two_sets(Path())
    assert run("average", ".", "--pattern", "two-[12]", "--out", "old")[0] == 0
    about = json.loads(Path("old/provenance.json").read_text()) | {key: value}
    Path("old/provenance.json").write_text(json.dumps(about))
    code, _, err = run("average", ".", "--pattern", "two-*", "--out", "new", "--continue-from", "old")
    assert (code, f"old cannot go on: `{key}` of what it says" in err) == (2, True), err


@pytest.mark.parametrize("layout", ["lightning", "torchtitan"])
def test_an_ema_takes_in_no_checkpoint_from_before_those_that_it_holds(run: Run, root: Path, layout: str) -> None:
    pattern = "step-{}" if layout == "torchtitan" else "step={}.ckpt"
    common = ["average", root / layout, "--rule", "ema", "--decay", "0.5", "--pattern"]
    assert run(*common, pattern.format("[23]"), "--out", "old")[0] == 0
    code, _, err = run(*common, pattern.format("*"), "--out", "new", "--continue-from", "old")
    assert (code, "comes before a checkpoint that old holds already, and an `ema` goes by order" in err) == (2, True)
    if layout == "lightning":  # also where the old ones are gone, as files say their steps
        assert run(*common, pattern.format("1"), "--out", "new", "--continue-from", "old")[0] == 2


def test_the_layout_of_torchs_tutorial_is_read(run: Run) -> None:
    for step in (1, 2):
        model = {"net.w": torch.full((2,), float(step))}
        content = {"app": {"model": model, "optim": {"state": {"net.w": {"exp_avg": torch.ones(2)}}}}}
        save(content, checkpoint_id=f"app-{step}", no_dist=True)
    code, said, err = run("soup", "app-1", "app-2", "--out", "m")
    assert (code, "2 numbers" in said) == (0, True), err
    assert Checkpoint("m").weights()["net.w"].tolist() == [1.5, 1.5]
    found: Any = {"app": {"model": {"net.w": torch.zeros(2)}}}
    load(found, checkpoint_id="m", no_dist=True)
    assert found["app"]["model"]["net.w"].tolist() == [1.5, 1.5]


def test_a_damaged_part_is_named(run: Run) -> None:
    save({"w": torch.ones(300)}, checkpoint_id="whole", no_dist=True)
    save({"w": torch.ones(300)}, checkpoint_id="damaged", no_dist=True)
    part = Path("damaged/__0_0.distcp")
    part.write_bytes(bytes(len(part.read_bytes())))
    code, _, err = run("soup", "damaged", "whole", "--out", "m")
    assert (code, "damaged is damaged: `w` cannot be read from __0_0.distcp" in err) == (2, True), err
    assert not Path("m").exists()


def test_an_output_is_not_put_into_an_input_and_takes_the_place_of_a_link(run: Run, root: Path) -> None:
    save({"w": torch.ones(3)}, checkpoint_id="one", no_dist=True)
    code, _, err = run("soup", "one", "--out", "one/merged")
    assert (code, "one/merged is inside of one, one of the inputs" in err) == (2, True), err
    Path("link").symlink_to("two")
    save({"w": torch.zeros(3)}, checkpoint_id="two", no_dist=True)
    assert run("soup", "one", "--out", "link", "--force")[0] == 0
    assert sorted(path.name for path in Path().iterdir()) == ["link", "one", "two"]
    assert [Checkpoint(name).tensor("w").sum().item() for name in ("link", "two")] == [3.0, 0.0]


def test_a_merge_that_ends_half_way_leaves_the_old_folder(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["soup", root / "torchtitan" / "step-1", root / "torchtitan" / "step-2", "--out", "m"]
    assert run(*command)[0] == 0
    was = Checkpoint("m").sha256()
    seen: list[str] = []

    def killed(self: Trajectory, name: str, *rest: Any) -> Tensor:
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return merge(self, name, *rest)

    merge = Trajectory._combine
    with monkeypatch.context() as patched:
        patched.setattr(Trajectory, "_combine", killed)
        run(*command, "--force")
    assert len(seen) == 2
    assert [path.name for path in Path().iterdir()] == ["m"]
    assert Checkpoint("m").sha256() == was
    assert run(*command, "--force")[0] == 0
