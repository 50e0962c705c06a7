"""What online merging by any rule has in common: the wrapped step, the stored task vector, the add that loses nothing.

The update of the wrapped optimizer is the difference of the parameters around its step. It is stepped a few tensors at
a time, so that the copy of the parameters that this takes is small.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge._checks import instance
from lightning_merge.optim._blocks import Draw, Generators
from lightning_merge.optim._late import TakesLate
from lightning_merge.optim._parameter_names import LateSource, names_of
from lightning_merge.optim._refused import check_optimizer, refuse_unmergeable
from lightning_merge.optim._rounding import dither_of
from lightning_merge.optim._settings import OnlineSettings
from lightning_merge.optim._side import Side
from lightning_merge.optim._task_vector import Source, Stored, held_part, loaded, magnitude, named, tensors_of
from lightning_merge.optim._turn import Turn
from lightning_merge.optim._wrapped import Group, Share, Wrapped
from lightning_merge.weights import copy_, on_host, unstacked
from lightning_merge.weights._held import Part, held_of, part_held
from lightning_merge.weights._precision import work_dtype

_SPARSE_BELOW = 0.25  # a kept element takes 12 bytes, a dense one 4


class OnlineMerging(TakesLate):
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
        module: nn.Module | None,
        tau: Mapping[str, Mapping[str, Any]] | None,
        settings: OnlineSettings,
    ) -> None:
        if isinstance(base_optimizer, OnlineMerging):
            raise ValueError(f"`base_optimizer` merges already, got {type(base_optimizer).__name__}.")
        check_optimizer(base_optimizer, settings.chunk_size)
        if module is not None:
            instance("module", module, nn.Module, "a module")
        if tau is not None:
            instance("tau", tau, Mapping, "what `tau_state()` gave")
        if (tau is None) == (reference is None) or (tau is None) != (pretrained is not None):
            raise ValueError(
                "give either `reference` and `pretrained`, of which the difference is merged, or `tau`. `pretrained`"
                " may be 'zero' if `reference` is a difference already."
            )
        super().__init__(base_optimizer.param_groups, dict(base_optimizer.defaults))
        self.base = base_optimizer
        self.density = settings.density
        self.form = settings.form
        self.rescale = settings.rescale
        self.alpha_schedule = settings.alpha_schedule
        self.merge_every = settings.merge_every
        self.seed = settings.seed
        self.min_numel = settings.min_numel
        self.chunk_size = settings.chunk_size
        self._wrapped = Wrapped(base_optimizer, settings.merge_every, settings.chunk_size)
        self._ready = True
        self._names = names_of(base_optimizer, module, reference)
        self._source = LateSource(reference, pretrained, module, tau or {}, settings.tau_dtype)
        self._start_groups(settings.alpha)
        merged = self._merged(settings.exempt)
        self._parts = {name: part_held(name, p) for name, p in merged.items()}
        if reference is not None and pretrained is not None:
            self.tau = self._task_vector(merged, reference, pretrained, settings.tau_dtype)
        else:
            self.tau = loaded(tau or {}, merged)
        self._fingerprint = magnitude(self.tau, self._parts, self.density)
        for group in self.param_groups:
            group["merge_fingerprint"] = self._fingerprint

    def _start_groups(self, alpha: float) -> None:
        self._defaults = {"merge": True, "merge_alpha": alpha, "merge_step": 0, "merge_pending": 0.0}
        for group in self.param_groups:
            # Lightning, GradScaler and files see groups, so what must survive a resume lives in them.
            for key, value in self._defaults.items():
                group.setdefault(key, value)
            group["merge_top_lr"] = float(group.get("max_lr", group.get("initial_lr", group["lr"])))

    def _merged(self, exempt: Sequence[str]) -> dict[str, Tensor]:
        """The parameters that are merged, by name."""
        self._exempt = {
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if not group["merge"]
            or not parameter.is_floating_point()
            or any(fnmatchcase(self._names[parameter], pattern) for pattern in exempt)
        }
        self._patterns = tuple(exempt)
        self._known = {parameter for group in self.param_groups for parameter in group["params"]}
        refuse_unmergeable(self.param_groups, self._names, exempt)
        merged = {self._names[p]: p for g in self.param_groups for p in g["params"] if p not in self._exempt}
        if not merged:
            raise ValueError(f"`exempt` {tuple(exempt)} and groups with `merge: False` leave no parameter to merge.")
        return merged

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
        for shares in list(self._wrapped.calls(self._shares())):
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
    def _merge_rows(self, side: Side) -> Tensor:
        """The merged values of tensors side by side; what it is given may be written to."""

    @abstractmethod
    def _merge_into(self, after: Tensor, before: Tensor, turn: Turn) -> None:
        """Writes the merged values into ``after``, given this process's values, flat, around the wrapped step."""

    def _shares(self) -> list[Share]:
        """What has gradients, of every group."""
        self._look()
        shares = []
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            plain = {p for p in given if p in self._exempt or self._merges_nothing(group)}
            shares.append(Share(group, given, [p for p in given if p not in plain]))
        return shares

    def _applies(self, group: Group) -> bool:
        """Whether this merge adds the task vector."""
        return bool((group["merge_step"] + 1) // self.merge_every % self.tau_every == 0)

    def _merges_nothing(self, group: Group) -> bool:
        return not group["merge"] or (group["merge_alpha"] == 0 and self.density == 1)

    def _step_and_merge(self, shares: list[Share]) -> None:
        """Steps these parameters by one call and merges what came of it."""
        before, decays = self._wrapped.step(shares)
        for share, starts, decay in zip(shares, before, decays, strict=True):
            if not self._due(share.group):
                for parameter, start in zip(share.merged, starts, strict=True):
                    # After the wrapped step, since an optimizer starts its state where it finds none.
                    self.state[parameter]["merge_anchor"] = start
                continue
            draws = Generators()
            together: dict[Any, list[tuple[Turn, Tensor, Tensor]]] = {}
            for parameter, start in zip(share.merged, starts, strict=True):
                self.state[parameter].pop("merge_anchor", None)
                held, before_it = held_of(parameter), held_of(start)
                turn = self._turn(share.group, parameter, held, decay, draws)
                if on_host({turn.name: held}):
                    self._merge_one(turn, held, before_it)
                else:
                    key = (turn.part, held.dtype, held.device)
                    together.setdefault(key, []).append((turn, held, before_it))
            for same in together.values():
                self._merge_side_by_side(*zip(*same, strict=True))

    def _turn(self, group: Group, parameter: Tensor, held: Tensor, decay: float, draws: Generators) -> Turn:
        name = self._names[parameter]
        count = group["merge_step"] // self.merge_every // self.tau_every
        alpha, part = self._alpha(group), self._parts[name]
        return Turn(
            name=name,
            part=part,
            tau=self.tau[name],
            draw=Draw(self.seed, group["merge_step"] + 1, name, part.numel, held.device, draws[held.device]),
            update=1.0 - alpha,
            reference=group["merge_pending"] + alpha if self._applies(group) else 0.0,
            decay=decay,
            dither=dither_of(count),
            dtype=held.dtype,
        )

    def _merge_one(self, turn: Turn, held: Tensor, before: Tensor) -> None:
        dtype = work_dtype(held)
        after = held.to(dtype).reshape(-1)
        self._merge_into(after, before.to(dtype).reshape(-1), turn)
        if after.data_ptr() != held.data_ptr():
            held.copy_(after.view_as(held))

    def _merge_side_by_side(self, turns: Sequence[Turn], held: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """The same of tensors of one size, by operations on all of them."""
        like = {turn.name: tensor for turn, tensor in zip(turns, held, strict=True)}
        copy_(like, unstacked(self._merge_rows(Side.of(turns, held, before)), list(like), like))

    def _due(self, group: Group) -> bool:
        return bool((group["merge_step"] + 1) % self.merge_every == 0)

    def _alpha(self, group: Group) -> float:
        share = 1.0 if self.alpha_schedule == "constant" else float(group["lr"]) / group["merge_top_lr"]
        return float(group["merge_alpha"]) * share

    @staticmethod
    def _l1_rows(full: Tensor, left: Tensor, whole: Part) -> Tensor:
        """``_l1`` of each row, as a column."""
        sums = whole.total_(torch.stack([full, left]))
        return torch.where(sums[1] != 0, sums[0] / sums[1], 1.0).unsqueeze(1)

    def _l1(self, sums: Tensor, whole: Part) -> float:
        """What brings a tensor back to its sum of magnitudes; ``sums`` are those of this process, before and after."""
        full, left = whole.total_(sums).tolist()
        return float(full / left) if left else 1.0

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
            dense = held_part(named(ours, name, parameter.shape, "reference"), whole, device, work)
            if theirs is not None:
                dense = dense - held_part(named(theirs, name, parameter.shape, "pretrained"), whole, device, work)
            dense, index = self._sparsify(dense, name, whole)
            sparse = self.density < _SPARSE_BELOW and not self.is_dense(whole)
            found[name] = Stored.of(dense, index if sparse else None, dtype or work)
        return found

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
            late = any(each.get("merge_late") for each in state_dict["param_groups"])
            if not late and abs(saved - self._fingerprint) > 1e-4 * self._fingerprint:
                raise ValueError(
                    f"the state was saved with another task vector (sum of magnitudes {saved:.6g} instead of"
                    f" {self._fingerprint:.6g}): give `reference`, `pretrained`, `density` and `seed` of the saved run."
                )
        ours = [{key: g[key] for key in g if key.startswith("merge")} for g in self.param_groups]
        self.base.load_state_dict(state_dict)
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
