"""A merge by conjugate gradients that is killed goes on to the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_merge.combiners import MaTS, _conjugate
from lightning_merge.importance import Statistics

NUMBERS = torch.Generator().manual_seed(0)
VECTORS = [{"a": torch.randn(6, 8, generator=NUMBERS), "b": torch.randn(5, 8, generator=NUMBERS)} for _ in range(2)]
INPUTS = [{name: torch.randn(40, 8, generator=NUMBERS) for name in ("a", "b")} for _ in range(2)]
GRAMS = {t: Statistics("gram", {n: x.T @ x for n, x in each.items()}) for t, each in enumerate(INPUTS)}


class Killed(BaseException):
    pass


def mats(folder: Path | None, **settings: Any) -> MaTS:
    return MaTS(GRAMS, tolerance=0.0, iterations=12, folder=folder, **settings)


@pytest.fixture(autouse=True)
def written_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conjugate, "_SECONDS", 0.0)


@pytest.mark.parametrize("kill_at", [0, 1, 5, 12, 17])
def test_killed_at_any_iteration_it_goes_on_to_the_same_bits(
    kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, steps, original = mats(None).combine(VECTORS), [], _conjugate._next

    def step(*arguments: Any) -> Any:
        if len(steps) == kill_at:
            raise Killed
        steps.append(1)
        return original(*arguments)

    monkeypatch.setattr(_conjugate, "_next", step)
    with pytest.raises(Killed):
        mats(tmp_path / "way").combine(VECTORS)
    assert len(steps) == kill_at
    monkeypatch.setattr(_conjugate, "_next", lambda *arguments: (steps.append(1), original(*arguments))[1])
    found = mats(tmp_path / "way").combine(VECTORS)
    assert len(steps) == 24  # none is done twice
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_problem_is_not_gone_on_with_and_more_iterations_are(tmp_path: Path) -> None:
    mats(tmp_path).combine(VECTORS)
    assert len(list(tmp_path.glob("mats-*.safetensors"))) == 2
    other = [{name: 2 * tensor for name, tensor in vector.items()} for vector in VECTORS]
    found, expected = mats(tmp_path).combine(other), mats(None).combine(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    few, many = tmp_path / "few", MaTS(GRAMS, tolerance=0.0, iterations=7)
    MaTS(GRAMS, tolerance=0.0, iterations=3, folder=few).combine(VECTORS)
    on = MaTS(GRAMS, tolerance=0.0, iterations=7, folder=few).combine(VECTORS)
    assert all(torch.equal(on[name], tensor) for name, tensor in many.combine(VECTORS).items())
    fewer, fresh = (MaTS(GRAMS, tolerance=0.0, iterations=2, folder=at).combine(VECTORS) for at in (few, None))
    assert all(torch.equal(fewer[name], fresh[name]) for name in fresh)
