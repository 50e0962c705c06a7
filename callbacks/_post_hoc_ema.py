"""Post-hoc EMA: averages of which any other width can be made after training."""

import os
from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import PowerMeans
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import Weights


class PostHocEMA(WeightMerging):
    """Two averages whose width is a share of the run, kept on the way; ``synthesise`` makes one of any other width.

    Args:
        sigmas: Widths that are tracked, as shares of the run, each in (0, 0.288); two or more, growing. The last is
            what is published.
        every: Applied steps between the copies that are kept; at least 1. A twentieth of the run is enough.
        directory: A folder for those copies; ``None`` keeps them in host memory and in every checkpoint.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which tensors are averaged, and what becomes of buffers.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> PostHocEMA(every=1000).name
        'posthoc-ema'

    References:
        Karras et al., "Analyzing and improving the training dynamics of diffusion models", CVPR 2024, section 3.
    """

    def __init__(
        self,
        sigmas: Sequence[float] = (0.05, 0.10),
        every: int = 100,
        directory: str | os.PathLike[str] | None = None,
        validate: Validate = "merged",
        name: str = "posthoc-ema",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        super().__init__(
            PowerMeans(sigmas, every, directory),
            schedule=EveryNSteps(),
            selection=chosen(selection, Selection()),
            validate=validate,
            name=name,
            optimizer=optimizer,
            **known(options, RuleOptions, self),
        )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The widths that are tracked."""
        assert isinstance(self.rule, PowerMeans)
        return tuple(self.rule.sigmas)

    def synthesise(self, sigma: float, step: int | None = None) -> Weights:
        """The average of this width, during or after the fit, by canonical name; buffers are those of the last update.

        Args:
            sigma: Width as a share of the run, in (0, 0.288).
            step: Applied step after which it would have been the average; ``None``: the last.

        Raises:
            RuntimeError: If nothing was averaged yet.
            ValueError: If an argument is out of its range.
        """
        if self._state is None or not self.ready:
            raise RuntimeError(f"{self.title} has averaged nothing yet.")
        assert isinstance(self._active_rule, PowerMeans)
        if step is not None and not 1 <= whole("step", step) <= self.updates:
            raise ValueError(f"`step` must be in [1, {self.updates}], the updates so far, got {step}.")
        return {**self._active_rule.synthesise(self._state, sigma, step), **self._buffers}
