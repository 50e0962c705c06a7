"""One fit of TWA: snapshots are collected, then the optimizer's step trains their coefficients."""

from collections.abc import Callable
from typing import Any, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._whole_steps import was_skipped
from lightning_merge.callbacks._publication._session import Publisher
from lightning_merge.callbacks._twa_run._plan import Plan
from lightning_merge.callbacks._twa_run._saved import Counts
from lightning_merge.optim import Subspace
from lightning_merge.selections import Selection
from lightning_merge.trajectory import Trajectory
from lightning_merge.weights import Weights


@final
class Fit:
    """The snapshots of one fit and what is trained of them.

    Args:
        title: What messages call the callback.
        publisher: Of the fit.
        selection: Which parameters.
        plan: When what happens.
        make: Makes room for so many snapshots of these tensors.
        counts: Where steps are counted.
        earlier: The fit of the same callback that this one goes on from.

    Attributes:
        live: The parameters that are trained, by canonical name.
        live_buffers: The module's buffers.
        subspace: The snapshots and their coefficients.

    Raises:
        ValueError: If the earlier fit trained other parameters.
    """

    def __init__(
        self,
        title: str,
        publisher: Publisher,
        selection: Selection,
        plan: Plan,
        make: Callable[[Weights, int], Subspace],
        counts: Counts,
        earlier: "Fit | None",
    ) -> None:
        self.publisher = publisher
        self.plan = plan
        self._title = title
        self._selection = selection
        self._counts = counts
        self.live: dict[str, Tensor] = {} if earlier is None else earlier.live
        self.live_buffers: dict[str, Tensor] = {}
        self._capture()
        if earlier is None:
            self.subspace = make(self.live, plan.snapshots)
        else:
            self.subspace = earlier.subspace
            self.subspace.to_devices_of(self.live)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters that are trained, and the buffers."""
        return {**self.live, **self.live_buffers}

    # ---- which parameters

    def look_again(self) -> None:
        """Refuses another set of parameters."""
        before, shapes = self.live, self._shapes
        self._capture()
        for name, parameter in self.live.items():
            if parameter is not before[name] or parameter.shape != shapes[name]:
                raise self._changed(name)

    def _capture(self) -> None:
        inventory = self.publisher.inventory
        parameters = self._selection.parameters(inventory)
        live: dict[str, Tensor] = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if self.live and live.keys() != self.live.keys():
            raise self._changed(min(live.keys() ^ self.live.keys()))
        if numbers := [name for name, parameter in live.items() if parameter.is_complex()]:
            raise ValueError(
                f"{self._title} trains real coefficients, and `{numbers[0]}` holds complex numbers. Leave it out:"
                f" `selection=Selection(exclude=[{numbers[0]!r}])`; EMA and SWA average it."
            )
        self.live = live
        self._shapes = {name: parameter.shape for name, parameter in live.items()}
        self.live_buffers = inventory.buffers

    @property
    def shared_parameters(self) -> Weights:
        """The live parameters that are in no snapshot."""
        parameters = self.publisher.inventory.parameters
        return weights.local({name: p.detach() for name, p in parameters.items() if name not in self.live})

    def _changed(self, name: str) -> ValueError:
        return ValueError(
            f"{self._title} trains in the span of its snapshots, so the parameters that are trained must stay the same,"
            f" but `{name}` was frozen, unfrozen, or replaced."
        )

    # ---- the first stage

    def collect_from(self, trajectory: Trajectory) -> None:
        """Takes the weights of a run's checkpoints as snapshots, and the buffers of the last one.

        Raises:
            ValueError: If one is of another model.
        """
        names = weights.state_dict_names(self.publisher.module)
        for checkpoint, stored in zip(trajectory, trajectory.stream(), strict=True):
            found = {names[key]: tensor for key, tensor in stored.items() if key in names}
            needed = {name: found[name] for name in self.tensors if name in found}
            if difference := weights.first_mismatch(self.tensors, needed):
                raise ValueError(f"{checkpoint.path} is of another model than the one that is trained: {difference}.")
            self.subspace.collect(found)
        weights.copy_(self.live_buffers, found)

    def collect(self, nonfinite: set[str], step: int) -> None:
        """Copies the weights, unless one of them holds a NaN or an infinity."""
        if culprits := nonfinite & self.live.keys():
            self._skip(f"`{min(culprits)}` holds a NaN or an infinity after applied step {step}")
        else:
            self.subspace.collect(self.live)

    def _skip(self, what: str) -> None:
        self._counts.skipped += 1
        if self._counts.skipped == 1:
            rank_zero_warn(f"{self._title}: {what}. It is left out; `skipped_nonfinite` counts how often.")

    # ---- the second stage

    def begin(self, step: int) -> None:
        """Goes to the mean of the snapshots, whose coefficients are trained from here on."""
        self.subspace.begin(self.live)
        rank_zero_info(
            f"{self._title}: from step {step} on, {self.subspace.rank} coefficients of {self.subspace.count} snapshots"
            f" are trained, from their mean, for {self.plan.end - step} steps."
        )

    def take_over(self, train: Callable[[Optimizer], None]) -> None:
        """Calls ``train`` in the place of the optimizer's step: its hooks run as ever, its state stays as it is."""
        optimizer = self.publisher.trainer.optimizers[0]

        def around(original: Any, closure: Any = None, **kwargs: Any) -> Any:
            def step(optimizer: Optimizer) -> Any:
                result = None
                if closure is not None:
                    with torch.enable_grad():
                        result = closure()
                train(optimizer)
                return result

            optimizer._opt_called = True  # what schedulers ask
            return Optimizer.profile_hook_step(step)(optimizer)

        self.publisher.patches.replace(optimizer, "step", around)

    def train(self, optimizer: Optimizer, step: int, lr: float, schedule: Literal["linear", "constant"]) -> bool:
        """One step on the coefficients; whether there was a gradient.

        Args:
            optimizer: Whose step it is the place of.
            step: Applied steps before it.
            lr: Learning rate at the start of the stage.
            schedule: ``"linear"`` lets it fall to 0 at the end of the run.
        """
        if was_skipped(optimizer):
            return False
        scale = getattr(optimizer, "grad_scale", None)
        gradients = {name: parameter.grad for name, parameter in self.live.items()}
        if all(gradient is None for gradient in gradients.values()):
            return False  # the training step asked for none
        taken = self._counts.stage_steps
        if schedule == "linear":
            lr *= max(0.0, 1.0 - taken / (taken + self.plan.end - step))
        if not self.subspace.step(self.live, gradients, lr, 1.0 if scale is None else float(scale)):
            self._skip(f"the gradient holds a NaN or an infinity at applied step {step + 1}")
        self._counts.stage_steps += 1
        return True

    def to_host(self) -> None:
        """Follows the module to host memory."""
        host = torch.device("cpu")
        self.subspace.to_devices_of({name: torch.empty(0, device=host) for name in self.live})
