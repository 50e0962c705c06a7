"""Every policy with a branch in each of two processes, on modules like public ones: one model is published."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch
from test_policies_per_rank import CALLBACKS, TasksParts, validation
from tiny import batches, of, trainer
from torch import Tensor, nn

from lightning_merge.callbacks import BranchStrategy

pytestmark = pytest.mark.multiprocess


class Plain(TasksParts):
    def __init__(self) -> None:
        super().__init__(norm=True, lr=0.05)


class Unfreezes(Plain):
    """Its last layer trains from the fifth batch on."""

    def on_fit_start(self) -> None:
        self.net[2].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.net[2].requires_grad_(True)


class Loads(Plain):
    """Takes other weights when training starts."""

    def on_train_start(self) -> None:
        with torch.no_grad():
            self.net[0].weight.fill_(0.1)


class TiedByStorage(Plain):
    """A buffer is a view of a parameter's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(4, 8)
        self.twin.weight.data = self.net[0].weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.twin(x).mean(1, keepdim=True)


class Reassigns(Plain):
    """Assigns a buffer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen = self.seen + 1


class CountingSGD(torch.optim.SGD):
    """Counts its steps in its groups, and trains more slowly the more there were."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.05 / group["count"]
        return super().step(closure)


class Counts(Plain):
    def configure_optimizers(self) -> Any:
        return CountingSGD(self.parameters(), lr=0.05)


class TwoOptimizers(Plain):
    """Each of a part; the second steps half as often."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def calibration_step(self, batch: list[Tensor]) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[number].parameters(), self.lr, momentum=0.9) for number in (0, 2)]


SITUATIONS = {each.__name__: each for each in (Counts, Unfreezes, Loads, TiedByStorage, Reassigns, TwoOptimizers)}
POLICIES = {name: make for name, make in CALLBACKS.items() if name not in ("fedfisher", "own batches")}
"""Those that train with any optimizer, from one loader."""
AUTOMATIC = ("forkmerge", "greedy")
"""Policies that weight the losses which a step returns, and take no manual optimization."""
CHOSEN = {
    policy: [
        name
        for i, name in enumerate([*SITUATIONS, "second"])
        if i % 3 == number % 3 and (name != "TwoOptimizers" or policy not in AUTOMATIC)
    ]
    for number, policy in enumerate(POLICIES)
}
"""Two or three for each policy in turn; ``test_branch_conformance_per_rank.py`` has every policy in every situation."""


def one_fit(root: Path, kind: type, callback: Any) -> dict[str, Any]:
    module, best = of(kind)(), ModelCheckpoint(root, monitor="val/loss")
    strategy = BranchStrategy(process_group_backend="gloo")
    run = trainer(root, [callback, best], strategy=strategy, devices=2, max_epochs=1, use_distributed_sampler=False)
    run.fit(module, batches(8), validation())
    plain = of(kind)()
    plain.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    plain.eval()
    with torch.no_grad():
        losses = [(plain.loss(batch).item(), len(batch[0])) for batch in validation()]
    score = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    return {
        "recorded": float(best.best_model_score),
        "score": score,
        "model": [t.tolist() for t in module.state_dict().values()],
    }


def work(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for policy, make in POLICIES.items():
        for situation in CHOSEN[policy]:
            callback = make()
            if situation == "second":
                one_fit(root / policy / "first", Loads, callback)
            kind = SITUATIONS.get(situation, Plain)
            found[f"{policy}, {situation}"] = one_fit(root / policy / situation, kind, callback)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return launch(2, work, tmp_path_factory.mktemp("conformance"))


@pytest.mark.parametrize(("policy", "situation"), [(policy, each) for policy in CHOSEN for each in CHOSEN[policy]])
def test_one_model_is_measured_saved_and_published(policy: str, situation: str, found: list[dict[str, Any]]) -> None:
    first, second = (each[f"{policy}, {situation}"] for each in found)
    assert first["recorded"] == pytest.approx(first["score"], rel=1e-4)
    assert first["model"] == second["model"]
