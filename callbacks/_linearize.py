"""Training in the tangent space."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_merge._checks import names
from lightning_merge.callbacks._lightning._strategies import refuse_sharding
from lightning_merge.tangent import Tangent, linearize
from lightning_merge.tangent._linearize import KEY
from lightning_merge.weights import Weights


class Linearize(Callback):
    """Trains ``f(x; w0) + J(x; w0) (w - w0)`` instead of ``f(x; w)``: the network is linear in its weights.

    ``w0`` are the weights before the first step, or those of the run that is resumed. Training, validation and tests
    compute the linear network, also after the fit; task vectors ``w - w0`` of fits that share ``w0`` then add up
    exactly in the outputs. Optimizers, averages and other callbacks work on ``w`` as ever.

    Full checkpoints hold ``w`` as the module's weights, and ``w0`` beside them, under ``"lightning_merge_linearize"``.
    Where this callback is among the Trainer's, ``ckpt_path`` brings both back; elsewhere give it to
    ``tangent.linearize(model, start=...)``. ``w`` alone in a plain module is another function.

    Args:
        only: Globs of the submodules that are linearised, each as a whole; by default the module's own ``forward``,
            which ``training_step`` then has to call, as ``self(x)``.

    Attributes:
        tangent: What holds ``w0``, once a fit began; ``tangent.remove()`` makes the network what it was.

    Raises:
        ValueError: At fit start if a pattern matches no submodule with parameters, what it matches is compiled, or the
            strategy shards parameters; at the end of the first batch if nothing of it was called.
        NotImplementedError: In the first batch, if a layer has no forward-mode rule; it is named.

    Example:
        >>> Linearize(only="net").only
        ['net']

    References:
        Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023, equation 3.
    """

    def __init__(self, only: str | list[str] | None = None) -> None:
        self.only = None if only is None else list(names("only", only))
        self.tangent: Tangent | None = None
        self._is_settled = False  # whether w0 can no longer change

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a second one, whose w0 would take the place of this one's in files."""
        if sum(isinstance(each, Linearize) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("There must be one Linearize in a Trainer; `only` takes a list of patterns.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Linearises the module, so that what cannot be is known before the first batch."""
        refuse_sharding(trainer.strategy, "Linearize")
        if self._is_settled and self.tangent is not None and self.tangent.module is pl_module:
            if trainer.ckpt_path is None:
                rank_zero_info("Linearize: it goes on around the weights that the first fit started from.")
            return
        self._linearize(pl_module, None)
        self._is_settled = False
        if any(getattr(each, "save_weights_only", False) for each in trainer.checkpoint_callbacks):
            rank_zero_warn(
                "Linearize: files of `save_weights_only=True` hold no w0, so they say nothing alone. Save full files,"
                " or keep `tangent.start` with them."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the weights as they are before the first step, whatever hooks loaded until then."""
        if not self._is_settled:
            self._linearize(pl_module, None)
            self._is_settled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Makes sure that training goes through what is linear."""
        if self.tangent is not None and not self.tangent.is_used:
            called = ", ".join(
                f"`{name}`" for name, part in pl_module.named_children() if any(True for _ in part.parameters())
            )
            raise ValueError(
                f"Linearize made {self._title} linear, and `training_step` does not call it: name with `only=` what it"
                f" calls, of: {called or 'none'}."
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds ``w0``."""
        if self.tangent is not None and self._is_settled:
            checkpoint[KEY] = {"start": dict(self.tangent.start)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes it back, for a fit that goes on as for a validation or a test."""
        if KEY in checkpoint:
            self._linearize(pl_module, checkpoint[KEY]["start"])
            self._is_settled = True
        elif self.tangent is not None:  # the weights of a network that was not linear
            self.tangent.remove()
            self.tangent, self._is_settled = None, False

    @property
    def _title(self) -> str:
        return "its own `forward`" if self.only is None else ", ".join(f"`{name}`" for name in self.only)

    def _linearize(self, module: LightningModule, start: Weights | None) -> None:
        if self.tangent is not None:
            self.tangent.remove()
        self.tangent = linearize(module, self.only, start)
