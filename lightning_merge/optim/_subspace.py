"""Training in the span of stored weights."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from lightning_merge._checks import number, one_of, whole
from lightning_merge._mergeable import named
from lightning_merge.optim._basis import block_norms, mean_of, orthonormal
from lightning_merge.optim._spread import gathered, owners_of, rank, send_to_all, sum_over_ranks_
from lightning_merge.weights import State, Weights, average_dtype, free_bytes, nonfinite, refuse_without_room

Form: TypeAlias = Literal["centred", "iclr", "journal"]
Store: TypeAlias = Literal["device", "cpu"]


class Subspace:
    """Weights ``centre + sum_i c_i (w_i - centre)`` of ``n`` collected ``w_i``, whose coefficients are trained.

    - ``"centred"``: the centre is the mean and ``c = C^T x``, where the rows of ``C D`` are orthonormal (``D``: the
      centred weights as rows; ``C`` from the eigenvectors of ``D D^T``, largest eigenvalue first). The optimizer works
      on ``x``, which starts at 0, and the weights of the ``w_i`` sum to one.
    - ``"iclr"``: no centre, so their sum is free: exactly SGD on all weights with the gradient projected on the span of
      the ``w_i``, weight decay included. Starts at the mean.
    - ``"journal"``: each tensor has coefficients of its own, of its normalised differences to the mean; no
      orthogonalisation. Differences are not quantised.

    It holds the ``n`` copies and, from ``begin`` on, their mean. There is no second matrix of that size. With several
    processes (DDP) each holds the copies of its share of the tensors; a step sums ``n`` numbers (``"journal"``: per
    tensor) over them and sends every new weight once.

    Args:
        like: Names, shapes, dtypes, and devices of the weights.
        capacity: Most weights that can be collected; at least 2.
        form: ``"centred"``, ``"iclr"`` or ``"journal"``.
        store: ``"device"`` where the weights are, or ``"cpu"``: host memory, where the products are then computed too.
        optimizer: What works on the coefficients: ``"sgd"`` or ``"adamw"``.
        momentum: Of SGD, in [0, 1).
        weight_decay: At least 0. It pulls ``x`` to 0, that is the weights to the mean; with ``"iclr"`` to 0.

    Raises:
        ValueError: If an argument is out of range.
        MemoryError: If the copies do not fit; nothing has been allocated then.

    Example:
        >>> weights = {"w": torch.zeros(2)}
        >>> subspace = Subspace(weights, capacity=2)
        >>> for point in ([1.0, 0.0], [0.0, 1.0]):
        ...     subspace.collect({"w": torch.tensor(point)})
        >>> subspace.begin(weights)
        >>> subspace.step(weights, {"w": torch.tensor([1.0, 0.0])}, lr=0.5)
        True
        >>> weights["w"], subspace.coefficients
        (tensor([0.2500, 0.7500]), tensor([0.2500, 0.7500], dtype=torch.float64))

    References:
        Li et al., "Trainable weight averaging: efficient training by optimizing historical solutions", ICLR 2023,
        algorithm 1 (``"iclr"``), and its journal version, "Trainable weight averaging: accelerating training and
        improving generalization", 2025 (``"journal"``).
    """

    def __init__(
        self,
        like: Mapping[str, Tensor],
        capacity: int,
        form: Form = "centred",
        store: Store = "device",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        momentum, weight_decay = check_settings(form, store, optimizer, momentum, weight_decay)
        capacity = whole("capacity", capacity, 2)
        named("like", like)
        if numbers := [name for name, tensor in like.items() if tensor.is_complex()]:
            raise ValueError(
                f"a subspace has real coefficients, and `{numbers[0]}` holds complex numbers. Leave it out, or hand in"
                " `torch.view_as_real` of it."
            )
        self.form = form
        self.store = store
        self.optimizer = optimizer
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.names = list(like)
        self.count = 0
        self._owners = owners_of(like)
        own = {name: tensor for name, tensor in like.items() if self._owners[name] == rank()}
        devices = {name: torch.device("cpu") if store == "cpu" else tensor.device for name, tensor in own.items()}
        _check_room(own, devices, capacity)
        self._rows: Weights = {
            name: torch.empty(capacity, tensor.numel(), dtype=average_dtype(tensor), device=devices[name])
            for name, tensor in own.items()
        }
        self._centre: Weights = {}
        self._reach = torch.empty(0)  # C; in "journal" the reciprocal norms, [tensors, n]
        self._x = torch.empty(0)
        self._optimizer: Optimizer | None = None

    @property
    def begun(self) -> bool:
        """Whether coefficients are trained."""
        return self._optimizer is not None

    @property
    def rank(self) -> int:
        """Numbers that are trained."""
        return self._x.numel()

    @property
    def coefficients(self) -> Tensor:
        """The weight of each collected ``w_i``, ``[n]``; in ``"journal"`` of each tensor's, ``[tensors, n]``."""
        c = self._c().detach()
        if self.form == "iclr":
            return c
        return c + (1.0 - c.sum(-1, keepdim=True)) / self.count

    # ---- collecting

    @torch.no_grad()
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        """Copies the weights.

        Args:
            weights: Weights by name, of the names and shapes of ``like``; not changed.

        Raises:
            ValueError: If there is no room left, training has begun, or a tensor holds a NaN or an infinity.
        """
        if broken := nonfinite({name: weights[name] for name in self.names}):
            raise ValueError(
                f"`{min(broken)}` holds a NaN or an infinity, of which no mean and no basis can be made. Leave these"
                " weights out."
            )
        capacity = next(iter(self._rows.values())).shape[0] if self._rows else self.count + 1
        if self.begun or self.count >= capacity:
            raise ValueError(f"`capacity` is {capacity}, and {self.count} weights are collected already.")
        for name, rows in self._rows.items():
            rows[self.count].copy_(weights[name].detach().reshape(-1))
        self.count += 1

    @torch.no_grad()
    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the basis, and writes the mean of what was collected into ``weights``.

        Args:
            weights: The live weights, by name; written to.

        Raises:
            ValueError: If fewer than two of the collected weights differ.
        """
        for name, rows in self._rows.items():
            self._rows[name] = rows = rows[: self.count]
            if self.form != "iclr":
                self._centre[name] = mean_of(rows)
                rows.sub_(self._centre[name])
        if self.form == "journal":
            self._reach, start = block_norms(self._rows, self._centre, self.count, self.names)
        else:
            self._reach, start = orthonormal(self._rows, self._centre, self.count, self.form == "centred")
        if not self._reach.numel() or not bool(self._reach.any()):
            raise ValueError(
                f"at least two different weights have to be collected, and the {self.count} that were are equal up to"
                " rounding. Collect over a longer stretch, or with a larger learning rate."
            )
        self._start_optimizer(start)
        self.write(weights)

    # ---- training

    @torch.no_grad()
    def step(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], lr: float, scale: float = 1.0
    ) -> bool:
        """One step of the optimizer on the coefficients; writes the new weights.

        Returns False, and does nothing, if the gradient along the snapshots is not finite.

        Args:
            weights: The live weights, which are what ``gradients`` were taken at.
            gradients: By name; the same on all ranks. ``None``: zero.
            lr: At least 0.
            scale: What the gradients were multiplied with, as by a gradient scaler.
        """
        assert self._optimizer is not None
        products = torch.zeros(len(self.names), self.count, dtype=torch.float64)
        for index, name in enumerate(self.names):
            gradient = gradients.get(name)
            if name in self._rows and gradient is not None:
                rows, dense = (
                    self._rows[name],
                    gradient.to_dense() if gradient.layout is not torch.strided else gradient,
                )
                products[index] = torch.mv(rows, dense.reshape(-1).to(rows))
        sum_over_ranks_(products)
        if not bool(products.isfinite().all()):
            return False
        products /= scale
        self._x.grad = products * self._reach if self.form == "journal" else self._reach @ products.sum(0)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.write(weights)
        return True

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Writes the weights of the present coefficients into ``weights``.

        Args:
            weights: The live weights, by name; written to.
        """
        c = self._c()
        for index, name in enumerate(self.names):
            if name in self._rows:
                rows, target = self._rows[name], weights[name].detach()
                share = (c[index] if c.ndim == 2 else c).to(rows)
                direct = target.is_contiguous() and target.dtype == rows.dtype and target.device == rows.device
                out = target.view(-1) if direct else None
                if self._centre:
                    flat = torch.addmv(self._centre[name], rows.T, share, out=out)
                else:
                    flat = torch.mv(rows.T, share, out=out)
                if not direct:
                    target.copy_(flat.view(target.shape))
        send_to_all(weights, self._owners)

    def _c(self) -> Tensor:
        return self._x * self._reach if self.form == "journal" else self._x @ self._reach

    def _start_optimizer(self, x: Tensor) -> None:
        self._x = x.clone().requires_grad_()
        if self.optimizer == "adamw":
            self._optimizer = AdamW([self._x], lr=1.0, weight_decay=self.weight_decay)
        else:
            self._optimizer = SGD([self._x], lr=1.0, momentum=self.momentum, weight_decay=self.weight_decay)

    # ---- saving

    def save(self) -> State:
        """Everything it goes on from: with several processes on every one of them, since each is asked for its part."""
        return {
            "count": self.count,
            "rows": gathered(self._rows),
            "centre": gathered(self._centre),
            "reach": self._reach,
            "x": self._x.detach(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, saved: State) -> None:
        """Takes over what ``save`` gave.

        Args:
            saved: What ``save`` gave.

        Raises:
            ValueError: If it is of another model.
        """
        for name, rows in self._rows.items():
            if name not in saved["rows"] or saved["rows"][name].shape[1] != rows.shape[1]:
                raise ValueError(f"the collected weights are of another model: `{name}` is missing or of another size.")
            found = saved["rows"][name]
            self._rows[name] = found.to(rows) if len(found) >= len(rows) or saved["optimizer"] else rows
            if self._rows[name] is rows:
                rows[: saved["count"]] = found[: saved["count"]].to(rows)
        self.count = saved["count"]
        self._centre = {n: saved["centre"][n].to(rows) for n, rows in self._rows.items() if n in saved["centre"]}
        self._reach = saved["reach"].cpu()
        if saved["optimizer"] is not None:
            self._start_optimizer(saved["x"].cpu())
            assert self._optimizer is not None
            self._optimizer.load_state_dict(saved["optimizer"])

    def to_devices_of(self, weights: Mapping[str, Tensor]) -> None:
        """Moves the copies to where these weights are; with ``store="cpu"`` they stay.

        Args:
            weights: The live weights, by name.
        """
        if self.store == "device":
            for held in (self._rows, self._centre):
                held.update({name: tensor.to(weights[name].device) for name, tensor in held.items()})


def check_settings(
    form: str, store: str, optimizer: str, momentum: float, weight_decay: float, argument: str = "optimizer"
) -> tuple[float, float]:
    """Momentum and weight decay as Python's numbers.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: If one is out of range; ``argument`` is what the caller calls the optimizer of coefficients.
    """
    one_of("form", form, Form)
    one_of("store", store, Store)
    one_of(argument, optimizer, ("sgd", "adamw"))
    momentum = number("momentum", momentum, "[0, 1)")
    weight_decay = number("weight_decay", weight_decay, "[0, inf)")
    if form == "iclr" and optimizer == "adamw":
        raise ValueError(
            "`form='iclr'` is SGD on projected gradients; AdamW depends on the choice of the basis. Take"
            " `form='centred'`, whose basis is fixed."
        )
    return momentum, weight_decay


def _check_room(own: Mapping[str, Tensor], devices: Mapping[str, torch.device], capacity: int) -> None:
    needed: dict[torch.device, int] = {}
    for name, tensor in own.items():
        size = (capacity + 1) * tensor.numel() * average_dtype(tensor).itemsize
        needed[devices[name]] = needed.get(devices[name], 0) + size
    for device, size in needed.items():
        needs = f"{capacity} collected weights and their mean need {size:,} bytes on {device}"
        cure = "Take fewer of them." if device.type == "cpu" else "Take `store='cpu'` or fewer of them."
        refuse_without_room(size, free_bytes(device), needs, cure)
