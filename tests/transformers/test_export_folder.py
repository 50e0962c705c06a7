"""``lightning-merge export --hf``: a set of a Lightning checkpoint in a folder that ``from_pretrained`` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_merge.callbacks import EMA
from lightning_merge.selections import Selection

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402

from lightning_merge.rules import ExponentialMean  # noqa: E402
from lightning_merge.transformers import MergeCallback  # noqa: E402

TOKENS = torch.randint(16, (8, 6), generator=torch.Generator().manual_seed(0))


def model() -> Any:
    torch.manual_seed(0)
    size = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 16, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=1))


def adapted() -> Any:
    settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]}
    return peft.get_peft_model(model(), peft.LoraConfig(**settings, task_type="CAUSAL_LM"))


class Tuned(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def fit(net: nn.Module, root: Path) -> EMA:
    average = EMA(decay=0.5, selection=Selection(trainable=True))
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[average],
        accelerator="cpu",
        logger=False,
        default_root_dir=root,
        enable_progress_bar=False,
    )
    trainer.fit(Tuned(net), torch.utils.data.DataLoader(TOKENS, batch_size=2))
    return average


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network.eval()(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("of_adapter", [False, True])
def test_from_pretrained_reads_the_merged_weights(
    of_adapter: bool, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (adapted() if of_adapter else model()).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    net = adapted() if of_adapter else model()
    average = fit(net, tmp_path)  # whose net holds the merged weights now
    code, _, complaint = run("export", average.final_path, "out", "--hf", "base")
    assert code == 2
    assert complaint.rstrip().endswith("--strip net.")
    assert not (tmp_path / "out").exists()
    code, printed, complaint = run("export", average.final_path, "out", "--hf", "base", "--strip", "net.")
    assert code == 0, complaint
    assert "PeftModel.from_pretrained(" in printed if of_adapter else "GPT2LMHeadModel.from_pretrained(" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer_config.json" in names
    assert ("adapter_model.safetensors" in names) == of_adapter
    if of_adapter:
        loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "out")
    else:
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(net))
    assert not torch.equal(logits(loaded), logits(model()))
    code, printed, _ = run("inspect", "out")
    assert code == 0
    assert "from_pretrained(" in printed


def test_what_cannot_be_exported_is_said(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model().save_pretrained(tmp_path / "base")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    cases = [
        (("other.pt", "out", "--hf", "empty"), "is not a folder that `save_pretrained` wrote"),
        (("other.pt", "base", "--hf", "base", "--force"), "--force writes into one, but not base"),
        (("other.pt", "base", "--hf", "base"), "is a folder that holds something already"),
        (("other.pt", "other.pt", "--hf", "base"), "the output must be a folder"),
        (("other.pt", "out", "--hf", "base"), "is missing"),
        (("other.pt", "out", "--hf", "base", "--timm", "resnet18"), "not both"),
    ]
    for arguments, words in cases:
        code, _, complaint = run("export", *arguments)
        assert code == 2, arguments
        assert words in " ".join(complaint.split()), arguments
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_transformers_says_what_it_holds(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = {
        "num_train_epochs": 1,
        "save_strategy": "epoch",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    for only in (False, True):
        folder = tmp_path / str(only)
        settings = TrainingArguments(str(folder), **arguments, save_only_model=only)
        Trainer(model(), settings, train_dataset=rows, callbacks=[MergeCallback(ExponentialMean(0.5))]).train()
        (checkpoint,) = folder.glob("checkpoint-*")
        code, printed, _ = run("inspect", checkpoint)
        assert code == 0
        assert "GPT2LMHeadModel.from_pretrained(" in printed
        words = "holds merged weights alone" if only else "holds merged weights; lightning_merge.pt has the raw ones"
        assert words in printed
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
