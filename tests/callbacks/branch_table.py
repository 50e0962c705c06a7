"""Every policy of branches, and pairs of modules that must train alike under it: an awkward one and a plain one.

The awkward one does what modules of other people do; the plain one comes to the same by ordinary means.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from tiny import trainer
from torch import Tensor, nn

from lightning_merge.branches import (
    Average,
    BestMix,
    Combine,
    FedAtt,
    Nova,
    OuterStep,
    Pairs,
    Policy,
    PullToMean,
    Shuffle,
    SoftmaxOfScores,
    StreamingOuterStep,
    WeightedAverage,
)
from lightning_merge.callbacks import Branching
from lightning_merge.combiners import SLERP
from lightning_merge.schedules import EveryNSteps

POLICIES: dict[str, Callable[[], Policy]] = {
    "average": Average,
    "best mix": BestMix,
    "combine": lambda: Combine(SLERP(scale=0.5)),
    "fedatt": lambda: FedAtt(step=0.9),
    "nova": Nova,
    "outer step": lambda: OuterStep(lr=0.7, momentum=0.5),
    "pairs": Pairs,
    "pull": lambda: PullToMean(0.3),
    "shuffle": lambda: Shuffle(share=0.5),
    "softmax of scores": SoftmaxOfScores,
    "streaming outer step": lambda: StreamingOuterStep(1, 0, 0.7, 8, lr=0.7, momentum=0.5),
    "streaming, two steps later": lambda: StreamingOuterStep(2, 2, 0.7, 8, lr=0.7, momentum=0.5),
    "weighted average": lambda: WeightedAverage((1.0, 3.0)),
}

DATA = torch.randn(10, 4, 3, generator=torch.Generator().manual_seed(5))
VIEWS: list[Any] = [lambda batch: batch, lambda batch: 2 - batch]


def score(module: Any, batch: Tensor) -> tuple[Tensor, int]:
    return -module.loss(batch), len(batch)


class Plain(LightningModule):
    """Two layers and a buffer; the first layer trains from the fifth batch on, if it trains late."""

    late = False

    def __init__(self) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(7)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=numbers) / 2

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.first(batch)
        if self.late and self.global_step < 4:
            hidden = hidden.detach()
        return (self.last(hidden.tanh()) - 1).square().sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.see(batch)
        return self.loss(batch)

    def see(self, batch: Tensor) -> None:
        self.seen.add_(batch.mean((0, 1))).mul_(0.5)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Late(Plain):
    late = True


class Unfreezes(Plain):
    """By its own hook, which comes after those of callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.global_step == 4:
            self.first.requires_grad_(True)


class UnfreezesInItsStep(Plain):
    """Between the hooks and the step of the optimizer, which Lightning calls with the training step in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == 4:
            self.first.requires_grad_(True)
        return super().training_step(batch, batch_idx)


def other_weights() -> dict[str, Tensor]:
    return {name: tensor * 2 + 0.1 for name, tensor in Plain().state_dict().items()}


class Loaded(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(other_weights())


class LoadsLate(Plain):
    def on_train_start(self) -> None:
        self.load_state_dict(other_weights())


class ByHand(Plain):
    """One optimizer that steps at every batch, with two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(each.parameters())} for each in (self.last, self.first)]
        return torch.optim.SGD(groups, 0.01, momentum=0.9)


class TwoOptimizers(ByHand):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), 0.01, momentum=0.9) for each in (self.last, self.first)]


class Tied(Plain):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = self.first.weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class TiedByStorage(Plain):
    """Two parameters over the same numbers, each stepped by its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight.data = self.first.weight.data

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class TiesByStorageLate(Plain):
    """By its own hook, after the branches were made."""

    def on_train_start(self) -> None:
        self.last.weight.data = self.first.weight.data

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Reassigns(Plain):
    def see(self, batch: Tensor) -> None:
        self.seen = (self.seen + batch.mean((0, 1))) * 0.5


class Slowing(torch.optim.Optimizer):
    """Steps of ``lr / k``; the count is in the state of each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    def count(self, group: dict[str, Any], parameter: Tensor) -> int:
        state = self.state[parameter]
        state["k"] = state.get("k", 0) + 1
        return int(state["k"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            self.begin(group)
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * group["lr"] / self.count(group, parameter))
        return loss

    def begin(self, group: dict[str, Any]) -> None: ...


class CountsInGroup(Slowing):
    """The count is in the parameter group, as apex and schedule-free optimizers have it."""

    def begin(self, group: dict[str, Any]) -> None:
        group["k"] = group.get("k", 0) + 1

    def count(self, group: dict[str, Any], parameter: Tensor) -> int:
        return int(group["k"])


class Slows(Plain):
    def configure_optimizers(self) -> Any:
        return Slowing(self.parameters())


class SlowsByGroup(Plain):
    def configure_optimizers(self) -> Any:
        return CountsInGroup(self.parameters())


SITUATIONS: dict[str, tuple[type[Plain], type[Plain]]] = {
    "unfreezing in mid-run": (Unfreezes, Late),
    "unfreezing in a step": (UnfreezesInItsStep, Late),
    "weights loaded in a start hook": (LoadsLate, Loaded),
    "two optimizers": (TwoOptimizers, ByHand),
    "tied storage": (TiedByStorage, Tied),
    "tied storage in a start hook": (TiesByStorageLate, Tied),
    "reassigned buffer": (Reassigns, Plain),
    "optimizer that counts in its group": (SlowsByGroup, Slows),
    "second fit with another module": (Plain, Plain),
}
"""Each: the awkward module, and the plain one that trains alike."""

PAIRS = [(policy, situation) for policy in POLICIES for situation in SITUATIONS]
# Which numbers are shuffled, and which fragments there are, depends on how many layers are branched.
for situation in ("unfreezing in mid-run", "unfreezing in a step"):
    PAIRS.remove(("shuffle", situation))
    PAIRS.remove(("streaming, two steps later", situation))


_PLAIN: dict[Any, dict[str, Tensor]] = {}
"""What comes of a plain module, once for all that are compared with it."""


def branching(policy: str, **settings: Any) -> Branching:
    made = POLICIES[policy]()
    return Branching(
        made,
        EveryNSteps(3),
        2,
        score=score if made.needs_score else None,
        augmentations=VIEWS,
        **{"buffers": "average", **settings},
    )


def outcome(
    module: Plain, callback: Branching, root: Path, data: Any = None, make: Any = None, **settings: Any
) -> dict[str, Tensor]:
    """What is published and what is raw after a fit, by the strategy that ``make`` makes."""
    run = trainer(root, [callback], max_epochs=2, **settings, **({} if make is None else {"strategy": make()}))
    run.fit(module, batches(DATA[:5] if data is None else data), batches(DATA[8:]))
    published = {f"published {name}": tensor for name, tensor in module.state_dict().items()}
    return published | {f"raw {name}": tensor for name, tensor in callback.raw_weights().items()}


def batches(data: Tensor) -> Any:
    return torch.utils.data.DataLoader(list(data), batch_size=None)


def pair(policy: str, situation: str, root: Path, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What comes of the awkward module, and of the plain one."""
    awkward, plain = SITUATIONS[situation]
    callback = branching(policy)
    if situation.startswith("second fit"):
        outcome(Loaded(), callback, root, DATA[5:8], **settings)
    found = outcome(awkward(), callback, root, **settings)
    if (key := (policy, plain, "make" in settings)) not in _PLAIN:
        _PLAIN[key] = outcome(plain(), branching(policy), root, **settings)
    return found, _PLAIN[key]


def differences(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> list[str]:
    """Names of what is not alike."""
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or not torch.allclose(found[name], expected[name], atol=tolerance)
    ]
