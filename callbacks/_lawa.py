"""LAWA: latest weight averaging, the mean of the last k weights."""

from typing import Literal, Unpack

from lightning_merge._checks import start as checked_start
from lightning_merge._checks import whole
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import WindowMean
from lightning_merge.schedules import EveryNEpochs, EveryNSteps, Schedule
from lightning_merge.selections import Selection, chosen


class LAWA(WeightMerging):
    """Latest weight averaging: the uniform mean of the last ``k`` snapshots, once there are ``k``.

    Args:
        k: Snapshots in the window; at least 1.
        every_n_epochs: Epochs between snapshots; at least 1. Default 1 if ``every_n_steps`` is not given.
        every_n_steps: Instead: applied optimizer steps between snapshots; at least 1.
        start: No snapshot before this many epochs (or steps, with ``every_n_steps``) are complete; a float in [0, 1) is
            a share of the run.
        store: Where the snapshots are: ``"device"``, ``"cpu"`` or ``"disk"``.
        directory: For ``"disk"``: the folder they are in.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which tensors are averaged and what happens to buffers; by default all parameters, and
            BatchNorm statistics are measured again under the mean.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range, or both intervals are given.
        MemoryError: At the first snapshot, if ``k`` of them do not fit into ``store``.

    Example:
        >>> LAWA(k=6).name
        'lawa'

    References:
        Kaddour, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging", 2022.
        Sanyal et al., "Early weight averaging meets high learning rates for LLM pre-training", 2023.
    """

    def __init__(
        self,
        k: int = 6,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        start: int | float = 0,
        store: Literal["device", "cpu", "disk"] = "device",
        directory: str | None = None,
        validate: Validate = "merged",
        name: str = "lawa",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        if every_n_epochs is not None and every_n_steps is not None:
            raise ValueError(
                f"give `every_n_epochs` or `every_n_steps`, not both; got {every_n_epochs} and {every_n_steps}."
            )
        start = checked_start("start", start)
        if every_n_steps is None:
            every_n_epochs = whole("every_n_epochs", 1 if every_n_epochs is None else every_n_epochs, 1)
            schedule: Schedule = EveryNEpochs(every_n_epochs, start)
        else:
            schedule = EveryNSteps(whole("every_n_steps", every_n_steps, 1), start)
        super().__init__(
            WindowMean(k, store=store, directory=directory),
            schedule=schedule,
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            **known(options, RuleOptions, self),
        )
