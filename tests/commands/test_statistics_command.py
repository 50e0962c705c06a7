"""``lightning-merge statistics``: what it writes is what ``soup --statistics`` takes, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_merge.importance import Statistics

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(run: Run) -> Path:
    """A checkpoint of a short run on digits."""
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
    code, _, err = run("run", "digits/plain", *short, "--trainer.default_root_dir=.")
    assert code == 0, err
    return next(Path("version_0").glob("**/last.ckpt"))


@pytest.mark.slow
def test_statistics_of_a_checkpoint_are_of_its_weights(run: Run, file: Path) -> None:
    config = "version_0/config.yaml"
    for kind, count in (("fisher", 11), ("gram", 4)):
        code, out, err = run("statistics", file, "--config", config, "--kind", kind, "--samples", 70)
        assert code == 0, err
        found = Statistics.open(file.with_name(f"{kind}-statistics.safetensors"))
        assert f"kind {kind!r} of {found.samples} samples" in out
        assert found.samples == (70 if kind == "fisher" else 96)  # whole batches of 32
        assert len(found.tensors) == count
        found.refuse_other_weights(torch.load(file, weights_only=True)["state_dict"], "the file")
    beside = [file.with_name(f"{kind}-statistics.safetensors") for kind in ("fisher", "gram")]
    for rule, statistics in (("fisher", beside[0]), ("regmean", beside[1])):
        merged = ["soup", file, "--base", file, "--rule", rule, "--out", f"{rule}.pt", "--statistics", statistics]
        assert run(*merged)[0] == 0
    code, _, err = run("statistics", file, "--config", config)
    assert code == 2
    assert "exists already; --force replaces it" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "`--samples` must be at least 1, got 0"),
        (["--out", "s.pt"], "`--out` must end in .safetensors, got s.pt"),
        ([], "there is no file none.yaml"),
    ],
)
def test_mistakes_exit_2_and_name_the_cure(run: Run, tmp_path: Path, arguments: list[Any], message: str) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    code, _, err = run("statistics", "a.pt", "--config", "none.yaml", *arguments)
    assert code == 2
    assert message in err
