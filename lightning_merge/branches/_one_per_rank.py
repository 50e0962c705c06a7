"""Branches that train side by side, each in processes of its own."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._checks import flag, instance, one_of, whole
from lightning_merge.branches import _optimizer_states as optimizer_states
from lightning_merge.branches._arriving import Arriving, QuantisedMean, Reduced
from lightning_merge.branches._base import Branches, Buffers
from lightning_merge.branches._buffers import pooled
from lightning_merge.branches._matrix import MOST, Matrix, check_matrix, check_shares
from lightning_merge.branches._quantised import Bits
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights


@final
class OnePerRank(Branches):
    """Branches that train side by side: one in each process, or in each group of processes that train it together.

    Of W processes the first W / K train branch 0, the next ones branch 1, and so on. Nothing is communicated between
    merges; a merge whose rows differ in their own branch only (a mean, a pull to the mean) is one all-reduce of a flat
    tensor, at least float32, over K processes. Every process must call ``mix``, ``mean``, ``gather``, ``diverged``,
    ``average_optimizers`` and ``save``.

    Args:
        module: As in ``Branches``; not wrapped by DDP across branches.
        optimizers: As in ``Branches``.
        count: As in ``Branches``; divides the number of processes.
        selection: As in ``Branches``.
        others: What trains outside of ``selection``, and all branches in turn would share: an error (``"refuse"``), or
            each branch's ``"own"``, which nothing mixes.
        buffers: As in ``Branches``. ``"shared"`` leaves every branch its own, unmixed.
        placement: Who trains what, if that has been settled.
        broadcast: Whether all start from the weights and buffers of the first process. Else they go on apart.

    Raises:
        ValueError: If the number of processes is not a multiple of ``count``, a parameter trains that ``others``
            refuses, or another argument is out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        count: int,
        *,
        selection: Selection | None = None,
        buffers: Buffers = "shared",
        others: Literal["refuse", "own"] = "refuse",
        placement: "Placement | None" = None,
        broadcast: bool = True,
    ) -> None:
        one_of("others", others, ("refuse", "own"))
        flag("broadcast", broadcast)
        if placement is not None:
            instance("placement", placement, Placement)
        super().__init__(module, optimizers, count, selection=selection, buffers=buffers)
        self.others = others
        self._refuse_shared()
        self.placement = Placement(self.count) if placement is None else placement
        self._broadcasts = broadcast
        if broadcast:
            self._broadcast()

    # ---- which

    @property
    def active(self) -> int:
        return self.placement.branch

    @property
    def own(self) -> Sequence[int]:
        return (self.placement.branch,)

    def activate(self, branch: int) -> None:
        if branch != self.active:
            raise ValueError(f"this process holds branch {self.active} only, got {branch}.")

    def weights(self, branch: int) -> Weights:
        self.activate(branch)
        return {name: tensor.data for name, tensor in self.live.items()}

    def refresh(self) -> None:
        self._look_up()
        self._refuse_shared()

    # ---- merging

    @torch.no_grad()
    def mix(self, matrix: Matrix) -> None:
        check_matrix(matrix, self.count)
        if self._live_buffers:
            weights.copy_(self._live_buffers, self._pooled(matrix[self.active], self._live_buffers))
        own = self._live_parameters
        if (parts := _common(matrix)) is not None:
            common, kept = parts
            if any(common):
                total = self._reduced(own, common[self.active])
                if kept[self.active] == 0:
                    weights.copy_(own, total)
                else:
                    mixed = {name: t.detach().to(total[name]).mul_(kept[self.active]) for name, t in own.items()}
                    weights.copy_(own, {name: t.add_(total[name]) for name, t in mixed.items()})
            return
        flat = self._gathered(weights.flatten(own))
        sets = [weights.unflatten(each, own) for each in flat]
        weights.copy_(own, weights.weighted_mean(sets, matrix[self.active]))

    def mean(
        self,
        shares: Sequence[float] | None = None,
        active: Mapping[str, Tensor] | None = None,
        names: Container[str] | None = None,
    ) -> Weights:
        shares = [1 / self.count] * self.count if shares is None else shares
        check_shares(shares, self.count)
        live = self.live if active is None else active
        parameters, buffers = ({name: live[name] for name in each} for each in self._named(names))
        reduced = self._reduced(parameters, shares[self.active]) if parameters else {}
        return {**reduced, **self._pooled(shares, buffers)}

    def start_mean(self, choose: Callable[[Weights], Weights], bits: Bits = 32) -> Arriving:
        own, group = choose(self.weights(self.active)), self.placement.across
        return Reduced(own, self.count, group) if bits == 32 else QuantisedMean(own, bits, self.count, group)

    def gather(self, choose: Callable[[Weights], Tensor]) -> list[Tensor]:
        return self._gathered(choose(self.weights(self.active)))

    def diverged(self, active: Mapping[str, Tensor] | None = None) -> set[int]:
        live = self.live
        device = next(iter(live.values())).device
        own = live if active is None else {name: active[name] for name in live}
        bad = torch.tensor([float(bool(weights.nonfinite(own)))], device=device)
        return {branch for branch, flag in enumerate(self._gathered(bad)) if flag.item()}

    # ---- optimizers

    def fork_optimizers(self) -> None:
        """Every process made its own."""

    def reset_optimizers(self, branches: set[int]) -> None:
        if self.active in branches:
            for number, optimizer in enumerate(self._stateful):
                optimizer_states.exchanged(optimizer, optimizer_states.copied(self._fresh[number]))
                self._counters[number].exchange(self._counters[number].first())

    def average_optimizers(self) -> None:
        self.check_optimizers()
        for optimizer in self._stateful:
            moments, counts = optimizer_states.parts(optimizer)
            if moments:
                weights.copy_(moments, self._reduced(moments, 1 / self.count))
            if counts:
                flat = torch.stack([t.float().cpu() for t in counts.values()]).to(next(iter(counts.values())).device)
                flat = flat.to(next(iter(self.live.values())).device)
                dist.all_reduce(flat, dist.ReduceOp.MAX, group=self.placement.across)
                weights.copy_(counts, dict(zip(counts, flat.unbind(), strict=True)))

    # ---- a run that goes on

    def save(self) -> State:
        own = {
            "weights": weights.to_devices(self.weights(self.active), torch.device("cpu")),
            "others": weights.to_devices(self._others(), torch.device("cpu")),
            "optimizers": weights.to_devices(
                [optimizer.state_dict()["state"] for optimizer in self._stateful], torch.device("cpu")
            ),
        }
        collected: list[Any] | None = [None] * self.count if self.active == 0 else None
        dist.gather_object(own, collected, dst=self.placement.first, group=self.placement.across)
        others = list(enumerate(collected or []))[1:]
        return {
            "active": 0,
            "constant": sorted(self._constant),
            "weights": {branch: each["weights"] for branch, each in others},
            "others": {branch: each["others"] for branch, each in others if each["others"]},
            "optimizers": {branch: each["optimizers"] for branch, each in others},
        }

    def restart(self) -> None:
        self.capture()
        self._refuse_shared()
        self.look_at_constants()
        if self._broadcasts:
            self._broadcast()

    def take(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.live:
                dist.broadcast(self.live[name].data, src=0)

    def load(self, saved: State) -> None:
        self._branch_also({name for own in saved["weights"].values() for name in own})
        if self.active in saved["weights"]:
            waiting, live = saved["weights"][self.active], self.live
            weights.copy_({name: live[name] for name in waiting if name in live}, waiting)
        own, everything = saved.get("others", {}).get(self.active, {}), weights.named_parameters(self.module)
        weights.copy_({name: everything[name] for name in own}, own)

    def load_optimizers(self, saved: State) -> None:
        for optimizer, state in zip(self._stateful, saved["optimizers"].get(self.active, ()), strict=False):
            optimizer_states.exchanged(optimizer, optimizer_states.unpacked(optimizer, state))

    # ---- between processes

    def _others(self) -> Weights:
        """What trains without being branched."""
        parameters = weights.named_parameters(self.module)
        return {n: p.detach() for n, p in parameters.items() if p.requires_grad and n not in self._live_parameters}

    def _refuse_shared(self) -> None:
        if self.others == "refuse" and self.count > 1 and (shared := next(iter(self._others()), None)):
            raise ValueError(
                f"`{shared}` trains and is not selected, so all branches share it, which branches in several processes"
                " cannot. Select or freeze it, or train the branches in turn."
            )

    def _broadcast(self) -> None:
        """All start from the weights and buffers of the first process."""
        tensors = [*weights.named_parameters(self.module).values(), *self.module.buffers()]
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)

    def _reduced(self, own: Mapping[str, Tensor], share: float) -> Weights:
        """The sum over branches of what each multiplies by its share, by one all-reduce."""
        flat = weights.flatten(own).mul_(share) if share else torch.zeros_like(weights.flatten(own))
        if self.count > 1:
            dist.all_reduce(flat, group=self.placement.across)
        return weights.unflatten(flat, own)

    def _gathered(self, own: Tensor) -> list[Tensor]:
        """The same tensor of every branch."""
        received = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(received, own.contiguous(), group=self.placement.across)
        return received

    def _pooled(self, shares: Sequence[float], own: Mapping[str, Tensor]) -> Weights:
        """The buffers of a mixture of all branches."""
        if not own:
            return {}
        sets: list[Weights] = [{} for _ in range(self.count)]
        for averaged in (True, False):
            part = {name: t for name, t in own.items() if weights.is_averaged(t) is averaged}
            if part:
                flat = torch.cat([t.reshape(-1).to(torch.float64 if averaged else torch.int64) for t in part.values()])
                for each, other in zip(sets, self._gathered(flat), strict=True):
                    each |= weights.like(weights.unflatten(other, part), part)
        return pooled([{name: each[name] for name in own} for each in sets], shares)


@final
class Placement:
    """Which branch a process trains, and with whom it trains and merges.

    Args:
        count: Number of branches; divides the number of processes.

    Attributes:
        branch: The branch of this process.
        place: Its number among the processes of its branch.
        size: Processes per branch.
        within: The group of the processes of its branch; ``None`` if it is alone.
        across: The group of the processes with its number in all branches; ``None`` for all processes.
        first: Global rank of the first process of ``across``.

    Raises:
        ValueError: If the number of processes is not a multiple of ``count``.
    """

    def __init__(self, count: int) -> None:
        count = whole("count", count, 1, MOST)
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % count:
            raise ValueError(
                f"the number of processes must be a multiple of the {count} branches, got {world}: train with"
                f" {count * max(1, round(world / count))} processes or another number of branches."
            )
        self.size = world // count
        self.branch, self.place = divmod(rank, self.size)
        self.first = self.place
        self.within: Any = None
        self.across: Any = None
        if self.size > 1:
            # Every process must make all groups, in the same order.
            for branch in range(count):
                group = dist.new_group([branch * self.size + place for place in range(self.size)])
                if branch == self.branch:
                    self.within = group
            for place in range(self.size):
                group = dist.new_group([branch * self.size + place for branch in range(count)])
                if place == self.place:
                    self.across = group


def _common(matrix: Matrix) -> tuple[list[float], list[float]] | None:
    """``matrix[j][i] = common[i]`` off the diagonal and ``common[j] + kept[j]`` on it, if it is of that kind."""
    count = len(matrix)
    if count == 1:
        return [0.0], [1.0]
    common = [matrix[1 if i == 0 else 0][i] for i in range(count)]
    if any(matrix[j][i] != common[i] for j in range(count) for i in range(count) if i != j):
        return None
    return common, [matrix[j][j] - common[j] for j in range(count)]
