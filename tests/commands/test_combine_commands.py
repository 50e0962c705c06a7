"""``average`` and ``soup``: what they write, that a search continues, and what they refuse."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_merge.cli import main
from lightning_merge.combiners import (
    TSVM,
    Combiner,
    Consensus,
    Daheim,
    Fisher,
    IsoC,
    MaTS,
    MetaGPT,
    RegMean,
    combine_files,
)
from lightning_merge.importance import Statistics

Run = Callable[..., tuple[int, str, str]]

SMALL = ["--trainer.max_epochs=4", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false"]

BASED = ["soup", "walk/1.ckpt", "--base", "walk/1.ckpt", "--out", "a.pt", "--rule"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run on digits, with two files per epoch or so."""
    root = tmp_path_factory.mktemp("run")
    every = ["--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint"]
    every += [f"--trainer.callbacks.{key}={value}" for key, value in (("every_n_train_steps", 4), ("save_top_k", -1))]
    assert main(["run", "digits/plain", *SMALL, f"--trainer.default_root_dir={root}", *every]) == 0
    return root / "version_0"


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    """Four checkpoints of one number."""
    place = tmp_path / "walk"
    place.mkdir()
    for step in range(1, 5):
        state = {"w": torch.tensor([float(step)]), "count": torch.tensor(step)}
        torch.save({"state_dict": state, "global_step": step}, place / f"{step}.ckpt")
    return place


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 2.5),
        (["--rule", "window", "--k", "2"], 3.5),
        (["--rule", "linear"], 3.0),
        (["--rule", "ema", "--decay", "0.5"], 0.125 + 2 * 0.125 + 3 * 0.25 + 4 * 0.5),
        (["--rule", "wsm-linear"], 2.5),
        (["--rule", "wsm-1-sqrt"], 0.5 + 2 * 0.2071068 + 3 * 0.1589186 + 4 * 0.1339746),
        (["--rule", "wsm-cosine"], 2.5),
        (["--rule", "wsm-exponential"], 0.3182072 + 2 * 0.2675793 + 3 * 0.2250064 + 4 * 0.1892071),
        (["--start", "2", "--end", "3"], 2.5),
        (["--last", "1"], 4.0),
    ],
    ids=str,
)
def test_average_writes_the_combination_with_its_provenance(
    run: Run, walk: Path, arguments: list[str], expected: float
) -> None:
    code, out, _ = run("average", walk, "--out", "merged.ckpt", *arguments)
    assert code == 0
    written = load(Path("merged.ckpt"))
    assert float(written["state_dict"]["w"]) == pytest.approx(expected, rel=1e-6)
    provenance = written["provenance"]
    assert len(provenance["coefficients"]) == len(provenance["files"])
    assert sum(provenance["coefficients"]) == pytest.approx(1)
    for file, found in zip(provenance["files"], provenance["sha256"], strict=True):
        assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == found
        assert file in out
    assert 'torch.load("merged.ckpt"' in out


def test_uniform_soup_is_the_mean_of_the_files(run: Run, walk: Path) -> None:
    code, out, _ = run("soup", walk / "1.ckpt", walk / "4.ckpt", "--out", "soup.pt")
    assert code == 0
    assert float(load(Path("soup.pt"))["state_dict"]["w"]) == 2.5
    assert "uniform of 2 checkpoints" in out


def test_model_stock_goes_from_the_base_as_far_as_the_files_agree(run: Run, tmp_path: Path) -> None:
    for name, vector in {"base": [0, 0, 0, 0], "a": [1, 0, 1, 1], "b": [1, 1, 0, 1]}.items():
        torch.save({"w": torch.tensor(vector).float() + 5, "n": torch.tensor(3)}, tmp_path / f"{name}.pt")
    assert run("soup", "a.pt", "b.pt", "--rule", "model-stock", "--base", "base.pt", "--out", "out.pt")[0] == 0
    found = load(tmp_path / "out.pt")["state_dict"]
    torch.testing.assert_close(found["w"], torch.tensor([5.8, 5.4, 5.4, 5.8]))
    assert found["n"] == 3


@pytest.mark.parametrize(
    ("rule", "combiner"),
    [
        ("iso-c", IsoC()),
        ("iso-c", IsoC(1.5)),
        ("tsv-m", TSVM()),
        ("metagpt", MetaGPT()),
        ("tall", Consensus(scale=0.5)),
    ],
)
def test_rules_from_a_base_are_the_combiners(run: Run, tmp_path: Path, rule: str, combiner: Combiner) -> None:
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        torch.save({"w": torch.randn(4, 3), "v": torch.randn(2), "n": torch.tensor(3)}, tmp_path / f"{name}.pt")
    given = ["--scale", vars(combiner)["scale"]] if "scale" in vars(combiner) else []
    assert run("soup", "a.pt", "b.pt", "--rule", rule, *given, "--base", "base.pt", "--out", "out.pt")[0] == 0
    written = load(tmp_path / "out.pt")
    expected = combine_files(combiner, tmp_path / "base.pt", [tmp_path / "a.pt", tmp_path / "b.pt"])
    assert written["provenance"]["base"].endswith("base.pt")
    assert set(written["state_dict"]) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(written["state_dict"][name], tensor), name


@pytest.mark.parametrize("rule", ["model-stock", "iso-c", "tsv-m", "tall", "metagpt"])
def test_rules_from_a_base_merge_ties_once_and_name_what_is_damaged(run: Run, tmp_path: Path, rule: str) -> None:
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        weights = {"w": torch.randn(4, 3).bfloat16(), "v": torch.randn(2), "empty": torch.zeros(0, 2)}
        torch.save({**weights, "tied": weights["w"]}, tmp_path / f"{name}.pt")
        torch.save(weights, tmp_path / f"{name}-single.pt")
        torch.save({**weights, "v": torch.tensor([1.0, torch.nan])}, tmp_path / f"{name}-damaged.pt")
    command = ["soup", "--rule", rule, "--out"]
    assert run(*command, "out.pt", "a.pt", "b.pt", "--base", "base.pt")[0] == 0
    assert run(*command, "single.pt", "a-single.pt", "b-single.pt", "--base", "base-single.pt")[0] == 0
    written, single = (load(Path(name))["state_dict"] for name in ("out.pt", "single.pt"))
    assert written["tied"].data_ptr() == written["w"].data_ptr()
    for name, tensor in single.items():
        assert torch.equal(written[name], tensor), name
    for files, base, damaged in (("a-single b-damaged", "base-single", "b"), ("a-single", "base-damaged", "base")):
        paths = [f"{each}.pt" for each in files.split()]
        code, _, err = run(*command, "none.pt", *paths, "--base", f"{base}.pt")
        assert code == 2
        assert f"`v` of {damaged}-damaged.pt holds a NaN or an infinity" in err


@pytest.mark.parametrize("rule", ["model-stock", "iso-c", "tsv-m", "tall", "metagpt"])
def test_statistics_of_batch_norm_are_their_mean_whatever_the_rule(run: Run, tmp_path: Path, rule: str) -> None:
    for name, variance in (("base", 2.0), ("a", 0.5), ("b", 0.25)):
        norm = {"n.running_var": torch.tensor([variance]), "n.running_mean": torch.tensor([variance * 3])}
        torch.save({"w": torch.randn(3, 2), **norm, "n.num_batches_tracked": torch.tensor(7)}, tmp_path / f"{name}.pt")
    scale = ["--scale", 1] if rule == "tall" else []
    code, _, err = run("soup", "a.pt", "b.pt", "--base", "base.pt", "--rule", rule, "--out", "out.pt", *scale)
    assert code == 0, err
    merged = load(Path("out.pt"))["state_dict"]
    assert (float(merged["n.running_var"]), float(merged["n.running_mean"])) == (0.375, 1.125)
    assert list(merged) == ["w", "n.running_var", "n.running_mean", "n.num_batches_tracked"]


WEIGHED: dict[str, Callable[[Any], Combiner]] = {
    "fisher": Fisher,
    "fisher-nodes": lambda known: Fisher(known, per="node"),
    "daheim": lambda known: Daheim(known, "base.fisher", scale=0.5),
    "regmean": RegMean,
    "mats": MaTS,
}


@pytest.fixture
def linear(tmp_path: Path) -> None:
    """A base and two models, each with a file of statistics of either kind."""
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        model = torch.nn.Linear(3, 2)
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{name}.pt")
        inputs = torch.randn(9, 3)
        fisher = {key: torch.rand_like(p) for key, p in model.named_parameters()}
        Statistics.of(model, "fisher", fisher, samples=7, labels="true").write(tmp_path / f"{name}.fisher")
        Statistics.of(model, "gram", {"weight": inputs.T @ inputs}, samples=9).write(tmp_path / f"{name}.gram")


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("rule", WEIGHED)
def test_rules_with_statistics_are_the_combiners(run: Run, rule: str) -> None:
    kind = "gram" if rule in ("regmean", "mats") else "fisher"
    files = [f"a.{kind}", f"b.{kind}"]
    more = ["--base-statistics", "base.fisher", "--scale", "0.5"] if rule == "daheim" else []
    command = ["soup", "a.pt", "b.pt", "--rule", rule, "--base", "base.pt", "--out", "out.pt", *more]
    code, out, err = run(*command, "--statistics", *files)
    assert code == 0, err
    assert f"weighed by statistics of kind {kind!r} in b.{kind} of" in out
    assert ("without statistics, so the plain mean: bias (1 in all)" in out) == (kind == "gram")
    written = load(Path("out.pt"))
    assert written["provenance"]["importance"] == files
    expected = combine_files(WEIGHED[rule](dict(enumerate(files))), "base.pt", ["a.pt", "b.pt"])
    for name, tensor in expected.items():
        assert torch.equal(written["state_dict"][name], tensor), name


MERGED = ["soup", "a.pt", "b.pt", "--base", "base.pt", "--out", "out.pt", "--rule"]


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MERGED, "fisher"], "`--rule fisher` needs `--statistics`, a file for each of the 2 checkpoints, got 0"),
        ([*MERGED, "fisher", "--statistics", "a.fisher"], "a file for each of the 2 checkpoints, got 1"),
        (
            [*MERGED, "fisher", "--statistics", "b.fisher", "a.fisher"],
            "b.fisher are of other weights than a.pt: `weight`",
        ),
        ([*MERGED, "fisher", "--statistics", "a.gram", "b.gram"], "Fisher takes statistics of kind 'fisher' or 'adam'"),
        (
            [*MERGED, "regmean", "--statistics", "a.pt", "b.pt"],
            "a.pt cannot be read: it was cut short, or is no safetens",
        ),
        (
            [*MERGED, "iso-c", "--statistics", "a.gram"],
            "`--statistics` must be left out for `--rule iso-c`, got a.gram",
        ),
        (
            [*MERGED, "fisher", "--base-statistics", "base.fisher", "--statistics", "a.fisher", "b.fisher"],
            "`--base-statistics` must be left out for `--rule fisher`",
        ),
        (
            [*MERGED, "daheim", "--base-statistics", "a.fisher", "--statistics", "a.fisher", "b.fisher"],
            "a.fisher are of other weights than base.pt",
        ),
    ],
    ids=lambda value: " ".join(value[7:]) if isinstance(value, list) else "",
)
def test_statistics_that_do_not_belong_are_refused(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert not Path("out.pt").exists()


@pytest.mark.usefixtures("linear")
def test_a_nan_is_named_before_statistics_are_compared(run: Run) -> None:
    state = load(Path("b.pt"))["state_dict"]
    state["weight"][0, 0] = torch.nan
    torch.save({"state_dict": state}, "b.pt")
    code, _, err = run(*MERGED, "fisher", "--statistics", "a.fisher", "b.fisher")
    assert code == 2
    assert "`weight` of b.pt holds a NaN or an infinity" in err


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["greedy", "lcsc", "bayes"])
def test_searched_average_scores_best_and_continues_from_its_log(run: Run, folder: Path, rule: str) -> None:
    command = ["average", folder, "--rule", rule, "--config", folder / "config.yaml", "--last", 3]
    command += ["--monitor", "val/acc", "--mode", "max"]
    code, out, err = run(*command, "--budget", 4, "--out", "a.ckpt")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("a.search.jsonl").read_text().splitlines()[1:]]
    assert len(rows) == 4
    assert f"val/acc = {max(row['score'] for row in rows):.6g} after 4 evaluations" in out
    code, out, _ = run(*command, "--budget", 5, "--out", "b.ckpt", "--log", "a.search.jsonl")
    assert code == 0
    more = [json.loads(line) for line in Path("a.search.jsonl").read_text().splitlines()[1:]]
    assert more[:4] == rows
    assert len(more) == 5
    provenance = load(Path("b.ckpt"))["provenance"]
    assert provenance["score"] == max(row["score"] for row in more)
    assert provenance["statistics"] == "measured"
    assert provenance["coefficients"] in [row["coefficients"] for row in more]


@pytest.mark.slow
def test_learned_soup_lowers_the_loss_below_every_file(run: Run, folder: Path) -> None:
    files = sorted(folder.glob("**/*.ckpt"))[-3:]
    code, _, err = run(
        "soup", *files, "--rule", "learned", "--config", folder / "config.yaml", "--budget", 8, "--out", "s.pt"
    )
    assert code == 0, err
    provenance = load(Path("s.pt"))["provenance"]
    assert sum(provenance["coefficients"]) == pytest.approx(1)
    assert provenance["evaluations"] <= 8


@pytest.mark.slow
def test_a_metric_that_is_not_logged_is_named(run: Run, folder: Path) -> None:
    code, _, err = run(
        "average",
        folder,
        "--rule",
        "greedy",
        "--config",
        folder / "config.yaml",
        "--monitor",
        "val/f1",
        "--out",
        "a.pt",
    )
    assert code == 2
    assert "`--monitor` must be a metric that validation logs, got 'val/f1'; it logs: val/acc, val/loss" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "walk", "--out", "a.npz"], "`--out` must end in .ckpt or .pt, got a.npz"),
        (["average", "walk", "--out", "nowhere/a.pt"], "there is no folder nowhere"),
        (["average", "walk", "--out", "walk/1.ckpt"], "walk/1.ckpt exists already; --force replaces it"),
        (["average", "walk", "--out", "a.pt", "--rule", "greedy"], "name model and data with `--config`"),
        (["average", "walk", "--out", "a.pt", "--rule", "window", "--k", "9"], "`k` must be in [1, 4]"),
        (["average", "walk", "--out", "a.pt", "--pattern", "*.pt"], "no checkpoint in walk matches '*.pt'"),
        (["average", "nowhere", "--out", "a.pt"], "no checkpoint in nowhere"),
        (["soup", "walk/1.ckpt", "walk/9.ckpt", "--out", "a.pt"], "there is no file walk/9.ckpt"),
        (["soup", "walk/1.ckpt", "--rule", "model-stock", "--out", "a.pt"], "`--rule model-stock` needs `--base`"),
        (["soup", "walk/1.ckpt", "--rule", "tsv-m", "--out", "a.pt"], "`--rule tsv-m` needs `--base`"),
        (["soup", "walk/1.ckpt", "--scale", "2", "--out", "a.pt"], "`--scale` must be left out for `--rule uniform`"),
        ([*BASED, "iso-c", "--scale", "0"], "`scale` must be a number in (0, 10]"),
        ([*BASED, "model-stock", "--scale", "1"], "`scale` must be left out for ModelStock"),
        (
            ["soup", "walk/1.ckpt", "--rule", "learned", "--mode", "max", "--config", "c", "--out", "a.pt"],
            "the score has to be a smooth loss",
        ),
    ],
    ids=lambda value: " ".join(value[:6]) if isinstance(value, list) else "",
)
def test_mistakes_exit_2_and_name_the_cure(run: Run, walk: Path, arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert not Path("a.pt").exists()


def test_forced_output_replaces_a_file(run: Run, walk: Path) -> None:
    assert run("average", walk, "--out", "a.pt", "--last", 2)[0] == 0
    assert run("average", walk, "--out", "a.pt", "--force")[0] == 0
    assert float(load(Path("a.pt"))["state_dict"]["w"]) == 2.5
