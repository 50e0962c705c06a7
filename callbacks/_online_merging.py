"""Online merging for an unchanged module: its optimizers are wrapped when the fit starts."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_merge._checks import instance, number, one_of, whole
from lightning_merge._checks import seed as checked_seed
from lightning_merge.callbacks._branch_run._outside import sums
from lightning_merge.callbacks._lightning._strategies import refuse_sharding
from lightning_merge.optim import OnDARE, OnTIES
from lightning_merge.optim._settings import AlphaSchedule, Form, Rescale, checked_chunk_size
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import named_parameters

_METHODS = {"ondare": OnDARE, "onties": OnTIES}
_KEY = "lightning_merge.online"


class OnlineMerging(Callback):
    """Merges every update of the optimizers with the task vector ``reference - pretrained``, by OnDARE or OnTIES.

    The optimizers that ``configure_optimizers`` returns are wrapped when the fit starts; schedules, gradient scaling,
    clipping and accumulation go on as they are. What is merged is the optimizer's update, not the raw gradient. Full
    checkpoints load without the callback; resuming with it continues bit for bit.

    Args:
        method: ``"ondare"`` or ``"onties"``.
        pretrained: The model that the reference was fine-tuned from: a checkpoint, named tensors or a module, with the
            names of the module that is trained. ``"zero"`` if the reference is a difference already, as the adapters
            of LoRA are.
        reference: The model before this training, in the same forms; by default the weights when the fit starts.
        density: Share of elements of update and difference that are kept, in (0, 1].
        alpha: Weight of the difference per merge, in [0, 1]. After T merges about ``alpha * T * density`` of the
            difference has been added.
        form: ``"paper"`` or ``"official"``, as the published code; see ``OnDARE`` and ``OnTIES``.
        rescale: ``"none"``, ``"inverse_p"`` or ``"l1"``; by default that of the form.
        alpha_schedule: ``"lr"`` lets ``alpha`` follow the learning rate, ``"constant"`` does not.
        tau_every: OnDARE only: add the difference every so many merges, so many times as strong; at least 1.
        merge_every: Optimizer steps per merge; at least 1.
        seed: Seed of masks and samples.
        min_numel: Tensors with fewer elements are merged in full; at least 0.
        selection: Which parameters are merged; the others are stepped as without the callback.
        tau_dtype: ``"float32"`` or ``"bfloat16"``: how the difference is stored.
        chunk_size: Elements per call of the wrapped optimizer; ``None`` for one that couples tensors.

    Attributes:
        optimizers: The wrapped optimizers of the current or last fit.

    Raises:
        ValueError: If an argument is out of range, or at fit start if it does not fit the model or the strategy.
    """

    def __init__(
        self,
        method: Literal["ondare", "onties"] = "ondare",
        pretrained: str | Mapping[str, Tensor] | nn.Module | None = None,
        reference: str | Mapping[str, Tensor] | nn.Module | None = None,
        density: float = 1.0,
        alpha: float = 1e-7,
        form: Literal["paper", "official"] = "paper",
        rescale: Literal["none", "inverse_p", "l1"] | None = None,
        alpha_schedule: Literal["constant", "lr"] = "constant",
        tau_every: int = 1,
        merge_every: int = 1,
        seed: int = 0,
        min_numel: int = 0,
        selection: Selection | None = None,
        tau_dtype: Literal["float32", "bfloat16"] = "float32",
        chunk_size: int | None = 2**22,
    ) -> None:
        one_of("method", method, tuple(_METHODS), f"one of {', '.join(map(repr, _METHODS))}")
        _check_models(pretrained, reference)
        one_of("tau_dtype", tau_dtype, ("float32", "bfloat16"))
        for argument, choice, kind in (
            ("form", form, Form),
            ("rescale", rescale, (*get_args(Rescale), None)),
            ("alpha_schedule", alpha_schedule, AlphaSchedule),
        ):
            one_of(argument, choice, kind)
        tau_every = _checked_tau_every(tau_every, method)
        self.method = method
        self.pretrained = pretrained
        self.reference = reference
        self.selection = chosen(selection, Selection(trainable=True))
        self.settings: dict[str, Any] = {
            "density": number("density", density, "(0, 1]"),
            "alpha": number("alpha", alpha, "[0, 1]"),
            "form": form,
            "alpha_schedule": alpha_schedule,
            "merge_every": whole("merge_every", merge_every, 1),
            "seed": checked_seed("seed", seed),
            "min_numel": whole("min_numel", min_numel, 0),
            "chunk_size": None if chunk_size is None else checked_chunk_size(chunk_size),
            **({} if tau_every == 1 else {"tau_every": tau_every}),
            **({} if rescale is None else {"rescale": rescale}),
        }
        self.tau_dtype = getattr(torch, tau_dtype)
        self.optimizers: list[OnDARE | OnTIES] = []
        self._resumed: list[dict[str, dict[str, Any]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wraps the optimizers, before their states are restored."""
        # Also ModelParallelStrategy: its checkpoints start an optimizer's state by a step, which would be merged.
        refuse_sharding(
            trainer.strategy,
            "OnlineMerging",
            "Use a single device or `strategy='ddp'`; in a plain torch loop OnDARE and OnTIES of lightning_merge.optim"
            " work on the shards of `fully_shard`.",
        )
        chosen = self.selection.parameters(pl_module)
        left_out = [name for name in named_parameters(pl_module) if name not in chosen]
        once_trainable = replace(self.selection, trainable=False).parameters(pl_module).keys() & set(left_out)
        wrap: Any = _METHODS[self.method]
        self.optimizers = []
        unwrapped = list(trainer.optimizers)
        for i, optimizer in enumerate(unwrapped):
            source: dict[str, Any] = {
                "reference": pl_module if self.reference is None else self.reference,
                "pretrained": self.pretrained,
                "tau_dtype": self.tau_dtype,
            }
            if self.reference is None and self._resumed:
                source = {"tau": self._resumed[i]}
            wrapped = wrap(optimizer, **source, module=pl_module, exempt=left_out, **self.settings)
            wrapped.later = frozenset(once_trainable)
            self.optimizers.append(wrapped)
            if "reference" in source and self.reference is None:
                self._renew_at_the_first_step(wrapped, pl_module)
        trainer.strategy.optimizers = list(self.optimizers)
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer in unwrapped:
                config.scheduler.optimizer = self.optimizers[unwrapped.index(config.scheduler.optimizer)]
        self._resumed = []
        rank_zero_info(self._announcement())

    def _renew_at_the_first_step(self, optimizer: OnDARE | OnTIES, module: LightningModule) -> None:
        """The reference is what the module holds when training begins: hooks may load weights until then."""
        optimizer.register_step_pre_hook(partial(_renew, [sums(named_parameters(module))], module, optimizer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A reference that was live can be read from no file later, so the difference goes into this one."""
        if self.reference is None and self.optimizers:
            checkpoint[_KEY] = [optimizer.tau_state() for optimizer in self.optimizers]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Comes before the optimizers are wrapped."""
        self._resumed = checkpoint.get(_KEY, [])

    def _announcement(self) -> str:
        first = self.optimizers[0]
        size = sum(optimizer.tau_bytes for optimizer in self.optimizers)
        return (
            f"OnlineMerging: {type(first).__name__} around {type(first.base).__name__} merges"
            f" {sum(len(optimizer.tau) for optimizer in self.optimizers)} tensors; the task vector takes"
            f" {size / 1e6:,.1f} MB."
        )


def _check_models(pretrained: object, reference: object) -> None:
    if pretrained is None:
        raise ValueError(
            "`pretrained` must be the model that the reference was fine-tuned from, as a checkpoint, named tensors"
            " or a module; or 'zero' if the reference is a difference already."
        )
    for argument, given in (("pretrained", pretrained), ("reference", reference)):
        if given is not None:
            says = "a checkpoint's path, named tensors or a module"
            instance(argument, given, (str, os.PathLike, Mapping, nn.Module), says)


def _checked_tau_every(tau_every: int, method: str) -> int:
    tau_every = whole("tau_every", tau_every, 1)
    if tau_every != 1 and method != "ondare":
        raise ValueError(
            f"`tau_every` must be 1 for {method!r}, whose signs are voted at every merge, got {tau_every}."
        )
    return tau_every


def _renew(before: list[Any], module: LightningModule, optimizer: OnDARE | OnTIES, *_: Any) -> None:
    if before and sums(named_parameters(module)) != before.pop():
        optimizer.renew()
