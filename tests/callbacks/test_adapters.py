"""Adapters of ``"lora-arithmetic"``: on the layers that are merged and no others, in effect, and off after the fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stream_modules import Base, Encoder, Task, rows, sentences
from tiny import trainer, values
from torch import Tensor, nn

from lightning_merge.callbacks import ContinualMerging
from lightning_merge.selections import Selection


class OfOneName(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux, self.head = nn.Linear(4, 8), nn.ModuleDict({"fc": nn.Linear(4, 8)}), nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head((self.fc(inputs) + self.aux["fc"](inputs)).relu())


class Reads(OfOneName):
    """Uses the weight of a layer without calling it."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head((nn.functional.linear(inputs, self.fc.weight) + self.aux["fc"](inputs)).relu())


class Ties(OfOneName):
    def __init__(self) -> None:
        super().__init__()
        self.aux["fc"].weight = self.fc.weight


def fit(root: Path, module: Any, **settings: Any) -> ContinualMerging:
    cl = ContinualMerging("lora-arithmetic", root / "bank", lora_rank=2, **settings)
    trainer(root, [cl], max_epochs=1).fit(module, datamodule=Task(rows, None, (0, 1)))
    return cl


def test_a_layer_that_ends_alike_gets_no_adapter(tmp_path: Path) -> None:
    module = OfOneName()
    before = values(module)
    cl = fit(tmp_path, module, selection=Selection(exclude=("aux.*",), trainable=True, buffers="recompute"))
    assert set(module.state_dict()) == set(before)
    assert list(cl.merged_vector() or {}) == ["fc.weight"]
    assert torch.equal(module.aux["fc"].weight, before["aux.fc.weight"])


@pytest.mark.parametrize(
    ("make", "message"),
    [(Reads, r"the adapter of `fc\.weight` does nothing"), (Ties, r"`fc\.weight` is `aux\.fc\.weight` too")],
)
def test_an_adapter_that_would_do_nothing_is_refused_before_a_step(make: Any, message: str, tmp_path: Path) -> None:
    module = make()
    before = values(module)
    with pytest.raises(ValueError, match=message + r".*Selection\(exclude=\['fc\.weight'\]"):
        fit(tmp_path, module)
    assert module.steps == 0
    assert set(module.state_dict()) == set(before)
    fit(
        tmp_path, module, selection=Selection(exclude=("fc.weight",), trainable=True, buffers="recompute")
    ) if make is Reads else None


def test_validation_sees_the_adapters_of_transformer_layers(tmp_path: Path) -> None:
    """In eval mode torch hands their weights to one operation, past what calling the layers would do."""

    class Compares(Encoder):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            in_eval = self.loss(batch)
            self.train()
            self.gaps.append(float((in_eval - self.loss(batch)).abs()))
            self.eval()

    module: Any = Compares()
    module.gaps = []
    cl = ContinualMerging("lora-arithmetic", tmp_path / "bank", lora_rank=2)
    data: Any = Task(sentences, None, (0, 1))
    data.val_dataloader = data.train_dataloader
    trainer(tmp_path, [cl], max_epochs=2).fit(module, datamodule=data)
    assert len(module.gaps) >= 2
    assert max(module.gaps) < 1e-6
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any("out_proj" in name for name in cl.merged_vector() or {})
