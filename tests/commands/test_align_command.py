"""``soup --align``: runs from different starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_merge.alignment import units
from lightning_merge.recipes import Classifier, SmallConvNet

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path, run: Run) -> tuple[Path, Path, Path]:
    """A recipe's config, a network of it, and the same network with its hidden units in another order."""
    code, config, _ = run("recipes", "digits/plain")
    assert code == 0
    (tmp_path / "config.yaml").write_text(config)
    model = Classifier(SmallConvNet(), num_classes=10)
    weights = model.state_dict()
    other = dict(weights)
    for group in units(model):
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size))
        for name, axis in group.axes:
            other[name] = other[name].index_select(axis, order)
    for name, each in (("a", weights), ("b", other)):
        torch.save({"state_dict": each}, tmp_path / f"{name}.pt")
    return tmp_path / "config.yaml", tmp_path / "a.pt", tmp_path / "b.pt"


def test_a_network_in_another_order_is_merged_with_itself(run: Run, files: tuple[Path, Path, Path]) -> None:
    config, one, other = files
    code, out, err = run("soup", one, other, "--align", "--config", config, "--out", "m.pt")
    assert code == 0, err
    written = torch.load("m.pt", weights_only=True)
    assert written["provenance"]["aligned"]
    assert str(other) in out
    expected = torch.load(one, weights_only=True)["state_dict"]
    trained = [name for name in expected if "running" not in name]  # which `--config` measures again
    assert trained
    torch.testing.assert_close(
        {name: written["state_dict"][name] for name in trained}, {name: expected[name] for name in trained}
    )
    assert run("soup", one, other, "--config", config, "--out", "plain.pt")[0] == 0
    plain = torch.load("plain.pt", weights_only=True)["state_dict"]
    assert any((plain[name] - expected[name]).abs().max() > 1e-3 for name in trained)


def test_it_needs_a_model(run: Run, files: tuple[Path, Path, Path]) -> None:
    _, one, other = files
    code, _, err = run("soup", one, other, "--align", "--out", "m.pt")
    assert code != 0
    assert "`--align` needs `--config`" in err
