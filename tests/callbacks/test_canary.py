"""The check at the first exchange of weights: it catches modules for which an exchange does nothing, or too much."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Net, batches, differing, trainer, validation, values
from torch import Tensor, nn

from lightning_merge.callbacks import EMA


class Frozen(nn.Module):
    """Uses the weights it had at its first evaluation from then on, as a compiler that freezes them does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.frozen: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.inner(x)
        if self.frozen is None:
            self.frozen = values(self.inner)
        return torch.func.functional_call(self.inner, self.frozen, (x,))


def test_weights_that_are_frozen_in_a_graph_are_noticed(tmp_path: Path) -> None:
    module = Net()
    module.net = Frozen(module.net)
    with pytest.raises(RuntimeError, match=r"weights of `net` differ by .* but its output is the same"):
        trainer(tmp_path, [EMA(decay=0.9)], max_epochs=3).fit(module, batches(8), validation())


@pytest.mark.parametrize("kind", ["merged", "raw"])
def test_a_validation_that_writes_to_weights_is_noticed(kind: str, tmp_path: Path) -> None:
    ema = EMA(decay=0.9)

    class Writing(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            weight = self.net[0].weight.data if kind == "merged" else ema.raw_weights()["net.0.weight"]
            weight.mul_(2)

    with pytest.raises(RuntimeError, match=f"the {kind} weights after validation are not those before it"):
        trainer(tmp_path, [ema], max_epochs=1).fit(Writing(), batches(), validation())


def test_the_canary_leaves_the_metrics_as_they_are(tmp_path: Path) -> None:
    found = []
    for repeats in (1, 2):  # the canary has sung by the second validation
        ema, module = EMA(decay=0.9), Net(norm=True)
        run = trainer(tmp_path, [ema], max_epochs=1, val_check_interval=1 / repeats)
        run.fit(module, batches(4), validation())
        found.append((run.callback_metrics["val/loss"].item(), values(ema.raw_weights())))
    assert found[0][0] == found[1][0]
    assert not differing(found[0][1], found[1][1])
