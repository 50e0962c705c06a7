"""What becomes of parameters that come to an online optimizer later: added, assigned, or unfrozen in the run."""

from abc import abstractmethod
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_merge.optim._around import Around
from lightning_merge.optim._parameter_names import LateSource
from lightning_merge.optim._refused import refuse_unmergeable
from lightning_merge.optim._task_vector import Source, Stored, loaded, magnitude
from lightning_merge.optim._wrapped import Group
from lightning_merge.weights._held import Part, part_held


class TakesLate(Around):
    """The part of ``OnlineMerging`` that takes them in.

    Attributes:
        tau: The sparsified task vector by parameter name, as it is stored.
        density: Share of it that is kept.
        later: Names of exempt parameters that are merged from their first gradient on: frozen ones, say.
    """

    tau: dict[str, Stored]
    density: float
    later: frozenset[str] = frozenset()
    _source: LateSource
    _names: dict[Tensor, str]
    _parts: dict[str, Part]
    _exempt: set[Tensor]
    _known: set[Tensor]
    _patterns: tuple[str, ...]
    _defaults: dict[str, Any]
    _fingerprint: float

    @abstractmethod
    def _task_vector(
        self,
        merged: dict[str, Tensor],
        reference: Source,
        pretrained: Source | Literal["zero"],
        dtype: torch.dtype | None,
    ) -> dict[str, Stored]:
        """The difference of two models, of these parameters."""

    def renew(self) -> None:
        """Makes the task vector again, of a reference that holds other weights by now.

        Raises:
            ValueError: If it was given as ``tau``.
        """
        source = self._source
        if source.reference is None or source.pretrained is None:
            raise ValueError("a task vector that was given as `tau` is not made of a reference.")
        by_name = {self._names[p]: p for group in self.param_groups for p in group["params"]}
        merged = {name: by_name[name] for name in self.tau}
        self.tau = self._task_vector(merged, source.reference, source.pretrained, source.dtype)
        self._fingerprint = magnitude(self.tau, self._parts, self.density)
        for group in self.param_groups:
            group["merge_fingerprint"] = self._fingerprint

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; unless it says ``"merge": False``, the task vector of its parameters is looked up.

        What is merged needs a name in ``module``, and ``reference`` and ``pretrained`` (or ``tau``) that have it. A
        reference that is the module itself counts as it is now.

        Raises:
            ValueError: If there is no task vector for it.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        self.base.add_param_group(param_group)
        try:
            self._look()
        except BaseException:
            self.base.param_groups.pop()
            raise

    def _look(self) -> None:
        """Takes in parameters that were added, assigned or unfrozen since the last step."""
        for group in self.param_groups:
            if "merge" not in group:
                for key, value in {**self._defaults, "merge_fingerprint": self._fingerprint}.items():
                    group.setdefault(key, value)
                group.setdefault("merge_top_lr", float(group.get("initial_lr", group["lr"])))
            new = [p for p in group["params"] if p not in self._known]
            self._known.update(new)
            if not group["merge"]:
                self._exempt.update(new)
            elif new or self.later:
                late = [p for p in group["params"] if p.grad is not None and self._names.get(p) in self.later]
                exempt = {p for p in new if self._is_exempt(p)}
                self._exempt |= exempt
                self._merge_also(group, [p for p in new if p not in exempt] + late)

    def _is_exempt(self, parameter: Tensor) -> bool:
        """Whether a parameter that came later was left out from the start."""
        self._names |= self._source.names(self.base, [parameter])
        name = self._names[parameter]
        left_out = name not in self.later and any(fnmatchcase(name, pattern) for pattern in self._patterns)
        return left_out or not parameter.is_floating_point()

    def _merge_also(self, group: Group, parameters: list[Tensor]) -> None:
        if not parameters:
            return
        self._names |= self._source.names(self.base, parameters)
        refuse_unmergeable([{"params": parameters, "merge": True}], self._names, ())
        new = {self._names[p]: p for p in parameters}
        self._parts |= {name: part_held(name, p) for name, p in new.items()}
        source = self._source
        if source.reference is None or source.pretrained is None:
            self.tau |= loaded(source.tau, new)
        else:
            self.tau |= self._task_vector(new, source.reference, source.pretrained, source.dtype)
        self._exempt -= set(parameters)
        self.later -= new.keys()
        group["merge_late"] = True  # what is in the fingerprint of a resumed run depends on when they come
