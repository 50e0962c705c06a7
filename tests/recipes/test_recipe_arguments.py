"""Recipes' own classes take what they are handed, or refuse it at once by the argument's name."""

from pathlib import Path

import pytest
from hostile import callables, refused_otherwise

FAMILIAR = (
    "Augmented",
    "CIFAR",
    "CPUThreads",
    "CifarResNet18",
    "Digits",
    "ImageNet",
    "RunReport",
    "SmallConvNet",
    "SmallResNet",
    "WideResNet",
)


@pytest.mark.parametrize("name", FAMILIAR)
def test_a_recipe_names_the_argument_it_refuses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not refused_otherwise(name, callables("recipes")[name])
