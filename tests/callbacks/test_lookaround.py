"""Lookaround through a real Trainer: the published oracle, independent replicas, and what is measured and saved."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.callbacks import Lookaround

# LA-1: three quadratic losses, one per branch; the batch is the number of the branch.
CURVATURES = torch.tensor([(1, 2, 0.5), (0.5, 1, 2), (2, 0.5, 1)], dtype=torch.float64)
CENTRES = torch.tensor([(0, 0, 0), (1, 1, 1), (-1, 2, 0)], dtype=torch.float64)


class Quadratics(pl.LightningModule):
    """One weight vector; remembers what each training step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
        self.seen: list[tuple[int, float, list[float]]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        branch = int(batch)
        loss = 0.5 * (CURVATURES[branch] * (self.w - CENTRES[branch]).square()).sum()
        self.seen.append((branch, loss.item(), self.w.tolist()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


LA_1_LOSSES = [6.75, 8.5, 12.5, 4.995625, 6.205, 9.815]
LA_1_LOSSES += [2.7476487847, 3.8881340278, 7.3630559028, 1.0214221914, 1.2534569444, 3.3243048715]
LA_1_WEIGHTS = [(1, -2, 3)] * 3 + [(0.9, -1.6, 2.85), (1.0, -1.7, 2.6), (0.6, -1.8, 2.7)]
LA_1_WEIGHTS += [(0.5466666667, -1.17, 2.2175)] * 3
LA_1_WEIGHTS += [(0.33, -0.324, 1.856875), (0.5693333333, -0.467, 1.362), (-0.3746666667, -0.6785, 1.50975)]
LA_1_MOMENTA = [
    (2.28, -8.262, 4.1740625),
    (-0.4193333333, -7.794, 8.4235),
    (9.5426666667, -5.76275, 7.8795),
]


@pytest.mark.parametrize("feeding", ["same", "turns"])
def test_quadratics_follow_the_published_run(feeding: Any, tmp_path: Path) -> None:
    choose = [lambda batch, branch=branch: torch.tensor(branch) for branch in range(3)]
    lookaround = Lookaround(3, 2, choose if feeding == "same" else None, batches=feeding)
    module = Quadratics()
    loader = DataLoader([torch.tensor(0)] * 4 if feeding == "same" else list(map(torch.tensor, [0, 1, 2] * 4)), None)
    run = trainer(tmp_path, [lookaround], max_epochs=1, precision="64-true")
    momenta: list[Any] = []

    class Reading(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            for branch in range(3):
                lookaround._running.branches.activate(branch)
                momenta.append(run.optimizers[0].state[module.w]["momentum_buffer"].tolist())

    run.callbacks.insert(0, Reading())
    run.fit(module, loader)
    assert [branch for branch, _, _ in module.seen] == [0, 1, 2] * 4
    assert [loss for _, loss, _ in module.seen] == pytest.approx(LA_1_LOSSES, abs=1e-10)
    for (_, _, seen), expected in zip(module.seen, LA_1_WEIGHTS, strict=True):
        assert seen == pytest.approx(expected, abs=1e-10)
    assert module.w.tolist() == pytest.approx([-0.2052222222, 0.2374583333, 0.8936395833], abs=1e-10)
    for found, expected in zip(momenta, LA_1_MOMENTA, strict=True):
        assert found == pytest.approx(expected, abs=1e-10)
    assert (lookaround.groups, lookaround.merges, lookaround.steps) == (4, 2, 12)
    assert run.global_step == (4 if feeding == "same" else 12)


class Tanh(pl.LightningModule):
    """LA-2: a two-layer network; the batch is (branch, group)."""

    def __init__(self, nesterov: bool = False) -> None:
        super().__init__()
        first, second = nn.Linear(2, 3), nn.Linear(3, 1)
        with torch.no_grad():
            first.weight.copy_(torch.tensor([[0.5 * math.sin(1 + 3 * i + j) for j in range(2)] for i in range(3)]))
            first.bias.copy_(torch.tensor([0.1, -0.1, 0.05]))
            second.weight.copy_(torch.tensor([[0.5 * math.cos(1 + i) for i in range(3)]]))
            second.bias.zero_()
        self.net = nn.Sequential(first, nn.Tanh(), second)
        self.nesterov = nesterov
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        r, t = (float(number) for number in batch)
        n = torch.arange(4, dtype=torch.float64)
        x = torch.stack([torch.sin(0.7 * (t + 1) + n + 0.3 * r), torch.cos(0.4 * (t + 1) - n + 0.5 * r)], dim=1)
        loss = (self.net(x)[:, 0] - (0.5 * x[:, 0] - 0.25 * x[:, 1] + 0.1 * r)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=self.nesterov)

    def flat(self) -> list[float]:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters()]).tolist()


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


LA_2 = {
    "k 2, two groups": (2, 2, False, numbers(
        "0.4446993233 0.4573925248 -0.3974274616 -0.4816955110 0.2838652364 0.4868696335 0.1021987692 -0.1019241681"
        " 0.0413178801 0.3281007411 -0.2626487805 -0.4458550669 0.0352642799"
    )),
    "k 2, four groups": (2, 4, False, numbers(
        "0.5185314293 0.4145960221 -0.4562136342 -0.4480553828 0.1732196307 0.5374148253 0.0591092655 -0.0682167949"
        " 0.0911841828 0.3778698954 -0.2982971587 -0.4292986483 -0.0732721566"
    )),
    "nesterov": (2, 4, True, numbers(
        "0.5515872197 0.3865617126 -0.4833450447 -0.4255593965 0.1400921492 0.5615764350 0.0366776901 -0.0501273653"
        " 0.1091334904 0.3885135927 -0.3019773152 -0.4456888633 -0.1259989923"
    )),
    "k 5": (5, 5, False, numbers(
        "0.5592581282 0.3831034296 -0.4886536040 -0.4231908104 0.1162423146 0.5728938138 0.0327597929 -0.0475290866"
        " 0.1204987129 0.3935710645 -0.3054828833 -0.4360750749 -0.1385724612"
    )),
}  # fmt: skip
LA_2_LOSSES = numbers(
    ".03059785 .05889925 .13562909 .05937765 .11618704 .17245213 .16068912 .18036911 .16357672 .17733405 .12287485"
    " .06443772"
)


@pytest.mark.parametrize("variant", LA_2)
@pytest.mark.parametrize("feeding", ["same", "turns"])
def test_the_network_follows_the_published_runs(variant: str, feeding: Any, tmp_path: Path) -> None:
    k, groups, nesterov, expected = LA_2[variant]
    torch.set_default_dtype(torch.float64)
    try:
        module = Tanh(nesterov)
    finally:
        torch.set_default_dtype(torch.float32)
    if feeding == "same":
        data = [[torch.tensor(0), torch.tensor(t)] for t in range(groups)]
        own = [lambda batch, branch=branch: [torch.tensor(branch), batch[1]] for branch in range(3)]
        lookaround = Lookaround(3, k, own)
    else:
        data = [[torch.tensor(r), torch.tensor(t)] for t in range(groups) for r in range(3)]
        lookaround = Lookaround(3, k, batches="turns")
    trainer(tmp_path, [lookaround], max_epochs=1, precision="64-true").fit(module, DataLoader(data, None))
    assert module.flat() == pytest.approx(expected, abs=1e-10)
    if variant == "k 2, four groups":
        assert module.losses == pytest.approx(LA_2_LOSSES, abs=1e-8)
