"""Folders of peft go in and out without change, and what ``soup`` writes loads where they did."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_merge.adapters import Adapter, combine_adapters
from lightning_merge.combiners import Average

peft = pytest.importorskip("peft")

Run = Callable[..., tuple[int, str, str]]
INPUTS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0", "2"], **more})


def ia3() -> Any:
    return peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])


def saved(folder: Path, seed: int, config: Any) -> Path:
    """The folder of a random adapter."""
    model = peft.get_peft_model(network(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def outputs(folder: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(network(), folder).merge_and_unload()
    with torch.no_grad():
        return torch.cat([each.flatten() for each in model.state_dict().values()])


@pytest.mark.parametrize(
    "config", [lora(), lora(use_rslora=True), peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])]
)
def test_a_folder_goes_through_peft_and_in_again_without_change(config: Any, tmp_path: Path) -> None:
    first = Adapter.read(saved(tmp_path / "a", 1, config))
    first.write(tmp_path / "b")
    peft.PeftModel.from_pretrained(network(), tmp_path / "b").save_pretrained(tmp_path / "c")
    again = Adapter.read(tmp_path / "c")
    assert list(again.weights) == list(first.weights)
    assert all(torch.equal(again.weights[name], each) for name, each in first.weights.items())
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()) == first.config
    assert torch.equal(outputs(tmp_path / "b"), outputs(tmp_path / "a"))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_soup_of_folders_is_the_mean_of_the_merged_models(scaled: bool, run: Run, tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(i), i, lora(use_rslora=scaled)) for i in range(3)]
    code, out, err = run("soup", *folders, "--rank", 6, "--out", "soup")
    assert code == 0, err
    assert "products of rank 2, 2, 2, written with rank 6: 0.00% from the exact merge" in out
    assert "PeftModel.from_pretrained(model" in out
    mean = torch.stack([outputs(folder) for folder in folders]).mean(0)
    torch.testing.assert_close(outputs(tmp_path / "soup"), mean)
    assert run("soup", *folders, "--out", "low")[0] == 0
    merged, lost = combine_adapters(Average(), [Adapter.read(folder) for folder in folders])
    written = Adapter.read(tmp_path / "low")
    assert all(torch.equal(written.weights[name], each) for name, each in merged.weights.items())
    assert 0.05 < lost < 1


@pytest.mark.parametrize("layer", [nn.Embedding(10, 4), nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3)])
def test_embeddings_and_convolutions_are_merged_too(layer: nn.Module, run: Run, tmp_path: Path) -> None:
    folders = []
    for seed in range(2):
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), lora(target_modules=["0"]))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        folders.append(tmp_path / str(seed))
        model.save_pretrained(folders[-1])
    assert run("soup", *folders, "--rank", 4, "--out", "soup")[0] == 0

    def weight(folder: Path) -> torch.Tensor:
        model: Any = peft.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(layer)), folder).merge_and_unload()
        return model[0].weight.detach()

    mean = (weight(folders[0]) + weight(folders[1])) / 2
    torch.testing.assert_close(weight(tmp_path / "soup"), mean, atol=1e-4, rtol=1e-4)


def test_adapters_of_different_rank_are_merged_to_one_that_is_named(run: Run, tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(rank), rank, lora(r=rank)) for rank in (1, 3)]
    code, _, err = run("soup", *folders, "--out", "soup")
    assert code == 2
    assert "its rank is 3, not 1; name the rank of the result" in err
    assert not (tmp_path / "soup").exists()
    assert run("soup", *folders, "--rank", 4, "--out", "soup")[0] == 0
    torch.testing.assert_close(outputs(tmp_path / "soup"), (outputs(folders[0]) + outputs(folders[1])) / 2)


def test_a_soup_of_ia3_is_the_mean_of_its_scalings(run: Run, tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(i), i, ia3()) for i in range(2)]
    assert run("soup", *folders, "--out", "soup")[0] == 0
    one, two, found = (Adapter.read(folder).weights for folder in (*folders, tmp_path / "soup"))
    for name in one:
        torch.testing.assert_close(found[name], (one[name] + two[name]) / 2)
    outputs(tmp_path / "soup")


@pytest.mark.parametrize("rule", ["model-stock", "iso-c", "tsv-m", "tall", "metagpt"])
def test_rules_of_task_vectors_need_no_base(rule: str, run: Run, tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(i), i, lora()) for i in range(2)]
    code, out, err = run("soup", *folders, "--rule", rule, "--out", "soup")
    assert code == 0, err
    assert f"{rule} of 2 adapters, 2 layers" in out
    assert torch.isfinite(outputs(tmp_path / "soup")).all()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--out", "soup.pt", "--rank", "2"], "`--out` must be a folder for adapters"),
        (["--out", "a"], "a is one of the inputs"),
        (["--out", "there"], "there exists already"),
        (["--out", "no/where"], "there is no folder no"),
        (["--out", "soup", "--rule", "greedy"], "`--rule` must be one of uniform"),
        (["--out", "soup", "--base", "a"], "`--base` must be left out"),
        (["--out", "soup", "--scale", "0.5"], "`--scale` must be left out"),
        (["--out", "soup", "--align"], "`--align` must be left out"),
        (["--out", "soup", "--rank", "0"], "`rank` must be"),
        (["plain.pt", "--out", "soup"], "plain.pt is none: merge adapters with adapters"),
    ],
)
def test_what_does_not_fit_is_named(arguments: list[str], part: str, run: Run, tmp_path: Path) -> None:
    saved(tmp_path / "a", 1, lora())
    (tmp_path / "there").mkdir()
    torch.save(network().state_dict(), tmp_path / "plain.pt")
    code, _, err = run("soup", "a", *arguments)
    assert code == 2
    assert part in err
    assert not (tmp_path / "soup").exists()


def test_a_rank_is_for_adapters(run: Run, tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "plain.pt")
    code, _, err = run("soup", "plain.pt", "--rank", 2, "--out", "soup.pt")
    assert code == 2
    assert "`--rank` must be left out" in err


@pytest.mark.parametrize(("text", "part"), [("{", "cannot be read"), ("[]", "no table of names"), (None, "it has no")])
def test_a_damaged_folder_is_named(text: str | None, part: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=part):
        Adapter.read(tmp_path)
