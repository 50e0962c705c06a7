"""Lookaround as an optimizer, for loops without a Trainer and for ``configure_optimizers``."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_merge import weights
from lightning_merge._checks import one_of, whole
from lightning_merge.branches import Average, InTurn
from lightning_merge.branches._in_turn import Inactive
from lightning_merge.branches._matrix import MOST
from lightning_merge.optim._around import Around


@final
class Lookaround(Around):
    """Steps of d branches in turn, which all go on from their mean every k steps: ``w_j <- (w_1 + ... + w_d) / d``.

    After each ``step`` the parameters are those of the next branch, so a loop over batches needs no change: forward,
    backward, step, one batch per branch. After ``d * k`` steps, and only then, the parameters are the mean; measure and
    save inside ``averaged()``. Each branch has its own state of the wrapped optimizer, which survives the average.
    Buffers, such as BatchNorm's statistics, are not an optimizer's business: all branches share them.

    A Trainer measures and saves the parameters as they are, which is one branch. The callback ``Lookaround`` makes it
    use the mean, and gives every branch its augmentation; it takes the same steps.

    Args:
        base_optimizer: Any optimizer. Its parameter groups are shared, so learning-rate schedules and gradient scalers
            work on either. A step that a scaler skips is no turn: the same branch takes the next batch.
        branches: Number of branches d; at least 1. One is the wrapped optimizer.
        every_n_steps: Steps k that each branch takes between averages; at least 1.
        inactive: Where the other branches are, ``"device"`` or ``"cpu"``.

    Attributes:
        base: The wrapped optimizer.
        branch: The branch whose weights are in place and that takes the next step.
        merges: Averages so far.

    Raises:
        TypeError: If ``base_optimizer`` is not an optimizer.
        ValueError: If an argument is out of range, or ``base_optimizer`` evaluates the loss several times in a step, as
            LBFGS and SAM do.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor(4.0))
        >>> optimizer = Lookaround(torch.optim.SGD([w], lr=0.5), branches=2, every_n_steps=1)
        >>> for target in (0.0, 2.0):
        ...     optimizer.zero_grad()
        ...     (0.5 * (w - target) ** 2).backward()
        ...     optimizer.step()
        >>> w.item()  # the mean of 2 and 3
        2.5

    References:
        Zhang et al., "Lookaround optimizer: k steps around, 1 step average", NeurIPS 2023, algorithm 1.
    """

    def __init__(
        self, base_optimizer: Optimizer, branches: int = 3, every_n_steps: int = 5, *, inactive: Inactive = "device"
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"`base_optimizer` must be a torch optimizer, got {base_optimizer!r}.")
        refuse_several_evaluations(base_optimizer)
        branches = whole("branches", branches, 1, MOST)
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        one_of("inactive", inactive, Inactive)
        super().__init__(base_optimizer.param_groups, dict(base_optimizer.defaults))
        self.base = base_optimizer
        self.every_n_steps = every_n_steps
        self.merges = 0
        self._groups = 0  # rounds of one step in every branch
        self._parameters = nn.ParameterList(self._listed())
        self._set = InTurn(self._parameters, [base_optimizer], branches, inactive=inactive)
        if hasattr(base_optimizer, "_step_supports_amp_scaling"):
            self._step_supports_amp_scaling = base_optimizer._step_supports_amp_scaling
        self._trained: list[bool] = []  # which parameters require gradients
        self._begun = False  # whether branches have been forked by a first step
        self._ready = True

    @property
    def branch(self) -> int:
        return self._set.active

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the branch in place, averages if that is due, and puts the next branch in its place.

        Args:
            closure: Computes the loss and its gradients; called once.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: If an average is due and all branches hold a NaN or an infinity.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._look()
        # A gradient scaler leaves the scale and the test for infinities to fused optimizers.
        handed_over = {name: value for name, value in vars(self).items() if name in ("grad_scale", "found_inf")}
        vars(self.base).update(handed_over)
        self.base.step()
        for name in handed_over:
            delattr(self.base, name)
        found_inf = handed_over.get("found_inf")
        if found_inf is not None and bool(found_inf):
            return loss  # the wrapped optimizer has skipped it
        following = (self.branch + 1) % self._set.count
        if following == 0:
            self._groups += 1
            if self._groups % self.every_n_steps == 0:
                self._merge()
        self._set.activate(following)
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are the mean of all branches: measure and save there, do not step.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = Lookaround(torch.optim.SGD(model.parameters(), lr=0.1))
            >>> with optimizer.averaged():
            ...     published = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        """
        self._look()
        live = self._set.live
        before: weights.Weights = {}
        mean = weights.like(self._set.mean(), live)
        try:
            weights.exchange(live, mean, before)
            yield
        finally:
            weights.exchange(live, before)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; all branches start with them as they are."""
        if not self._ready:
            super().add_param_group(param_group)
            return
        self.base.add_param_group(param_group)
        self._look()

    def _look(self) -> None:
        """Forks at the first step, and branches what was added, assigned or unfrozen since the last."""
        listed = self._listed()
        trained = [parameter.requires_grad for parameter in listed]
        known = {id(parameter) for parameter in self._parameters}
        self._parameters.extend(p for p in listed if id(p) not in known)
        if not self._begun:
            self._begun = True
            self._set.restart()
        elif len(listed) != len(known) or trained != self._trained:
            self._set.refresh()
        self._trained = trained

    def state_dict(self) -> dict[str, Any]:
        """What the wrapped optimizer saves, and the branches that are not in place; save the model's weights too."""
        self._look()
        own = {"groups": self._groups, "merges": self.merges, **self._set.save()}
        return {**self.base.state_dict(), "lookaround": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave, or from the state of the wrapped optimizer alone.

        The model's weights of the same moment have to be in place.
        """
        own = state_dict.get("lookaround")
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "lookaround"})
        if own is None:
            self._begun = False
            return
        if len(own["weights"]) != self._set.count - 1:
            raise ValueError(
                f"the state is of {len(own['weights']) + 1} branches, and `branches` is {self._set.count}."
            )
        self._groups, self.merges = own["groups"], own["merges"]
        self._begun = False
        self._look()
        self._set.load(own)
        self._set.load_optimizers(own)

    def _merge(self) -> None:
        diverged = self._set.diverged()
        if len(diverged) == self._set.count:
            raise RuntimeError(
                f"all {self._set.count} branches hold a NaN or an infinity after {self._groups} steps of each. Go back"
                " to an earlier state and lower the learning rate or clip gradients."
            )
        if diverged:
            warnings.warn(
                f"branches {sorted(diverged)} hold a NaN or an infinity after {self._groups} steps of each. They are"
                " left out of this average, and go on from the mean of the others with a reset optimizer.",
                stacklevel=3,
            )
            self._set.revive(diverged)
        Average().merge({}, self._set)
        self.merges += 1

    def _listed(self) -> list[nn.Parameter]:
        parameters = [parameter for group in self.base.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if not isinstance(parameter, nn.Parameter):
                raise TypeError(f"the optimizer must hold `torch.nn.Parameter`, got {type(parameter).__name__}.")
        return parameters


def refuse_several_evaluations(optimizer: Optimizer) -> None:
    """Checks that a step takes the gradients that there are.

    Raises:
        ValueError: If the optimizer wants a closure, or has a step of two halves.
    """
    name = type(optimizer).__name__
    step = inspect.unwrap(type(optimizer).step)
    closure = inspect.signature(step).parameters.get("closure")
    if isinstance(optimizer, LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ValueError(
            f"`base_optimizer` must step on the gradients that there are, got {name}, which evaluates the loss several"
            " times in a step. The callback `Lookaround` takes it."
        )
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise ValueError(
            f"`base_optimizer` must take its step by `step()`, got {name}, whose step has two halves (`first_step`,"
            " `second_step`) with a backward pass between. The callback `Lookaround` takes it."
        )
