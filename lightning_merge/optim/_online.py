"""What online merging by any rule has in common: the wrapped step, the stored task vector, the add that loses nothing.

The update of the wrapped optimizer is the difference of the parameters around its step. It is stepped a few tensors at
a time, so that the copy of the parameters that this takes is small.
"""

import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_merge._checks import instance, names, number, one_of, whole
from lightning_merge._checks import seed as checked_seed
from lightning_merge._mergeable import why_not
from lightning_merge.optim._blocks import PIECE, Draw
from lightning_merge.optim._task_vector import Source, Stored, named, tensors_of
from lightning_merge.weights import Inventory
from lightning_merge.weights._held import Part, held_of, part_held
from lightning_merge.weights._precision import work_dtype

Form = Literal["paper", "official"]
Rescale = Literal["none", "inverse_p", "l1"]
AlphaSchedule = Literal["constant", "lr"]
Group = dict[str, Any]

_SPARSE_BELOW = 0.25  # a kept element takes 12 bytes, a dense one 4
_GOLDEN = (5**0.5 - 1) / 2
# The last place of a number is the power of two in it times this.
_EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Share:
    """What of one group is stepped in a call of the wrapped optimizer, and what of that is merged then."""

    group: Group
    parameters: list[Tensor]
    merged: list[Tensor]


@dataclass(frozen=True)
class Turn:
    """One tensor at one merge: what the rule needs to know.

    Attributes:
        update: Share of the policy's update that is applied, ``1 - alpha``.
        reference: What the task vector is multiplied by; 0 when it is not its turn.
        decay: Learning rate times decoupled weight decay.
        dither: What is added before cutting off, in last places, in [0, 1); see ``add_``.
        dtype: The parameter's.
    """

    name: str
    part: Part
    tau: Stored
    draw: Draw
    update: float
    reference: float
    decay: float
    dither: float
    dtype: torch.dtype


class OnlineMerging(Optimizer):
    """Base of ``OnDARE`` and ``OnTIES``, which say how an update is merged with the task vector.

    Attributes:
        base: The wrapped optimizer. It owns state and parameter groups, which are shared.
        tau: The sparsified task vector by parameter name, as it is stored.
        tau_every: Merges from one addition of the task vector to the next.
    """

    tau_every = 1

    def __init__(
        self,
        base_optimizer: Optimizer,
        reference: Source | None,
        pretrained: Source | Literal["zero"] | None,
        density: float,
        alpha: float,
        form: Form,
        rescale: Rescale,
        alpha_schedule: AlphaSchedule,
        merge_every: int,
        seed: int,
        min_numel: int,
        exempt: Sequence[str],
        module: nn.Module | None,
        tau_dtype: torch.dtype | None,
        tau: Mapping[str, Mapping[str, Any]] | None,
        chunk_size: int | None,
    ) -> None:
        _check_optimizer(base_optimizer, chunk_size)
        density = number("density", density, "(0, 1]")
        alpha = number("alpha", alpha, "[0, 1]")
        for argument, choice, kind in (
            ("form", form, Form),
            ("rescale", rescale, Rescale),
            ("alpha_schedule", alpha_schedule, AlphaSchedule),
        ):
            one_of(argument, choice, kind, f"one of {get_args(kind)}")
        merge_every, min_numel = whole("merge_every", merge_every, 1), whole("min_numel", min_numel, 0)
        seed, exempt = checked_seed("seed", seed), names("exempt", exempt)
        chunk_size = None if chunk_size is None else checked_chunk_size(chunk_size)
        if module is not None:
            instance("module", module, nn.Module, "a module")
        if tau_dtype is not None and not instance("tau_dtype", tau_dtype, torch.dtype, "a dtype").is_floating_point:
            raise ValueError(f"`tau_dtype` must be of floating-point numbers, got {tau_dtype}.")
        if tau is not None:
            instance("tau", tau, Mapping, "what `tau_state()` gave")
        if (tau is None) == (reference is None) or (tau is None) != (pretrained is not None):
            raise ValueError(
                "give either `reference` and `pretrained`, of which the difference is merged, or `tau`. `pretrained`"
                " may be 'zero' if `reference` is a difference already."
            )
        self._ready = False
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        super().__init__(base_optimizer.param_groups, dict(base_optimizer.defaults))
        self.base = base_optimizer
        self.density = density
        self.form = form
        self.rescale = rescale
        self.alpha_schedule = alpha_schedule
        self.merge_every = merge_every
        self.seed = seed
        self.min_numel = min_numel
        self.chunk_size = chunk_size
        self._share()
        base_optimizer.register_load_state_dict_post_hook(lambda _: self._share())
        self._names = _names(base_optimizer, module, reference)
        self._defaults = {"merge": True, "merge_alpha": alpha, "merge_step": 0, "merge_pending": 0.0}
        for group in self.param_groups:
            # Lightning, GradScaler and files see groups, so what must survive a resume lives in them.
            for key, value in self._defaults.items():
                group.setdefault(key, value)
            group["merge_top_lr"] = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
        self._exempt = {
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if not group["merge"]
            or not parameter.is_floating_point()
            or any(fnmatchcase(self._names[parameter], pattern) for pattern in exempt)
        }
        self._refuse_unmergeable(exempt)
        merged = {self._names[p]: p for g in self.param_groups for p in g["params"] if p not in self._exempt}
        if not merged:
            raise ValueError(f"`exempt` {tuple(exempt)} and groups with `merge: False` leave no parameter to merge.")
        self._parts = {name: part_held(name, p) for name, p in merged.items()}
        if tau is None:
            assert reference is not None
            assert pretrained is not None
            self.tau = self._task_vector(merged, reference, pretrained, tau_dtype)
        else:
            self.tau = _loaded(tau, merged)
        self._fingerprint = self._measure(merged)
        for group in self.param_groups:
            group["merge_fingerprint"] = self._fingerprint
        self._checked = chunk_size is None
        self._ready = True

    def _refuse_unmergeable(self, exempt: Sequence[str]) -> None:
        """What trains and cannot be merged has to be left out in so many words."""
        for group in self.param_groups:
            for parameter in group["params"] if group["merge"] else ():
                name = self._names[parameter]
                reason = "holds complex numbers" if parameter.is_complex() else why_not(parameter)
                if reason and not any(fnmatchcase(name, pattern) for pattern in exempt):
                    raise ValueError(
                        f"`{name}` {reason}; signs and masks are of real numbers. Leave it out: `exempt=[{name!r}]`, or"
                        " a parameter group with `merge` False."
                    )

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the wrapped optimizer and merges its update.

        Args:
            closure: Computes the loss and its gradients again; called once.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: If the wrapped optimizer replaced a parameter's memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for pre_hook in list(self.base._optimizer_step_pre_hooks.values()):
            pre_hook(self.base, (), {})
        for shares in list(self._calls()):
            self._step_and_merge(shares)
        for group in self.param_groups:
            if self._due(group):
                applied = self._applies(group)
                group["merge_pending"] = 0.0 if applied else group["merge_pending"] + self._alpha(group)
            group["merge_step"] += 1
        for optimizer in (self, self.base):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedules look for
        for post_hook in list(self.base._optimizer_step_post_hooks.values()):
            post_hook(self.base, (), {})
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # so does this; a schedule may move here from `base`

    @abstractmethod
    def _merge_into(self, after: Tensor, before: Tensor, turn: Turn) -> None:
        """Writes the merged values into ``after``, given this process's values, flat, around the wrapped step."""

    def _applies(self, group: Group) -> bool:
        """Whether this merge adds the task vector."""
        return bool((group["merge_step"] + 1) // self.merge_every % self.tau_every == 0)

    def _merges_nothing(self, group: Group) -> bool:
        return not group["merge"] or (group["merge_alpha"] == 0 and self.density == 1)

    def _step_and_merge(self, shares: list[Share]) -> None:
        """Steps these parameters by one call and merges what came of it."""
        before = [self._starts(share.merged) for share in shares]
        memory = [held_of(p).data_ptr() for share in shares for p in share.merged]
        known = None if self._checked else self._traces(shares)
        decays = self._step_base(shares)
        if known is not None:
            self._refuse_coupled(known, self._traces(shares))
        if memory != [held_of(p).data_ptr() for share in shares for p in share.merged]:
            raise RuntimeError(
                f"{type(self.base).__name__} replaces parameters instead of writing to them, so its update is not seen."
                " Use an optimizer that updates in place."
            )
        for share, starts, decay in zip(shares, before, decays, strict=True):
            due = self._due(share.group)
            for parameter, start in zip(share.merged, starts, strict=True):
                if due:
                    self.state[parameter].pop("merge_anchor", None)
                    self._merge_one(share.group, parameter, held_of(start), decay)
                else:  # after the wrapped step, since an optimizer starts its state where it finds none
                    self.state[parameter]["merge_anchor"] = start

    def _merge_one(self, group: Group, parameter: Tensor, before: Tensor, decay: float) -> None:
        name = self._names[parameter]
        whole, held = self._parts[name], held_of(parameter)
        dtype = work_dtype(held)
        count = group["merge_step"] // self.merge_every // self.tau_every
        alpha = self._alpha(group)
        turn = Turn(
            name=name,
            part=whole,
            tau=self.tau[name],
            draw=Draw(self.seed, group["merge_step"] + 1, name, whole.numel, held.device),
            update=1.0 - alpha,
            reference=group["merge_pending"] + alpha if self._applies(group) else 0.0,
            decay=decay,
            dither=(count + 0.5) * _GOLDEN % 1.0,
            dtype=held.dtype,
        )
        after = held.to(dtype).reshape(-1)
        self._merge_into(after, before.to(dtype).reshape(-1), turn)
        if after.data_ptr() != held.data_ptr():
            held.copy_(after.view_as(held))

    def _due(self, group: Group) -> bool:
        return bool((group["merge_step"] + 1) % self.merge_every == 0)

    def _alpha(self, group: Group) -> float:
        share = 1.0 if self.alpha_schedule == "constant" else float(group["lr"]) / group["merge_top_lr"]
        return float(group["merge_alpha"]) * share

    def _l1(self, sums: Tensor, whole: Part) -> float:
        """What brings a tensor back to its sum of magnitudes; ``sums`` are those of this process, before and after."""
        full, left = whole.total_(sums).tolist()
        return float(full / left) if left else 1.0

    # ---- the wrapped optimizer

    def _calls(self) -> Iterator[list[Share]]:
        """What is stepped together: parameters with gradients in groups of a few, or all at once."""
        shares = []
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            plain = {p for p in given if p in self._exempt or self._merges_nothing(group)}
            shares.append(Share(group, given, [p for p in given if p not in plain]))
        if self.chunk_size is None:
            yield shares
            return
        for share in shares:
            if plain_ones := [p for p in share.parameters if p not in set(share.merged)]:
                yield [Share(share.group, plain_ones, [])]
            yield from ([Share(share.group, few, few)] for few in self._few(share.merged, self.chunk_size))

    @staticmethod
    def _few(parameters: list[Tensor], most: int) -> Iterator[list[Tensor]]:
        """Parameters of one dtype and device with at most so many elements, or one parameter."""
        held: list[Tensor] = []
        size = 0
        for parameter in parameters:
            numel = held_of(parameter).numel()
            like = not held or (held[0].dtype, held[0].device) == (parameter.dtype, parameter.device)
            if held and (not like or size + numel > most):
                yield held
                held, size = [], 0
            held, size = [*held, parameter], size + numel
        if held:
            yield held

    def _step_base(self, shares: list[Share]) -> list[float]:
        """Steps these parameters only; returns learning rate times the weight decay that was left out, of each."""
        base = self.base
        groups, pre, post = base.param_groups, base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
        before = [(share.group["params"], share.group.get("weight_decay")) for share in shares]
        decays = [self._separate_decay(share) for share in shares]
        try:
            base.param_groups = [share.group for share in shares]
            base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
            for share, decay in zip(shares, decays, strict=True):
                share.group["params"] = share.parameters
                if decay:
                    share.group["weight_decay"] = 0.0
            base.step()
        finally:
            base.param_groups = groups
            base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = pre, post
            for share, decay, (parameters, weight_decay) in zip(shares, decays, before, strict=True):
                share.group["params"] = parameters
                if decay:
                    share.group["weight_decay"] = weight_decay
        return decays

    def _separate_decay(self, share: Share) -> float:
        """Learning rate times the decoupled weight decay that the step leaves out, as the published update does.

        It is applied to the result; to what is not merged here, before the step, as optimizers do.
        """
        group = share.group
        if not share.merged or self.merge_every > 1 or not group.get("decoupled_weight_decay"):
            return 0.0
        decay = float(group["lr"]) * float(group["weight_decay"])
        merged = set(share.merged)
        for parameter in share.parameters:
            if parameter not in merged:
                parameter.mul_(1.0 - decay)
        return decay

    def _traces(self, shares: list[Share]) -> dict[str, Any]:
        """What an optimizer keeps that belongs to no single tensor."""
        base = self.base
        kept: dict[str, Any] = {key: value for key, value in vars(base).items() if isinstance(value, (int, float))}
        kept |= {str(key): repr(value) for key, value in base.state.items() if not isinstance(key, Tensor)}
        for share in shares:
            for key, value in share.group.items():
                if isinstance(value, Tensor) and value.numel() == 1:
                    kept[key] = float(value)
                elif not isinstance(value, (Tensor, list)):
                    kept[key] = value
        return {key: value for key, value in kept.items() if key not in ("_opt_called", "_step_count")}

    def _refuse_coupled(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        self._checked = True
        changed = [key for key in after if after[key] != before.get(key)]
        if changed:
            raise ValueError(
                f"{type(self.base).__name__} keeps `{changed[0]}` of its steps, not of a tensor, so it cannot be"
                " stepped a few tensors at a time. Give `chunk_size=None`, which takes a copy of the parameters during"
                " the step."
            )

    def _starts(self, parameters: list[Tensor]) -> list[Tensor]:
        """Where this round of steps began; with the optimizer's state from its first step to its last."""
        if self.merge_every > 1:
            anchors = [self.state[p].get("merge_anchor") if p in self.state else None for p in parameters]
            return [p.detach().clone() if a is None else a for p, a in zip(parameters, anchors, strict=True)]
        held = [held_of(p) for p in parameters]
        size = sum(t.numel() for t in held)
        if not held or self.chunk_size is None or size > self.chunk_size:
            return [t.clone() for t in held]
        # Memory of its own, as new memory costs more than the copy.
        key = (held[0].dtype, held[0].device)
        if key not in self._scratch or self._scratch[key].numel() < size:
            self._scratch[key] = torch.empty(size, dtype=key[0], device=key[1])
        parts = torch.split(self._scratch[key][:size], [t.numel() for t in held])
        return [part.view(t.shape).copy_(t) for part, t in zip(parts, held, strict=True)]

    def _share(self) -> None:
        self.state = self.base.state
        self.param_groups = self.base.param_groups

    # ---- the task vector

    @abstractmethod
    def _sparsify(self, dense: Tensor, name: str, whole: Part) -> tuple[Tensor, Tensor | None]:
        """The task vector of one tensor with what is dropped at 0 and the rest rescaled, and where it was kept."""

    def is_dense(self, whole: Part) -> bool:
        """Whether a tensor is merged in full."""
        return self.density == 1 or whole.numel < self.min_numel

    @torch.no_grad()
    def _task_vector(
        self,
        merged: dict[str, Tensor],
        reference: Source,
        pretrained: Source | Literal["zero"],
        dtype: torch.dtype | None,
    ) -> dict[str, Stored]:
        ours, theirs = tensors_of(reference, "reference"), tensors_of(pretrained, "pretrained")
        if ours is None:
            raise ValueError("`reference` must be a module, named tensors or the path of a checkpoint, got 'zero'.")
        found = {}
        for name, parameter in merged.items():
            whole, work = self._parts[name], work_dtype(parameter)
            device = held_of(parameter).device
            dense = _held(named(ours, name, parameter.shape, "reference"), whole, device, work)
            if theirs is not None:
                dense = dense - _held(named(theirs, name, parameter.shape, "pretrained"), whole, device, work)
            dense, index = self._sparsify(dense, name, whole)
            sparse = self.density < _SPARSE_BELOW and not self.is_dense(whole)
            found[name] = Stored.of(dense, index if sparse else None, dtype or work)
        return found

    def _measure(self, merged: dict[str, Tensor]) -> float:
        """The sum of magnitudes of what is kept; equal on all ranks and in a resumed run.

        Raises:
            ValueError: If there is nothing to merge.
        """
        total = 0.0
        for name in merged:
            size = self.tau[name].values.abs().sum(dtype=torch.float64).float().view(1)
            total += float(self._parts[name].total_(size))
        if total == 0 or not math.isfinite(total):
            what = "is 0 everywhere" if total == 0 else "holds a NaN or an infinity"
            raise ValueError(
                f"the difference of `reference` and `pretrained`, as far as density {self.density} keeps it, {what}, so"
                " merging would do nothing of use. Is one of them the other's file?"
            )
        return total

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group that is not merged, ``{"params": ..., "merge": False}``: there is no task vector for others.

        Raises:
            ValueError: If the group does not say ``"merge": False``.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        if param_group.get("merge", True):
            raise ValueError("a group added after construction has no task vector: give it `merge` False.")
        self.base.add_param_group(param_group)
        for key, value in self._defaults.items():
            param_group.setdefault(key, value)
        param_group["merge_top_lr"] = float(param_group["lr"])
        param_group["merge_fingerprint"] = self._fingerprint
        self._exempt.update(param_group["params"])
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, which loads into it as well. The task vector is not in it: ``tau_state`` is."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state that this optimizer or the wrapped one wrote.

        Raises:
            ValueError: If it was written with another task vector.
        """
        for group in state_dict["param_groups"]:
            saved = group.get("merge_fingerprint", self._fingerprint)
            if abs(saved - self._fingerprint) > 1e-4 * self._fingerprint:
                raise ValueError(
                    f"the state was saved with another task vector (sum of magnitudes {saved:.6g} instead of"
                    f" {self._fingerprint:.6g}): give `reference`, `pretrained`, `density` and `seed` of the saved run."
                )
        ours = [{key: g[key] for key in g if key.startswith("merge")} for g in self.param_groups]
        self.base.load_state_dict(state_dict)
        self._share()
        for group, defaults in zip(self.param_groups, ours, strict=True):
            for key, value in defaults.items():
                group.setdefault(key, value)

    def tau_state(self) -> dict[str, dict[str, Any]]:
        """The task vector as plain data, to be given as ``tau`` when there is no file to read it from again."""
        return {name: {"values": kept.values, "index": kept.index} for name, kept in self.tau.items()}

    @property
    def tau_bytes(self) -> int:
        """Bytes that the stored task vector takes on this process."""
        return sum(kept.nbytes for kept in self.tau.values())


def add_(increment: Tensor, before: Tensor, turn: Turn) -> None:
    """``increment <- before + increment``, rounded so that steps below the resolution add up over merges.

    Rounding to nearest would lose every increment under half a last place of the weight. Here increments are counted in
    last places and cut off after adding ``turn.dither``, which moves from merge to merge along a golden-ratio sequence
    that fills [0, 1) evenly: after n merges the sum of what was added is within about two last places of exact.
    """
    if turn.decay:
        increment.mul_(1.0 - turn.decay).add_(before, alpha=-turn.decay)
    if not turn.reference or turn.dtype not in _EPSILON:
        torch.add(before, increment, out=increment)
        return
    # The power of two in a weight is its exponent bits; beside weights below 2**-60 no increment is lost.
    place = before.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    place.clamp_(min=2.0**-60).mul_(_EPSILON[turn.dtype])
    increment.div_(place)
    increment.add_(increment.sign(), alpha=turn.dither).trunc_()
    torch.addcmul(before, increment, place, out=increment)


def ranges(numel: int) -> Iterator[slice]:
    """Slices of a piece's size, which bound what is computed at once."""
    return (slice(i, min(i + PIECE, numel)) for i in range(0, numel, PIECE))


def _held(tensor: Tensor, whole: Part, device: torch.device, dtype: torch.dtype) -> Tensor:
    """This process's part, flat, of a tensor that may be whole or cut in the same way."""
    flat = held_of(tensor).reshape(-1)
    if flat.numel() == whole.numel:
        flat = flat[whole.start : whole.stop]
    return flat.to(device=device, dtype=dtype)


def _loaded(tau: Mapping[str, Mapping[str, Any]], merged: dict[str, Tensor]) -> dict[str, Stored]:
    if missing := [name for name in merged if name not in tau]:
        raise ValueError(f"`tau` lacks `{missing[0]}`, which the optimizer updates.")
    found = {}
    for name, parameter in merged.items():
        device, index = held_of(parameter).device, tau[name]["index"]
        found[name] = Stored(tau[name]["values"].to(device), None if index is None else index.to(device))
    return found


def _names(optimizer: Optimizer, module: nn.Module | None, reference: Source | None) -> dict[Tensor, str]:
    """The name of every parameter of an optimizer: from a module that holds it, or from the optimizer's groups."""
    source = module if module is not None else reference if isinstance(reference, nn.Module) else None
    known: dict[Tensor, str] = {}
    if source is not None:
        found = Inventory(source)
        known = {parameter: name for name, parameter in found.parameters.items()}
        known |= {other: name for name, others in found.ties.items() for other in others}
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter not in known and "param_names" in group:
                known[parameter] = group["param_names"][i]
            if parameter not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has no name: give `module`, the model that"
                    f" {type(optimizer).__name__} updates, or build it from `model.named_parameters()`."
                )
    return known


def checked_chunk_size(chunk_size: int) -> int:
    """How many elements a call of the wrapped optimizer takes."""
    try:
        return whole("chunk_size", chunk_size, 1)
    except (TypeError, ValueError):
        raise ValueError(f"`chunk_size` must be at least 1 or None, got {chunk_size!r}.") from None


def _check_optimizer(optimizer: Optimizer, chunk_size: int | None) -> None:
    if isinstance(optimizer, OnlineMerging):
        raise ValueError(f"`base_optimizer` merges already, got {type(optimizer).__name__}.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`base_optimizer` must be a torch optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, LBFGS):
        raise ValueError("`base_optimizer` must update once per step, got LBFGS, which searches along a line.")
    clips = any(settings.get("max_grad_norm") for settings in (optimizer.defaults, *optimizer.param_groups))
    if clips and chunk_size is not None:
        raise ValueError(
            f"`chunk_size` must be None, got {chunk_size}: {type(optimizer).__name__} limits the norm of all gradients"
            " together (`max_grad_norm`), and would see those of a few tensors at a time. Or switch that off, and clip"
            " by the Trainer's `gradient_clip_val`."
        )
