"""FedAvg and FedNova: clients with other amounts of data, of other classes, and other numbers of steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import QUIET
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from _evidence._fit import Part, accuracy
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import digits, perceptron
from lightning_merge.branches import Average, Nova, WeightedAverage
from lightning_merge.callbacks import Branching
from lightning_merge.schedules import EveryNSteps


class Client(pl.LightningModule):
    """Takes a step on a batch that is not empty; without manual optimization an empty one would count as a step."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.rate = perceptron(), rate

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network(images)
        return found

    def training_step(self, batch: Part, batch_idx: int) -> None:
        if len(batch[1]):
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


@dataclass
class Federated(Protocol):
    """Three clients, each with most of its images from three or four digits; a round is so many epochs of each client.

    The client with six times the images takes six times the steps of a round. Plain SGD with as many gradient steps
    as all clients has all images in one place. The rate is the same for all in the small size, and searched for
    each on validation images in the full one.
    """

    claim = (
        "FedAvg: near training on all data in one place; FedNova: above FedAvg where clients differ in work and data"
    )
    beside = "FedAvg"

    amounts: tuple[int, ...] = (20, 60, 120)
    skew: float = 0.8
    epochs: int = 2
    batch: int = 10
    rounds: int = 20
    validated_on: int = 400
    rates: tuple[float, ...] = (0.2,)

    def prepare(self, place: Place) -> None:
        self._pool, self._val, self._test = digits(600, self.validated_on)
        self._work = [self.epochs * amount // self.batch for amount in self.amounts]

    def choose(self) -> dict[str, Any]:
        if len(self.rates) == 1:
            return {"rates": dict.fromkeys(self._makers(), self.rates[0])}
        by = {rate: self._scores(dict.fromkeys(self._makers(), rate), 1000, self._val) for rate in self.rates}
        return {"rates": {one: max(by, key=lambda rate, one=one: by[rate][one]) for one in self._makers()}}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        return {f"{self.rounds} rounds": self._scores(chosen["rates"], seed, self._test)}

    def _makers(self) -> dict[str, Callable[[list[Any]], Branching] | None]:
        def made(policy: Any, draws: list[Any], every: int) -> Branching:
            return Branching(policy, EveryNSteps(every), len(draws), augmentations=draws, optimizer_state="reset")

        each = max(self._work)
        return {
            "all data in one place": None,
            "plain mean of clients": lambda draws: made(Average(), draws, each),
            "FedAvg": lambda draws: made(WeightedAverage(self.amounts), draws, each),
            "FedNova": lambda draws: made(Nova(self.amounts), draws, each),
            "soup of clients that never met": lambda draws: made(Average(), draws, 10**9),
        }

    def _scores(self, rates: Mapping[str, float], seed: int, part: Part) -> dict[str, float]:
        found = {}
        for one, make in self._makers().items():
            draws = [self._draw(client, data) for client, data in enumerate(self._clients(seed))]
            callback = make(draws) if make else None
            pl.seed_everything(seed, verbose=False)
            module, groups = Client(rates[one]), torch.arange(self.rounds * max(self._work))
            batches: Any = groups
            if callback is None:
                every = [torch.cat(tensors) for tensors in zip(*self._clients(seed), strict=True)]
                order = torch.randint(len(every[1]), (self.rounds * sum(self._work), self.batch))
                batches = [(every[0][chosen], every[1][chosen]) for chosen in order]
            trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=[callback] if callback else [])
            trainer.fit(module, DataLoader(batches, batch_size=None))
            found[one] = accuracy(module, {}, part, "cpu")
        return found

    def _clients(self, seed: int) -> list[Part]:
        """Images of each client: most are of its own digits, the others of any."""
        draw, (images, labels) = torch.Generator().manual_seed(seed), self._pool
        left, found = torch.randperm(len(labels), generator=draw), []
        for client, amount in enumerate(self.amounts):
            own = (labels[left] * len(self.amounts) // 10 == client).nonzero().flatten()[: int(self.skew * amount)]
            rest = torch.ones(len(left), dtype=torch.bool).index_fill(0, own, value=False).nonzero().flatten()
            taken = torch.cat([own, rest[: amount - len(own)]])
            found.append((images[left[taken]], labels[left[taken]]))
            left = left[torch.ones(len(left), dtype=torch.bool).index_fill(0, taken, value=False)]
        return found

    def _draw(self, client: int, data: Part) -> Callable[[Any], Part]:
        """The batch of a client in a group of the run: none when its epochs of the round are over."""

        def batch(group: Tensor) -> Part:
            at = int(group) % max(self._work)
            if at >= self._work[client]:
                return data[0][:0], data[1][:0]
            chosen = torch.arange(at * self.batch, (at + 1) * self.batch) % len(data[1])
            return data[0][chosen], data[1][chosen]

        return batch


def federated(size: str) -> Federated:
    return Federated() if size == "small" else Federated(rounds=200, rates=(0.02, 0.05, 0.1, 0.2))
