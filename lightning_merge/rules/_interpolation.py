"""The line through where a run began and where it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from lightning_merge._checks import number, path, settle
from lightning_merge.files._read import read
from lightning_merge.files._sets import weights_in
from lightning_merge.rules._base import Rule
from lightning_merge.rules._shares import of_updates
from lightning_merge.rules._variances import keep_variances_positive_
from lightning_merge.weights import State, Weights, clone, copy_, first_mismatch, lerp_


@final
@dataclass(frozen=True)
class Interpolation(Rule):
    """``anchor + alpha * (weights - anchor)``, of the weights last taken in; the anchor is where the run began.

    Running variances that would be 0 or less beyond the weights are those of the weights.

    Args:
        alpha: 0 is the anchor, 1 the trained weights, between them WiSE-FT, above 1 ExPO, which goes on beyond; in
            (0, 10].
        anchor: A checkpoint to use as the anchor instead of the weights it starts from.

    Raises:
        ValueError: If ``alpha`` is out of range, or at the start if the file is of another model.

    Example:
        >>> import torch
        >>> rule = Interpolation(alpha=1.5)
        >>> state = rule.init({"w": torch.tensor(1.0)})
        >>> rule.update(state, {"w": torch.tensor(3.0)})
        >>> rule.result(state)
        {'w': tensor(4.)}

    References:
        Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), CVPR 2022. Zheng et al., Model extrapolation
        expedites alignment (ExPO), 2024, eq. 1, where ``alpha`` is ours less 1.
    """

    callback: ClassVar[str] = "Interpolate"
    start_is_meant: ClassVar[bool] = True

    alpha: float = 0.5
    anchor: str | None = None

    def __post_init__(self) -> None:
        settle(self, alpha=number("alpha", self.alpha, "(0, 10]"))
        if self.anchor is not None:
            settle(self, anchor=path("anchor", self.anchor))

    @property
    def works_on_shards(self) -> bool:
        return self.anchor is None  # a file holds whole tensors

    @property
    def can_be_undone(self) -> bool:
        return True

    def init(self, weights: Weights) -> State:
        anchor = weights if self.anchor is None else self._read(weights, self.anchor)
        return {"anchor": clone(anchor), "merged": clone(anchor), "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        copy_(state["merged"], state["anchor"])
        lerp_(state["merged"], weights, self.alpha)
        if self.alpha > 1:
            keep_variances_positive_(state["merged"], weights)
        state["updates"] += 1

    def stored(self, state: State) -> Weights | None:
        return state["merged"] if state["updates"] else None

    def initial_share(self, state: State) -> float:
        return 1.0 - self.alpha if self.anchor is None and state["updates"] else 0.0

    def shares(self, state: State) -> Tensor:
        return of_updates(state["updates"], state["updates"], state["updates"], self.alpha)

    def _read(self, weights: Weights, file: str) -> Weights:
        content: Any = read(file)
        saved = weights_in(content, weights) if isinstance(content, Mapping) else {}
        found = {name: saved[name].to(weights[name].device) for name in weights if name in saved}
        if difference := first_mismatch(weights, found):
            raise ValueError(f"`anchor`: {file} is of another model: {difference}.")
        return found
