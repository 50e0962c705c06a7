"""``soup`` by coefficients of task vectors: the merge, its resumption, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_merge.combiners import task_vector
from lightning_merge.recipes import Classifier, SmallConvNet
from lightning_merge.search import compose_adapters, penalty

Run = Callable[..., tuple[int, str, str]]

CONFIG = """\
seed_everything: 1
trainer: {accelerator: cpu, limit_val_batches: 1}
model:
  class_path: lightning_merge.recipes.Classifier
  init_args:
    num_classes: 10
    model: {class_path: lightning_merge.recipes.SmallConvNet}
data: {class_path: lightning_merge.recipes.Digits}
"""
FILES = ("a.pt", "b.pt")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base, two fine-tunings that are noise, and what gives model and data."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    base = Classifier(SmallConvNet(), num_classes=10).state_dict()
    torch.save({"state_dict": base}, "base.pt")
    for file in FILES:
        noisy = {
            name: tensor + 0.05 * torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor
            for name, tensor in base.items()
        }
        torch.save({"state_dict": noisy}, file)


def weights(file: str) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()[1:]]


def soup(run: Run, rule: str, *options: object) -> tuple[int, str, str]:
    return run("soup", *FILES, "--base", "base.pt", "--config", "config.yaml", "--rule", rule, *options)


def test_concrete_masks_the_vectors_and_then_searches_as_adamerging(run: Run) -> None:
    code, out, err = soup(run, "concrete", "--budget", 3, "--out", "whole.pt")
    assert code == 0, err
    assert "entropy = " in out
    state = torch.load("whole.search.mask.pt", weights_only=True)
    assert state["step"] == 3
    shutil.copy("whole.search.mask.pt", "then.search.mask.pt")
    lines = Path("whole.search.jsonl").read_text().splitlines(keepends=True)
    Path("then.search.jsonl").write_text("".join(lines[:2]))
    assert soup(run, "concrete", "--budget", 3, "--out", "then.pt")[0] == 0
    assert Path("then.search.jsonl").read_text() == "".join(lines)
    for name, tensor in weights("whole.pt").items():
        assert torch.equal(weights("then.pt")[name], tensor)


@pytest.mark.parametrize(("rule", "per"), [("adamerging", "model"), ("adamerging", "tensor"), ("atlas", "tensor")])
def test_rules_by_a_gradient_write_the_merge_and_go_on_from_their_log(run: Run, rule: str, per: str) -> None:
    code, out, err = soup(run, rule, "--per", per, "--budget", 4, "--out", "whole.pt")
    assert code == 0, err
    assert soup(run, rule, "--per", per, "--budget", 2, "--out", "first.pt")[0] == 0
    assert soup(run, rule, "--per", per, "--budget", 4, "--out", "then.pt", "--log", "first.search.jsonl")[0] == 0
    assert rows("first.search.jsonl") == rows("whole.search.jsonl")
    written, last = weights("whole.pt"), rows("whole.search.jsonl")[-1]
    for name, tensor in weights("then.pt").items():
        assert torch.equal(tensor, written[name])
    assert "2 task vectors were in memory: " in out
    provenance = torch.load("whole.pt", weights_only=True)["provenance"]
    assert provenance["monitor"] == {"adamerging": "entropy", "atlas": "cross entropy"}[rule]
    assert f"{provenance['monitor']} = {last['score']:.6g} after 4 evaluations" in out
    name = "model.0.weight" if "model.0.weight" in written else next(n for n in written if written[n].dim() > 1)
    shares = provenance["coefficients"] if per == "model" else provenance["shares"][name]
    vectors = [task_vector(weights(file), weights("base.pt"))[name] for file in FILES]
    expected = weights("base.pt")[name] + sum(a * vector for a, vector in zip(shares, vectors, strict=True))
    torch.testing.assert_close(written[name], expected)
    assert (provenance["shares"] is None) == (per == "model")
    assert list(shares if per == "model" else last["coefficients"]) == last["coefficients"]


@pytest.mark.parametrize(
    ("rule", "per"),
    [
        ("map", "model"),
        pytest.param("evolutionary", "model", marks=pytest.mark.slow),
        pytest.param("evolutionary", "group", marks=pytest.mark.slow),
    ],
)
def test_rules_by_a_metric_take_the_best_and_go_on_from_their_log(run: Run, rule: str, per: str) -> None:
    code, out, err = soup(run, rule, "--per", per, "--budget", 4, "--out", "whole.pt")
    assert code == 0, err
    lines = Path("whole.search.jsonl").read_text().splitlines(keepends=True)
    Path("then.search.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    assert soup(run, rule, "--per", per, "--budget", 4, "--out", "then.pt")[0] == 0
    assert Path("then.search.jsonl").read_text() == "".join(lines)
    for name, tensor in weights("whole.pt").items():
        assert torch.equal(weights("then.pt")[name], tensor)
    assert f"val/loss = {min(row['score'] for row in rows('whole.search.jsonl')):.6g} after 4 evaluations" in out
    assert ("trade-offs that no other candidate beats (1)" in out) == (rule == "map")


def test_each_task_may_have_data_of_its_own(run: Run) -> None:
    Path("other.yaml").write_text(CONFIG + "\n")
    code, _, err = soup(run, "adamerging", "--data", "config.yaml", "other.yaml", "--budget", 1, "--out", "s.pt")
    assert code == 0, err
    (row,) = rows("s.search.jsonl")
    assert len(row["parts"]) == 2
    assert row["score"] == pytest.approx(2 * row["parts"][0])


ADAPTED = """\
import torch
from torch import nn


class Adapted(nn.Module):
    def __init__(self, rank: int = 1):
        super().__init__()
        self.base = nn.Linear(64, 10)
        self.lora_A = nn.Linear(64, rank, bias=False)
        self.lora_B = nn.Linear(rank, 10, bias=False)

    def forward(self, images):
        inputs = images.flatten(1)
        return self.base(inputs) + self.lora_B(self.lora_A(inputs))
"""


@pytest.mark.parametrize("factors", [False, True])
def test_adapters_are_merged_as_products_or_as_published(
    run: Run, monkeypatch: pytest.MonkeyPatch, factors: bool
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("adapted.py").write_text(ADAPTED)
    Path("config.yaml").write_text(CONFIG.replace("lightning_merge.recipes.SmallConvNet", "adapted.Adapted"))
    adapters = []
    for seed, file in enumerate(FILES):
        torch.manual_seed(seed)
        factor = {f"model.lora_{key}.weight": torch.randn(shape) for key, shape in (("A", (1, 64)), ("B", (10, 1)))}
        adapters.append({"model.base.weight": torch.ones(10, 64), "model.base.bias": torch.zeros(10), **factor})
        torch.save({"state_dict": adapters[-1]}, file)
    command = ["soup", *FILES, "--rule", "lorahub", "--config", "config.yaml", *(["--factors"] if factors else [])]
    code, out, err = run(*command, "--budget", 5, "--out", "whole.pt")
    assert code == 0, err
    assert run(*command, "--budget", 3, "--out", "then.pt")[0] == 0
    assert run(*command, "--budget", 5, "--out", "then.pt", "--force")[0] == 0
    assert rows("then.search.jsonl") == rows("whole.search.jsonl")
    shares = torch.load("whole.pt", weights_only=True)["provenance"]["coefficients"]
    expected = compose_adapters(adapters, shares, *(["factors"] if factors else ["products", 1]))
    for name, tensor in weights("whole.pt").items():
        torch.testing.assert_close(tensor, expected[name])
    assert ("sums of factors: " if factors else "products, of the rank of the files again (1): ") in out
    row = min(rows("whole.search.jsonl"), key=lambda row: row["score"])
    assert row["score"] == pytest.approx(row["parts"][0] + penalty(shares))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "adamerging", "--config", "config.yaml"], "`--rule adamerging` needs `--base`"),
        (["--rule", "atlas", "--base", "base.pt"], "`--rule atlas` needs `--config`"),
        (["--per", "tensor"], "`--per` must be left out for `--rule uniform`"),
        (["--factors"], "`--factors` must be left out for `--rule uniform`"),
        (["--rule", "lorahub"], "`--rule lorahub` needs `--config`"),
        (["--rule", "lorahub", "--config", "config.yaml"], "must hold factors of LoRA layers"),
        (["--rule", "lorahub", "--config", "config.yaml", "--per", "tensor"], "`--per` must be left out"),
        (["--data", "config.yaml"], "`--data` must be left out for `--rule uniform`"),
        (["--rule", "adamerging", "--config", "no.yaml", "--base", "base.pt"], "there is no file no.yaml"),
    ],
)
def test_mistakes_are_named(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run("soup", *FILES, "--out", "s.pt", *arguments)
    assert code == 2
    assert message in err
    assert not Path("s.pt").exists()


def test_heads_that_differ_between_tasks_are_named(run: Run) -> None:
    state = weights("b.pt")
    name = next(name for name, tensor in state.items() if tensor.shape[:1] == (10,))
    torch.save({"state_dict": {**state, name: torch.zeros(5, *state[name].shape[1:])}}, "b.pt")
    code, _, err = soup(run, "adamerging", "--out", "s.pt")
    assert code == 2
    assert f"`{name}` has shape" in err


def test_quantised_weights_are_named(run: Run) -> None:
    for file in (*FILES, "base.pt"):
        state = weights(file)
        name = next(iter(state))
        torch.save({"state_dict": {**state, name: (100 * state[name]).to(torch.int8)}}, file)
    code, _, err = soup(run, "adamerging", "--out", "s.pt")
    assert code == 2
    assert f"`{name}` holds whole numbers or flags (int8), as quantised weights" in err


DRAWING = """\
import random

import numpy
import torch
from lightning_merge.recipes import Classifier


class Drawing(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("drawn", torch.rand(()).item() + random.random() + numpy.random.rand())
        return super().validation_step(batch, batch_idx)
"""


def test_what_validation_draws_does_not_depend_on_what_was_measured_before(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("drawing.py").write_text(DRAWING)
    Path("config.yaml").write_text(CONFIG.replace("lightning_merge.recipes.Classifier", "drawing.Drawing"))
    options = ("--monitor", "drawn", "--mode", "min", "--budget", 4)
    assert soup(run, "map", *options, "--out", "whole.pt")[0] == 0
    found = rows("whole.search.jsonl")
    lines = Path("whole.search.jsonl").read_text().splitlines(keepends=True)
    Path("then.search.jsonl").write_text("".join(lines[:3]))
    assert soup(run, "map", *options, "--out", "then.pt")[0] == 0
    assert rows("then.search.jsonl") == found
    assert len({row["score"] for row in found}) == 1
