"""What a set of branches can do, whichever way they are placed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._checks import instance, one_of, sequence, whole
from lightning_merge.branches import _counters as counters
from lightning_merge.branches import _optimizer_states as optimizer_states
from lightning_merge.branches._arriving import Arriving
from lightning_merge.branches._buffers import mix_buffers_
from lightning_merge.branches._matrix import MOST, Matrix, unit
from lightning_merge.branches._quantised import Bits
from lightning_merge.selections import Selection
from lightning_merge.weights import Inventory, State, Weights

Buffers = Literal["shared", "average"]


class Branches(ABC):
    """K sets of weights, buffers and optimizer state of one module, and how they mix.

    One set is in the module and its optimizers at a time: the active one. Where the others are is the placement:
    ``InTurn`` keeps them beside it, ``OnePerRank`` in the other processes. A merge is written once for both, from what
    is here: ``mix`` for a matrix, and for anything else ``mean``, ``assign`` and ``gather``. A file is written by the
    callback that owns the branches; ``save`` and ``load`` give and take plain tensors.

    Args:
        module: Its trainable parameters are branched; parameters outside ``selection`` are shared by all.
        optimizers: The optimizers of the module; their state per parameter is branched, and so is what their steps
            change in parameter groups.
        count: Number of branches; at least 1.
        selection: Which parameters are branched. By default those that require gradients.
        buffers: ``"average"``: every branch has its own persistent buffers, and they mix with the weights (BatchNorm
            variances are pooled, integers take the maximum). ``"shared"``: there is one set that all branches update.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``count`` or ``buffers`` is out of range, or no parameter is selected.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        count: int,
        *,
        selection: Selection | None = None,
        buffers: Buffers = "shared",
    ) -> None:
        instance("module", module, nn.Module, "a module")
        self.module = module
        self.optimizers = [
            instance("optimizers", each, Optimizer, "torch optimizers")
            for each in sequence("optimizers", optimizers, "torch optimizers")
        ]
        self.count = count = whole("count", count, 1, MOST)
        one_of("buffers", buffers, Buffers)
        self.selection = Selection(trainable=True) if selection is None else instance("selection", selection, Selection)
        self.buffers: Buffers = buffers
        self.steps = [0] * count
        """Steps of the own branches since the last merge, counted by whoever trains them."""
        self.scorer: Callable[[Weights], float] | None = None
        """Measures weights in the place of the module's, higher is better; whoever trains the branches sets it."""
        self.on_the_way: dict[int, Arriving] = {}
        """Means that a policy has asked for and not yet used, by a number of its own."""
        self.left_out: set[int] = set()
        """Branches that were not in the last ``mean_of_finite``."""
        self.inventory = Inventory(module)
        self._branch_off(self.selection.parameters(self.inventory))
        # Masks and bounds, which hold infinities from the start, are no statistics: there is one of each.
        self._constant = weights.nonfinite(self.inventory.buffers)
        self._live_buffers = self._branched_buffers()
        for optimizer in self.optimizers:
            optimizer_states.refuse_divided("branches", optimizer)
        # A module may step others by itself, which it has made for parts that nobody else trains.
        self._stateful = optimizer_states.stateful([*self.optimizers, *optimizer_states.kept_by(module)])
        self._counters = counters.each_of(self._stateful)
        self._fresh = [optimizer_states.copied(optimizer.state) for optimizer in self._stateful]

    # ---- which

    @property
    @abstractmethod
    def active(self) -> int:
        """The branch that is in the module and the optimizers."""

    @property
    @abstractmethod
    def own(self) -> Sequence[int]:
        """The branches that this process holds."""

    @abstractmethod
    def activate(self, branch: int) -> None:
        """Puts one of the own branches into the module and the optimizers.

        Args:
            branch: Number of one of the own branches, from 0.
        """

    @property
    def live(self) -> Mapping[str, Tensor]:
        """The module's tensors that are branched, by canonical name: parameters and, if they are branched, buffers."""
        return {**self._live_parameters, **self._live_buffers} if self._live_buffers else self._live_parameters

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Those of ``live`` that are no buffers."""
        return self._live_parameters

    @abstractmethod
    def weights(self, branch: int) -> Weights:
        """The tensors of an own branch; writing to them changes it.

        Args:
            branch: Number of one of the own branches, from 0.
        """

    @abstractmethod
    def refresh(self) -> None:
        """Looks the module's tensors up again: what was frozen and is now trainable is branched from here on."""

    # ---- merging

    @abstractmethod
    def mix(self, matrix: Matrix) -> None:
        """``branch j <- sum over i of matrix[j][i] * branch i``: weights, and buffers if every branch has its own.

        Args:
            matrix: A row per branch, of numbers of at least 0 that sum to 1. ``uniform(K)`` makes all the mean.

        Raises:
            ValueError: If the matrix is not of that shape and kind.
        """

    @abstractmethod
    def mean(
        self,
        shares: Sequence[float] | None = None,
        active: Mapping[str, Tensor] | None = None,
        names: Container[str] | None = None,
    ) -> Weights:
        """``sum over i of shares[i] * branch i`` in new tensors, at least in float32; the uniform mean by default.

        Args:
            shares: One per branch, at least 0, with sum 1. A branch whose share is 0 is not read.
            active: The tensors of the active branch where others are in the module at the moment.
            names: Of which tensors; by default of all that are branched.
        """

    @abstractmethod
    def start_mean(self, choose: Callable[[Weights], Weights], bits: Bits = 32) -> Arriving:
        """The mean over branches of tensors that each makes now, on its way while branches train on.

        Args:
            choose: Takes the weights of a branch, by canonical name, and gives tensors by name: the same for all.
            bits: Of a number on its way: 32 for the precision of averages, 8 or 4.

        Raises:
            ValueError: If integers are to travel in 8 or 4 bits.
        """

    def assign(self, new: Mapping[str, Tensor]) -> None:
        """Every branch goes on from these weights; buffers that they do not name stay.

        Args:
            new: Weights by canonical name; of the branched tensors, and of buffers as many as wanted.
        """
        for branch in self.own:
            own = self.weights(branch)
            weights.copy_({name: own[name] for name in new if name in own}, new)

    @abstractmethod
    def gather(self, choose: Callable[[Weights], Tensor]) -> list[Tensor]:
        """What ``choose`` makes of the weights of every branch, in their order; shapes are the same for all.

        Args:
            choose: Takes the weights of a branch, by canonical name, and gives one tensor, not to be written to.
        """

    def work(self) -> list[int]:
        """Steps of every branch since the last merge."""
        own = iter([self.steps[branch] for branch in self.own])
        device = next(iter(self.live.values())).device
        return [int(each) for each in self.gather(lambda _: torch.tensor([next(own)], device=device))]

    def score(self, candidate: Weights) -> float:
        """How good weights are in the place of the module's; higher is better, NaN if that cannot be told.

        Args:
            candidate: Weights by canonical name.

        Raises:
            RuntimeError: If nobody has said how to measure (``scorer``).
        """
        if self.scorer is None:
            raise RuntimeError("these branches cannot be measured: set `scorer`, or give `Branching` a `score`.")
        return self.scorer(candidate)

    @abstractmethod
    def diverged(self, active: Mapping[str, Tensor] | None = None) -> set[int]:
        """The branches that hold a NaN or an infinity.

        Args:
            active: The tensors of the active branch where others are in the module at the moment.
        """

    def mean_of_finite(self, active: Mapping[str, Tensor] | None = None) -> Weights:
        """The mean of the branches that hold no NaN and no infinity; of all if there are no such.

        Args:
            active: Weights that stand for those of the active branch, which the module may have changed.
        """
        left_out = self.left_out = self.diverged(active)
        count = self.count - len(left_out)
        shares = [(branch not in left_out) / count for branch in range(self.count)] if left_out and count else None
        return self.mean(shares, active)

    def revive(self, branches: set[int]) -> None:
        """Branches go on from the mean of the others, with optimizers as they were at the start.

        Args:
            branches: Numbers of the branches that are given up, from 0; not all of them.
        """
        others = [branch not in branches for branch in range(self.count)]
        row = [healthy / sum(others) for healthy in others]
        self.mix([unit(j, self.count) if others[j] else row for j in range(self.count)])
        self.reset_optimizers(branches)

    # ---- optimizers

    @abstractmethod
    def fork_optimizers(self) -> None:
        """Every branch remembers what the optimizers do now."""

    @abstractmethod
    def reset_optimizers(self, branches: set[int]) -> None:
        """The optimizers of these branches are as they were made.

        Args:
            branches: Numbers of the branches, from 0.
        """

    @abstractmethod
    def average_optimizers(self) -> None:
        """Moments of all branches become their mean, step counters the largest.

        Raises:
            ValueError: If an optimizer keeps something else, see ``check_optimizers``.
        """

    def check_optimizers(self) -> None:
        """Checks that the states that there are by now can be averaged.

        Raises:
            ValueError: If one is of another shape than its parameter and no single number.
        """
        for optimizer in self._stateful:
            optimizer_states.refuse_without_mean(optimizer)
        for each in self._counters:
            each.refuse_without_mean()

    def owned_settings(self, number: int) -> set[tuple[int, str]]:
        """What the steps of an optimizer change in its groups, by the number of the group and the name.

        Args:
            number: Index of the optimizer.
        """
        own = [each.owned for each in self._counters if each.optimizer is self.optimizers[number]]
        return {where for each in own for where in each}

    # ---- a run that goes on

    @abstractmethod
    def save(self) -> State:
        """What the module and its optimizers do not hold: the other branches. On ranks every process calls this."""

    @abstractmethod
    def load(self, saved: State) -> None:
        """Takes over the weights that ``save`` gave; the module holds those of the branch that was active then.

        Branches that it has no weights of are as the module is.

        Args:
            saved: What ``save`` gave.
        """

    @abstractmethod
    def load_optimizers(self, saved: State) -> None:
        """Takes over the states that ``save`` gave, once the optimizers have theirs of the branch that was active.

        Args:
            saved: What ``save`` gave.
        """

    @abstractmethod
    def restart(self) -> None:
        """All branches go on from what is in the module and the optimizers."""

    @abstractmethod
    def take(self, names: Sequence[str]) -> None:
        """All branches go on from what the module has of these tensors.

        Args:
            names: Canonical names.
        """

    def to_host(self) -> None:
        """The fit is over: weights go to host memory, optimizer states are dropped."""
        for each in self._counters:
            each.forget()

    # ----

    def look_at_constants(self) -> None:
        """Which buffers are masks and bounds, of branches that begin."""
        self.leave_alone(sorted(weights.nonfinite(self.inventory.buffers)))

    def leave_alone(self, constant: Sequence[str]) -> None:
        """Branches that go on have one of each of these buffers, whatever they hold by now.

        Args:
            constant: Canonical names of the buffers that no branch has of its own.
        """
        self._constant = set(constant)
        self._live_buffers = self._branched_buffers()

    def _look_up(self) -> None:
        self.inventory.refresh()
        everything = self.inventory.tensors
        for name, parameter in self._live_parameters.items():
            now = everything.get(name, parameter)
            if now is not parameter or now.shape != self._shapes[name]:
                raise ValueError(
                    f"`{name}` was replaced while branches train, and the other branches have the one before it (shape"
                    f" {tuple(self._shapes[name])}, now {tuple(now.shape)}). Replace it before the fit."
                )
        chosen = self.selection.chosen(self.inventory)
        # What was branched once stays so, also while it is frozen.
        self._branch_off({n: t for n, t in everything.items() if n in chosen or n in self._live_parameters})
        self._live_buffers = self._branched_buffers()

    def _branch_off(self, parameters: Mapping[str, Tensor]) -> None:
        self._live_parameters = dict(parameters)
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def capture(self) -> None:
        """Takes what the module has now as what is branched."""
        self.inventory.look_anew()
        self._branch_off(self.selection.parameters(self.inventory))
        self._live_buffers = self._branched_buffers()

    def could_be(self, name: str) -> bool:
        """Whether a tensor of this name is branched, or would be if it were not frozen.

        Args:
            name: Canonical name of a parameter.
        """
        chosen = replace(self.selection, trainable=False).chosen(self.inventory)
        return name in self._live_buffers or name in chosen

    def adopt(self, before: Weights) -> None:
        """Branches parameters that steps write to without training them, as those of a momentum teacher.

        Args:
            before: What they were before the first such step, which the other branches go on from; by canonical name.
        """
        self._branch_also(before)

    def _branch_also(self, names: Container[str]) -> None:
        """What was branched in a run that goes on, and is frozen at the moment."""
        found = {n: p for n, p in self.inventory.parameters.items() if n in names or n in self._live_parameters}
        self._branch_off(found)

    def _named(self, names: Container[str] | None) -> tuple[list[str], list[str]]:
        """The parameters and the branched buffers among these names, or all."""
        parameters, buffers = (
            [name for name in each if names is None or name in names]
            for each in (self._live_parameters, self._live_buffers)
        )
        return parameters, buffers

    def _branched_buffers(self) -> Weights:
        if self.buffers != "average":
            return {}
        return {name: buffer for name, buffer in self.inventory.buffers.items() if name not in self._constant}

    def _mixed(self, sets: Sequence[Mapping[str, Tensor]], matrix: Matrix) -> None:
        """Mixes sets that are all at hand, in place."""
        names = self._live_parameters.keys()
        mix_buffers_([{name: t for name, t in each.items() if name not in names} for each in sets], matrix)
        weights.mix_([{name: each[name] for name in names} for each in sets], matrix)
