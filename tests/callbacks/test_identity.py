"""Which tensor, which key, which score: what every callback that publishes keeps to on modules that are not plain."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from methods import PUBLISHING, averages
from tiny import batches, read, trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_merge import callbacks as merging
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


class Awkward(pl.LightningModule):
    """A regression whose score is the loss of its weights, and a loss per task where asked."""

    def __init__(self, tasks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.tasks = tasks
        self.related: list[set[tuple[str, str]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum(1, keepdim=True)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        return {"losses": {"sum": loss, "size": 0.1 * loss}} if self.tasks else loss

    def score_step(self, batch: list[Tensor]) -> tuple[Tensor, int]:
        return -self.loss(batch), 1

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.related.append(relation(self))
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OwnStateDict(Awkward):
    """Gives the inner network's names without their prefix."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.net.state_dict()

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return self.net.load_state_dict(state_dict)


class TiedByStorage(Awkward):
    """Two parameters over one storage, one of them transposed, and a buffer over a third."""

    def __init__(self, tasks: bool = False) -> None:
        super().__init__(tasks)
        self.net[2].weight = nn.Parameter(self.net[0].weight.detach().t(), requires_grad=False)
        self.register_buffer("seen", self.net[0].bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) + self.seen).sum(1, keepdim=True)


class BufferAssignedAnew(Awkward):
    """A statistic that is a new tensor after each step, and a mask with infinities."""

    def __init__(self, tasks: bool = False) -> None:
        super().__init__(tasks)
        self.register_buffer("center", torch.zeros(1))
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        attention = torch.softmax(self.mask, dim=-1)
        return (self.net(x @ attention) - self.center).sum(1, keepdim=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.center = 0.9 * self.center + 0.1 * self.net(batch[0]).detach().mean()
        return super().training_step(batch, batch_idx)


class Parametrised(Awkward):
    """Weights that are computed from others: by weight norm, and by spectral norm with its vectors in buffers."""

    def __init__(self, tasks: bool = False) -> None:
        super().__init__(tasks)
        parametrizations.weight_norm(self.net[0])
        parametrizations.spectral_norm(self.net[2])


class Complex(Awkward):
    """A parameter of complex numbers."""

    def __init__(self, tasks: bool = False) -> None:
        super().__init__(tasks)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * self.phase).real).sum(1, keepdim=True)


MODULES = [OwnStateDict, TiedByStorage, BufferAssignedAnew, Parametrised, Complex]
TRIED = {name: make for name, make in PUBLISHING.items() if name != "ondare"}
TRIED["weight-merging"] = lambda: [  # of a part that these modules have
    merging.WeightMerging(Mean(), EveryNSteps(2), Selection(include=("net.0.*",), buffers="copy"))
]
REFUSED = {
    ("warp", Complex): "`phase` of the branches holds complex",
    ("branching", Complex): "`phase` of the branches",
    ("twa", Complex): "`phase` holds complex numbers",
    ("twa-before-its-stage", Complex): "`phase` holds complex numbers",
}
"""What says at the start of a fit that it cannot be."""


@pytest.fixture(autouse=True)
def _torch_repeats_its_warnings() -> Iterator[None]:
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def relation(module: nn.Module) -> set[tuple[str, str]]:
    """Pairs of names whose tensors share memory."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    spans = {
        name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
        for name, t in tensors
        if t.is_contiguous() or t.t().is_contiguous()
    }
    return {
        (a, b)
        for a, b in combinations(sorted(spans), 2)
        if max(spans[a][0], spans[b][0]) < min(spans[a][1], spans[b][1])
    }


def fitted(kind: type[Awkward], method: str, root: Path) -> tuple[Awkward, ModelCheckpoint] | None:
    """A run's module and its file of the best score; none if it was to be refused, and was."""
    module, best = kind(tasks=method == "forkmerge"), ModelCheckpoint(root, monitor="val/loss", save_top_k=1)
    callbacks = TRIED[method]()
    run = trainer(root, [*callbacks, best], max_epochs=3, limit_train_batches=3)
    refusal = REFUSED.get((method, kind))
    with pytest.raises(ValueError, match=refusal) if refusal else nullcontext():
        run.fit(module, batches(3), batches(2, size=8, seed=2))
    if refusal is not None:
        assert run.global_step == 0
        return None
    assert all(average.ready for average in averages(callbacks))
    return module, best


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", TRIED)
def test_a_file_scores_what_was_recorded_under_the_modules_own_keys_and_ties_stay(
    kind: type[Awkward], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    untouched = kind()
    if (found := fitted(kind, method, tmp_path)) is None:
        return
    module, best = found

    assert relation(module) == relation(untouched)
    assert all(related == relation(untouched) for related in module.related)
    file = read(best.best_model_path)
    assert file["state_dict"].keys() == untouched.state_dict().keys()
    assert "left_out" not in file["lightning_merge"]

    plain = kind()
    plain.load_state_dict(file["state_dict"])
    plain.eval()
    with torch.no_grad():
        found = torch.stack([plain.loss(batch) for batch in batches(2, size=8, seed=2)]).mean().item()
    assert found == pytest.approx(float(best.best_model_score), rel=1e-5)


class FrozenBackbone(Awkward):
    """A first layer that is not trained, and one of its weights under a second name."""

    def __init__(self, tasks: bool = False) -> None:
        super().__init__(tasks)
        self.net[0].requires_grad_(False)
        self.first = self.net[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("method", sorted(TRIED.keys() - {"weight-merging"}))  # whose selection leaves parameters out
def test_a_plain_module_takes_the_sets_whatever_is_frozen(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, callbacks = FrozenBackbone(tasks=method == "forkmerge"), TRIED[method]()
    trainer(tmp_path, callbacks, max_epochs=3, limit_train_batches=3).fit(module, batches(3), batches(2))
    for average in averages(callbacks):
        for weights in (average.raw_weights(), average.merged_weights()):
            FrozenBackbone().load_state_dict(weights)
            assert torch.equal(weights["first.weight"], FrozenBackbone().net[0].weight)
