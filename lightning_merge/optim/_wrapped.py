"""The wrapped optimizer, stepped a few tensors at a time, and what it must not do then."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_merge.weights import copy_, on_host
from lightning_merge.weights._held import held_of

Group = dict[str, Any]

_MORE_OFF_THE_CPU = 16
"""How many times as many elements a call takes on an accelerator, where launches are what costs, not the cache."""


@dataclass(frozen=True)
class Share:
    """What of one group is stepped in a call of the wrapped optimizer, and what of that is merged then."""

    group: Group
    parameters: list[Tensor]
    merged: list[Tensor]


class Wrapped:
    """Steps an optimizer so that the difference it makes to the parameters is known.

    Args:
        base: The optimizer.
        merge_every: Steps between merges: above 1 a copy from the first of them is kept in the optimizer's state.
        chunk_size: Elements per call, at least a whole tensor; ``None``: one call on everything.
    """

    def __init__(self, base: Optimizer, merge_every: int, chunk_size: int | None) -> None:
        self.base = base
        self.merge_every = merge_every
        self.chunk_size = chunk_size
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._checked = chunk_size is None

    def calls(self, shares: list[Share]) -> Iterator[list[Share]]:
        """What is stepped together: parameters in groups of a few, or all at once."""
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
            if not on_host({"": parameter}):
                numel //= _MORE_OFF_THE_CPU
            like = not held or (held[0].dtype, held[0].device) == (parameter.dtype, parameter.device)
            if held and (not like or size + numel > most):
                yield held
                held, size = [], 0
            held, size = [*held, parameter], size + numel
        if held:
            yield held

    def step(self, shares: list[Share]) -> tuple[list[list[Tensor]], list[float]]:
        """Steps these parameters by one call.

        Returns:
            Of each share, where its merged parameters began, and learning rate times the weight decay left out.

        Raises:
            ValueError: If the optimizer keeps something of its steps, so that one call is not as good as another.
            RuntimeError: If it replaced a parameter's memory.
        """
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
        return before, decays

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
            anchors = [self.base.state[p].get("merge_anchor") if p in self.base.state else None for p in parameters]
            return [p.detach().clone() if a is None else a for p, a in zip(parameters, anchors, strict=True)]
        held = [held_of(p) for p in parameters]
        size = sum(t.numel() for t in held)
        most = 0 if self.chunk_size is None else self.chunk_size
        if not held or size > (most if on_host({"": held[0]}) else most * _MORE_OFF_THE_CPU):
            return [t.clone() for t in held]
        # Memory of its own, as new memory costs more than the copy.
        key = (held[0].dtype, held[0].device)
        if key not in self._scratch or self._scratch[key].numel() < size:
            self._scratch[key] = torch.empty(size, dtype=key[0], device=key[1])
        parts = torch.split(self._scratch[key][:size], [t.numel() for t in held])
        kept = {str(i): part.view(t.shape) for i, (part, t) in enumerate(zip(parts, held, strict=True))}
        copy_(kept, {str(i): t for i, t in enumerate(held)})
        return list(kept.values())
