"""Soups of pruned models: zeros that all share stay, others are refused or taken over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

from lightning_merge.soups import soup

Run = Callable[..., tuple[int, str, str]]
ONE, TWO, OTHER = [1.0, 0.0, 2.0], [3.0, 0.0, -4.0], [1.0, 2.0, 0.0]


def model(values: list[float]) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([values]), "b": torch.tensor([values[0] - 1])}  # a bias may be zero in one alone


def test_one_mask_is_kept() -> None:
    merged = soup([model(ONE), model(TWO)], masks="keep")
    assert merged["w"].tolist() == [[2.0, 0.0, -1.0]]
    assert merged["b"].tolist() == [1.0]


def test_different_masks_are_refused_or_intersected() -> None:
    models = [model(ONE), model(TWO), model(OTHER)]
    with pytest.raises(ValueError, match=r"`w` of model 3 has other zeros than that of the first, in 2 of 3 places"):
        soup(models, masks="keep")
    torch.testing.assert_close(soup(models, masks="intersect")["w"], torch.tensor([[5 / 3, 0.0, 0.0]]))
    assert soup(models, [0.5, 0.5, 0.0], masks="keep")["w"].tolist() == [[2.0, 0.0, -1.0]]  # the third takes no part
    with pytest.raises(ValueError, match="`masks` must be"):
        soup(models, masks="both")  # type: ignore[arg-type]


def test_masks_of_torch_stay_masks() -> None:
    layer = torch.nn.Linear(4, 4)
    prune.random_unstructured(layer, "bias", 0.5)
    other = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other["bias_mask"] = 1 - other["bias_mask"]
    assert soup([layer.state_dict(), other], masks="intersect")["bias_mask"].tolist() == [0.0] * 4
    assert torch.equal(soup([layer.state_dict()] * 2, masks="keep")["bias_mask"], layer.state_dict()["bias_mask"])


@pytest.mark.parametrize(("masks", "third"), [("keep", None), ("intersect", OTHER)])
def test_the_command_writes_zeros(masks: str, third: list[float] | None, run: Run, tmp_path: Path) -> None:
    names = []
    for i, values in enumerate([ONE, TWO, third]):
        if values is not None:
            torch.save(model(values), tmp_path / f"{i}.pt")
            names.append(f"{i}.pt")
    code, _, err = run("soup", *names, "--masks", masks, "--out", "m.pt")
    assert code == 0, err
    written = torch.load("m.pt", weights_only=True)
    expected = [[2.0, 0.0, -1.0]] if third is None else [[5 / 3, 0.0, 0.0]]
    torch.testing.assert_close(written["state_dict"]["w"], torch.tensor(expected))
    assert written["provenance"]["masks"] == masks


def test_the_command_refuses_what_does_not_keep_zeros(run: Run, tmp_path: Path) -> None:
    for i, values in enumerate([ONE, OTHER]):
        torch.save(model(values), tmp_path / f"{i}.pt")
    code, _, err = run("soup", "0.pt", "1.pt", "--masks", "keep", "--out", "m.pt")
    assert code == 2
    assert "`w` of model 2 has other zeros" in err
    assert not Path("m.pt").exists()
    code, _, err = run("soup", "0.pt", "1.pt", "--masks", "keep", "--rule", "iso-c", "--base", "0.pt", "--out", "m.pt")
    assert code == 2
    assert "`--masks` needs a rule that adds up weights" in err
    code, _, err = run("soup", "0.pt", "1.pt", "--masks", "intersect", "--out", "folder")
    assert code == 2
    assert "`--masks intersect` is written to a file" in err
