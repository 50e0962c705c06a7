"""Branches that take turns in one module on one device."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._checks import one_of, whole
from lightning_merge.branches import _counters as counters
from lightning_merge.branches import _optimizer_states as optimizer_states
from lightning_merge.branches._arriving import Arrived, Arriving, mean_here
from lightning_merge.branches._base import Branches, Buffers
from lightning_merge.branches._buffers import pooled
from lightning_merge.branches._matrix import Matrix, check_matrix, check_shares
from lightning_merge.branches._quantised import Bits
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights

Inactive = Literal["device", "cpu"]


@final
class InTurn(Branches):
    """Branches that take turns in one module: activating one exchanges storages, and no number moves.

    A branch trains exactly as an independent replica would. Beside the module and its optimizers it takes K - 1 sets of
    weights and optimizer state. Parameter objects stay the same, so hooks, schedulers and DDP's buckets stay valid;
    addresses change, so a CUDA graph of the step does not.

    Args:
        module: As in ``Branches``.
        optimizers: As in ``Branches``.
        count: As in ``Branches``.
        selection: As in ``Branches``.
        buffers: As in ``Branches``.
        inactive: Where the others wait: ``"device"``, or ``"cpu"`` for host memory, which makes activation a copy in
            each direction.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> branches = InTurn(layer, [], count=2)
        >>> branches.activate(1)
        >>> _ = nn.init.constant_(layer.weight, 4.0)
        >>> branches.mean()
        {'weight': tensor([[3.]])}
        >>> branches.mix([[0.5, 0.5], [0.0, 1.0]])
        >>> [branches.weights(branch)["weight"].item() for branch in (0, 1)]
        [3.0, 4.0]
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        count: int,
        *,
        selection: Selection | None = None,
        buffers: Buffers = "shared",
        inactive: Inactive = "device",
    ) -> None:
        one_of("inactive", inactive, Inactive)
        super().__init__(module, optimizers, count, selection=selection, buffers=buffers)
        count = self.count
        self.inactive: Inactive = inactive
        self._active = 0
        # Of the active branch the module has the tensors. In host memory it has a place of its own all the same.
        self._waiting: list[Weights] = [{} if self._in_module(j) else self._copies() for j in range(count)]
        self._states: list[list[dict[Any, Any]]] = [[{} for _ in self._stateful] for _ in range(count)]
        self._counts: list[list[counters.Counts]] = [[{} for _ in self._stateful] for _ in range(count)]
        self._homes: list[dict[Any, dict[Any, torch.device]]] = [{} for _ in self._stateful]
        self.fork_optimizers()

    def restart(self) -> None:
        """All branches go on from what is in the module and the optimizers."""
        self.capture()
        self.look_at_constants()
        self._waiting = [{} if self._in_module(j) else self._refilled(self._waiting[j]) for j in self.own]
        self.fork_optimizers()

    def _refilled(self, waiting: Weights) -> Weights:
        """What is in the module, in memory that a branch has already where it fits."""
        live = self.live
        kept = {n: t for n, t in waiting.items() if n in live and t.shape == live[n].shape and t.dtype == live[n].dtype}
        weights.copy_(kept, {name: live[name] for name in kept})
        return {**kept, **self._copies({name: t for name, t in live.items() if name not in kept})}

    def take(self, names: Sequence[str]) -> None:
        live = self.live
        for branch, waiting in enumerate(self._waiting):
            if not self._in_module(branch):
                waiting.update(self._copies({name: live[name] for name in names if name in live}))

    def adopt(self, before: Weights) -> None:
        super().adopt(before)
        for branch, waiting in enumerate(self._waiting):
            if branch != self._active:
                waiting.update(self._copies({name: t for name, t in before.items() if name in self.live}))
            elif self.inactive == "cpu":
                waiting.update(self._copies({name: t for name, t in self.live.items() if name in before}))

    def fork_optimizers(self) -> None:
        for branch in self.own:
            if branch != self._active:
                self._states[branch] = [self._copy_of(number, o.state) for number, o in enumerate(self._stateful)]
                self._counts[branch] = [each.take() for each in self._counters]

    # ---- which

    @property
    def active(self) -> int:
        return self._active

    @property
    def own(self) -> Sequence[int]:
        return range(self.count)

    def activate(self, branch: int) -> None:
        if branch == self._active:
            return
        if not 0 <= whole("branch", branch) < self.count:
            raise ValueError(f"`branch` must be in 0 to {self.count - 1}, got {branch}.")
        live, incoming = self.live, self._waiting[branch]
        if self.inactive == "cpu":
            weights.copy_(self._waiting[self._active], live)
            weights.copy_(live, incoming)
        else:
            before: Weights = {}
            try:
                weights.exchange(live, incoming, before, self.inventory.ties)
            except BaseException:  # Ctrl-C between two tensors
                weights.exchange(live, before, ties=self.inventory.ties)
                raise
            self._waiting[self._active], self._waiting[branch] = before, {}
        for number, optimizer in enumerate(self._stateful):
            state = self._taken_out(number, self._states[branch][number])
            self._states[self._active][number] = self._put_away(number, optimizer_states.exchanged(optimizer, state))
            self._states[branch][number] = {}
            self._counts[self._active][number] = self._counters[number].exchange(self._counts[branch][number])
        self._active = branch

    def weights(self, branch: int) -> Weights:
        if branch == self._active:
            return {name: tensor.data for name, tensor in self.live.items()}
        return self._waiting[branch]

    def refresh(self) -> None:
        self._look_up()
        for branch, waiting in enumerate(self._waiting):
            if self._in_module(branch):
                continue
            new = {n: t for n, t in self.live.items() if n not in waiting or waiting[n].shape != t.shape}
            waiting.update(self._copies(new))
            for name in waiting.keys() - self.live.keys():
                del waiting[name]

    # ---- merging

    def mix(self, matrix: Matrix) -> None:
        check_matrix(matrix, self.count)
        sets = self._all_sets()
        self._mixed(sets, matrix)
        if self.inactive == "cpu":
            weights.copy_(self.live, self._waiting[self._active])

    def mean(
        self,
        shares: Sequence[float] | None = None,
        active: Mapping[str, Tensor] | None = None,
        names: Container[str] | None = None,
    ) -> Weights:
        shares = [1 / self.count] * self.count if shares is None else shares
        check_shares(shares, self.count)
        sets = self._all_sets(active)
        of_parameters, of_buffers = self._named(names)
        parameters = [{name: each[name] for name in of_parameters} for each in sets]
        buffers = [{name: each[name] for name in of_buffers} for each in sets]
        return {**weights.weighted_mean(parameters, shares), **(pooled(buffers, shares) if of_buffers else {})}

    def start_mean(self, choose: Callable[[Weights], Weights], bits: Bits = 32) -> Arriving:
        sets = [choose(dict(each)) for each in self._all_sets()]
        whole = bits == 32
        return Arrived(weights.weighted_mean(sets, [1 / self.count] * self.count) if whole else mean_here(sets, bits))

    def gather(self, choose: Callable[[Weights], Tensor]) -> list[Tensor]:
        return [choose(self.weights(branch)) for branch in self.own]

    def diverged(self, active: Mapping[str, Tensor] | None = None) -> set[int]:
        sets = {branch: self.weights(branch) for branch in self.own}
        if active is not None:
            sets[self._active] = {name: active[name] for name in self.live}
        return {branch for branch, own in sets.items() if weights.nonfinite(own)}

    # ---- optimizers

    def reset_optimizers(self, branches: set[int]) -> None:
        for branch in branches:
            for number, optimizer in enumerate(self._stateful):
                first = self._counters[number].first()
                if branch == self._active:
                    optimizer_states.exchanged(optimizer, optimizer_states.copied(self._fresh[number]))
                    self._counters[number].exchange(first)
                else:
                    self._states[branch][number] = self._copy_of(number, self._fresh[number])
                    self._counts[branch][number] = first

    def average_optimizers(self) -> None:
        self.check_optimizers()
        for number, optimizer in enumerate(self._stateful):
            states = [self._states[j][number] if j != self._active else optimizer.state for j in self.own]
            optimizer_states.average_(states)
            own = self._counters[number]
            # What a waiting branch has nothing of is as it was before its first step.
            found = [own.take() if j == self._active else self._counts[j][number] for j in self.own]
            new = counters.largest(found)
            own.exchange(own.copied(new))
            for j in self.own:
                self._counts[j][number] = own.copied(new)

    # ---- a run that goes on

    def save(self) -> State:
        others = [branch for branch in self.own if branch != self._active]
        return {
            "active": self._active,
            "constant": sorted(self._constant),
            "weights": {branch: self._waiting[branch] for branch in others},
            "optimizers": {
                branch: [
                    optimizer_states.packed(optimizer, self._taken_out(number, self._states[branch][number]))
                    for number, optimizer in enumerate(self._stateful)
                ]
                for branch in (others if self._states else ())
            },
            "counters": {
                branch: [each.saved(self._counts[branch][number]) for number, each in enumerate(self._counters)]
                for branch in (others if self._states else ())
            },
        }

    def load(self, saved: State) -> None:
        if own := saved.get("others"):
            name = next(iter(next(iter(own.values()))))
            raise ValueError(
                f"branches in turn share `{name}`, and these branches were trained in processes of their own, each with"
                " its own. Go on with a branch in each process: `strategy=BranchStrategy()`."
            )
        self._active = saved["active"]
        known = {name for waiting in saved["weights"].values() for name in waiting}
        self._branch_also(known)
        self._waiting = [{} if self._in_module(j) else self._refilled(self._waiting[j]) for j in self.own]
        for branch, waiting in saved["weights"].items():
            own = self._waiting[branch]
            weights.copy_({name: own[name] for name in waiting if name in own}, waiting)

    def load_optimizers(self, saved: State) -> None:
        for branch, states in saved["optimizers"].items():
            # Files of earlier versions have nothing of optimizers inside of others.
            for number, (optimizer, state) in enumerate(zip(self._stateful, states, strict=False)):
                self._states[branch][number] = self._put_away(number, optimizer_states.unpacked(optimizer, state))
        self._states[self._active] = [{} for _ in self._stateful]
        for branch, counts in saved.get("counters", {}).items():
            self._counts[branch] = [own.restored(each) for own, each in zip(self._counters, counts, strict=True)]

    def to_host(self) -> None:
        super().to_host()
        host = torch.device("cpu")
        self._waiting = [{name: t.to(host) for name, t in waiting.items()} for waiting in self._waiting]
        self._states = []

    # ---- where the others wait

    def _in_module(self, branch: int) -> bool:
        return branch == self._active and self.inactive == "device"

    def _copies(self, tensors: Mapping[str, Tensor] | None = None) -> Weights:
        copies = weights.copies(self.live if tensors is None else tensors)
        return copies if self.inactive == "device" else {name: t.cpu() for name, t in copies.items()}

    def _all_sets(self, active: Mapping[str, Tensor] | None = None) -> list[Mapping[str, Tensor]]:
        """The tensors of all branches, in one kind of memory."""
        live = self.weights(self._active) if active is None else active
        if self.inactive == "cpu":
            own = self._waiting[self._active]
            weights.copy_(own, {name: live[name] for name in own})
            return list(self._waiting)
        return [live if branch == self._active else self._waiting[branch] for branch in self.own]

    def _put_away(self, number: int, state: dict[Any, Any]) -> dict[Any, Any]:
        """A state of an optimizer as it is kept while its branch waits."""
        if self.inactive == "device":
            return state
        for p, own in state.items():
            if isinstance(own, Mapping):  # of other branches too: one may not have stepped what another has
                homes = self._homes[number].setdefault(p, {})
                homes |= {key: t.device for key, t in own.items() if isinstance(t, Tensor)}
        return _moved(state, lambda parameter, key: torch.device("cpu"))

    def _copy_of(self, number: int, state: Mapping[Any, Any]) -> dict[Any, Any]:
        return self._put_away(number, optimizer_states.copied(state))

    def _taken_out(self, number: int, state: dict[Any, Any]) -> dict[Any, Any]:
        """The same as the optimizer wants it."""
        if self.inactive == "device":
            return state
        homes = self._homes[number]
        return _moved(state, lambda parameter, key: homes[parameter][key])


def _moved(state: Mapping[Any, Any], device: Callable[[Any, Any], torch.device]) -> dict[Any, Any]:
    return {
        parameter: {key: v.to(device(parameter, key)) if isinstance(v, Tensor) else v for key, v in own.items()}
        if isinstance(own, Mapping)
        else own
        for parameter, own in state.items()
    }
