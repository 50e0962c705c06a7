"""Twenty-one things that can be wrong with a merge, and twenty healthy runs, on real digits with plain torch."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_merge.calibration import recalibrated_statistics
from lightning_merge.diagnostics import Examination, examine, mean
from lightning_merge.importance import Statistics
from lightning_merge.rules import ExponentialMean

Weights = dict[str, Tensor]


@dataclass
class Case:
    """What a doctor is shown, and the verdict that is right."""

    name: str
    expected: str
    candidates: dict[str, Weights]
    base: Weights | None = None
    net: str | None = None  # measures losses with this kind of network; None: weights alone
    initial_shares: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)

    def examine(self) -> Examination:
        loss = None if self.net is None else lambda weights: loss_of(self.net, weights)
        measure = None if self.net is None else lambda weights: statistics_of(self.net, weights)
        return examine(
            self.candidates,
            self.base,
            loss=loss,
            measure_statistics=measure,
            initial_shares=self.initial_shares,
            statistics=self.statistics,
        )


# ---- networks and data


def network(kind: str, seed: int) -> nn.Sequential:
    """``norm``: convolutions with BatchNorm; ``plain``: a perceptron; ``layer``: one with LayerNorm."""
    torch.manual_seed(seed)
    if kind == "norm":
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
    norm = nn.LayerNorm(64) if kind == "layer" else nn.Identity()
    return nn.Sequential(nn.Linear(64, 64), norm, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return x[train], y[train], x[test], y[test]


def weights_of(net: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def loss_of(kind: str, weights: Weights) -> float:
    net = network(kind, 0)
    net.load_state_dict(weights)
    net.eval()
    with torch.no_grad():
        return float(cross_entropy(net(data()[2]), data()[3]))


def statistics_of(kind: str, weights: Weights) -> Weights:
    net = network(kind, 0)
    net.load_state_dict(weights)
    return recalibrated_statistics(net, list(data()[0].split(100)), net)


def train(
    kind: str,
    seed: int,
    epochs: int = 12,
    lr: float = 0.05,
    start: Weights | None = None,
    anneal: bool = False,
    classes: range = range(10),
    adam: bool = False,
    average: float | None = None,
) -> tuple[list[Weights], Any]:
    """The weights at the end of every epoch, and an exponential mean of every step with its state."""
    net = network(kind, seed)
    if start is not None:
        net.load_state_dict(start)
    torch.manual_seed(1000 + seed)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(net.parameters(), lr) if adam else torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    )
    x, y, _, _ = data()
    kept = torch.isin(y, torch.tensor(list(classes)))
    x, y = x[kept], y[kept]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rule = ExponentialMean(average) if average else None
    state = rule.init(weights_of(net)) if rule else None
    path = []
    for _ in range(epochs):
        net.train()
        for batch in torch.randperm(len(x)).split(32):
            if len(batch) < 2:
                continue
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            if rule and state is not None:
                rule.update(state, weights_of(net))
        if anneal:
            schedule.step()
        path.append(weights_of(net))
    return path, (rule, state)


@cache
def trained(kind: str, seed: int) -> Any:
    return train(kind, seed)[0]


def permuted(weights: Weights) -> Weights:
    """The same function of the perceptron, with the units of both hidden layers in another order."""
    found = deepcopy(weights)
    for layer, following in (("0", "3"), ("3", "5")):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(7))
        for part in ("weight", "bias"):
            found[f"{layer}.{part}"] = found[f"{layer}.{part}"][order]
        found[f"{following}.weight"] = found[f"{following}.weight"][:, order]
    return found


def with_statistics(weights: Weights, change: Callable[[str, Tensor], Tensor]) -> Weights:
    return {name: change(name, t) if "running" in name else t for name, t in weights.items()}


def spoiled(weights: Weights, name: str, value: float) -> Weights:
    found = deepcopy(weights)
    found[name].view(-1)[0] = value
    return found


def importance(weights: Weights) -> Statistics:
    """Squared gradients that were measured on these weights, as far as one can tell."""
    net = network("plain", 0)
    net.load_state_dict(weights)
    return Statistics.of(net, "fisher", {name: torch.ones_like(p) for name, p in net.named_parameters()})


def numbered(path: list[Weights]) -> dict[str, Weights]:
    return {f"snapshot {index}": weights for index, weights in enumerate(path)}


# ---- what is wrong


def constructed() -> list[Case]:
    plain, other, norm, norm2 = (trained(k, s) for k, s in (("plain", 0), ("plain", 1), ("norm", 0), ("norm", 1)))
    start = weights_of(network("plain", 0))
    fast = [train("plain", seed, start=start, lr=0.2, epochs=15)[0][-1] for seed in (11, 12)]
    tuned = [train("plain", seed, start=plain[-1], lr=0.01, epochs=2)[0][-1] for seed in (21, 22)]
    stale = mean(norm[-4:])
    noise = {f"network {seed}": weights_of(network("plain", seed)) for seed in range(3)}
    path, (rule, state) = train("plain", 5, epochs=3, average=0.995)
    slow = {"raw": path[-1], "average": rule.result(state)}
    return [
        Case("two seeds", "barrier", {"a": plain[-1], "b": other[-1]}, net="plain"),
        Case("two seeds with BatchNorm", "barrier", {"a": norm[-1], "b": norm2[-1]}, net="norm"),
        Case(
            "a network and itself in another order", "barrier", {"a": plain[-1], "b": permuted(plain[-1])}, net="plain"
        ),
        Case("one start, high rate, two orders of the data", "barrier", {"a": fast[0], "b": fast[1]}, net="plain"),
        Case("an outsider", "barrier", {"a": plain[-2], "b": plain[-1], "c": other[-1]}, net="plain"),
        Case("statistics never measured", "stale statistics", {"a": norm[-1] | initial_statistics()}),
        Case(
            "means and variances three times too large",
            "stale statistics",
            {"mean": with_statistics(stale, lambda _, t: t * 3)},
            net="norm",
        ),
        Case(
            "variances ten times too large",
            "stale statistics",
            {"mean": with_statistics(stale, lambda name, t: t * 10 if "var" in name else t)},
            net="norm",
        ),
        Case(
            "statistics of another network",
            "stale statistics",
            {"mean": with_statistics(stale, lambda name, _: norm2[-1][name])},
            net="norm",
        ),
        Case("base of another seed", "wrong base", {"a": tuned[0], "b": tuned[1]}, base=other[-1]),
        Case("base that was never trained", "wrong base", {"a": tuned[0]}, base=weights_of(network("plain", 9))),
        Case("base in another order", "wrong base", {"a": tuned[0], "b": tuned[1]}, base=permuted(plain[-1])),
        Case(
            "statistics of the base",
            "statistics",
            {"a": tuned[0], "b": tuned[1]},
            base=plain[-1],
            statistics={"a": importance(tuned[0]), "b": importance(plain[-1])},
        ),
        Case("NaN in a bias", "not finite", {"a": plain[-1], "b": spoiled(plain[-2], "5.bias", float("nan"))}),
        Case(
            "infinite statistics", "not finite", {"a": spoiled(norm[-1], "2.running_var", float("inf")), "b": norm[-2]}
        ),
        Case("NaN in the base", "not finite", {"a": tuned[0]}, base=spoiled(plain[-1], "0.weight", float("nan"))),
        Case("one file twice", "identical", {"a": plain[-1], "b": deepcopy(plain[-1])}, net="plain"),
        Case("one of three twice", "identical", {"a": norm[-1], "b": norm[-2], "c": deepcopy(norm[-1])}, net="norm"),
        Case("untrained networks", "unrelated", noise),
        Case("untrained networks, measured", "unrelated", noise, net="plain"),
        Case("half-life as long as the run", "start", slow, initial_shares={"average": rule.initial_share(state)}),
    ]


def initial_statistics() -> Weights:
    return {name: t for name, t in network("norm", 0).state_dict().items() if "running" in name}


# ---- what is well


def healthy() -> list[Case]:
    cases = []
    for seed in range(4):
        path, _ = train("norm", 30 + seed)
        cases.append(Case(f"ends of late epochs, BatchNorm, seed {seed}", "merge", numbered(path[-5:]), net="norm"))
        path, (rule, state) = train("plain", 40 + seed, average=0.98)
        sets = {"raw": path[-1], "average": rule.result(state)}
        shares = {"average": rule.initial_share(state)}
        cases.append(Case(f"raw and average, seed {seed}", "merge", sets, net="plain", initial_shares=shares))
        path, _ = train("norm", 50 + seed, anneal=True)
        cases.append(Case(f"ends of annealed epochs, seed {seed}", "merge", numbered(path[-4:]), net="norm"))
        path, _ = train("layer", 60 + seed, lr=3e-3, adam=True)
        cases.append(
            Case(f"ends of epochs, LayerNorm and Adam, seed {seed}", "merge", numbered(path[-5:]), net="layer")
        )
        base = trained("plain", seed % 2)[-1]
        halves = {
            f"classes from {low}": train("plain", 70 + seed, 2, 0.01, base, classes=range(low, low + 5))[0][-1]
            for low in (0, 5)
        }
        cases.append(Case(f"task vectors of two halves, seed {seed}", "merge", halves, base=base))
    return cases
