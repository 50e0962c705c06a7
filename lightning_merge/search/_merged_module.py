"""A module under ``base + sum of coefficients x task vectors``, with the slope of a loss by each coefficient."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_merge._checks import instance
from lightning_merge._mergeable import named, refuse_lora_in, several_named, why_not
from lightning_merge.search._groups import Per, groups
from lightning_merge.search._loss import Loss, eval_mode
from lightning_merge.search._spaces import Coefficients
from lightning_merge.weights import Weights, average_dtype, first_mismatch, is_averaged, nonfinite

_MEASURED = ("running_mean", "running_var")


class MergedModule:
    """What a gradient objective does with its weights.

    Args:
        module: Called with the inputs of a batch; its own weights are left alone, and it is in eval mode meanwhile.
        base: What all tasks were fine-tuned from, under the names of the module's ``state_dict``.
        vectors: What each task added to it; kept as they are, so several copies of the weights.
        per: What shares a coefficient.
    """

    def __init__(
        self,
        module: nn.Module,
        base: Mapping[str, Tensor],
        vectors: Sequence[Mapping[str, Tensor]],
        per: Per,
    ) -> None:
        self.module = instance("module", module, nn.Module, "a module of torch")
        self.base, self.vectors = named("base", base), several_named("vectors", vectors)
        self._check()
        live = self.module.state_dict(keep_vars=True)
        self._firsts: dict[str, str] = {}
        seen: dict[int, str] = {}
        for name in self.vectors[0]:
            self._firsts[name] = seen.setdefault(id(live[name]), name)  # tied tensors are one
        searched = [name for name, first in self._firsts.items() if name == first and not name.endswith(_MEASURED)]
        if not searched:
            raise ValueError("`vectors` must hold a tensor beside statistics of BatchNorm, which are not searched.")
        self.tensors = tuple(searched)
        self._groups = dict(zip(searched, groups(searched, per), strict=True))
        self._size = 1 + max(self._groups.values())
        self.count = self._size * len(self.vectors)

    @torch.no_grad()
    def weights(self, coefficients: Sequence[float], mask: Mapping[str, Tensor] | None = None) -> Weights:
        """The merged weights, in the types of the base; statistics of BatchNorm are the mean of the tasks'.

        What vectors add up to is multiplied with a mask, if there is one.
        """
        if len(coefficients) != self.count:
            raise ValueError(f"`coefficients` must be {self.count} numbers, got {len(coefficients)}.")
        merged = {name: tensor.detach().clone() for name, tensor in self.base.items()}
        for name, first in self._firsts.items():
            if name != first:
                merged[name] = merged[first]
                continue
            total = self.total(coefficients, name)
            if mask and name in mask:
                total.mul_(mask[name])
            merged[name] = total.add_(merged[name].to(total)).to(merged[name])
        return merged

    def slopes(
        self, coefficients: Sequence[float], losses: Sequence[Loss], mask: Mapping[str, Tensor] | None = None
    ) -> tuple[list[float], Weights, Coefficients]:
        """Each loss, and the gradient of their sum by each weight and by each coefficient.

        That of the weights is taken once, and multiplied with each vector: beside the vectors, no more memory than one
        backward pass takes.
        """
        with torch.inference_mode(False):  # in which there are no gradients
            found, of_weights = self._backward(self.weights(coefficients, mask or {}), losses)
        slopes = [0.0] * self.count
        for name, group in self._groups.items():
            like = self.vectors[0][name]
            of_weights[name] = of_weights[name].to(like.device, average_dtype(like))  # half precision loses the small
            slope = of_weights[name] if mask is None else of_weights[name] * mask[name]
            for task, vector in enumerate(self.vectors):
                slopes[task * self._size + group] += float((vector[name] * slope.to(vector[name].device)).sum())
        return found, of_weights, tuple(slopes)

    def total(self, coefficients: Sequence[float], name: str) -> Tensor:
        """``sum of coefficients x vectors`` of a tensor."""
        like = self.vectors[0][name]
        total = torch.zeros_like(like, dtype=average_dtype(like))
        for task, vector in enumerate(self.vectors):
            total.add_(vector[name].to(total), alpha=self._of(coefficients, name, task))
        return total

    def _backward(self, weights: Weights, losses: Sequence[Loss]) -> tuple[list[float], Weights]:
        """Each loss, and the gradient of their sum; 0 of weights that no loss depends on."""
        device = next((each.device for each in self.module.parameters()), torch.device("cpu"))
        merged: dict[int, Tensor] = {}  # tied tensors stay one
        live = {name: merged.setdefault(id(tensor), tensor.to(device)) for name, tensor in weights.items()}
        for name in self.tensors:
            live[name].requires_grad_()
        found, learns = [], False
        with eval_mode(self.module), torch.enable_grad():
            for loss in losses:
                value = loss.value(self.module, live, device)
                learns = learns or value.requires_grad
                if value.requires_grad:
                    value.backward()  # type: ignore[no-untyped-call]
                found.append(float(value.detach()))
        if not learns:
            raise ValueError(
                "`module` must give outputs with a gradient by its weights, got some without: its `forward` is under"
                " `torch.no_grad` or `inference_mode`, or detaches them."
            )
        slopes = {name: live[name].grad for name in self.tensors}
        return found, {name: torch.zeros_like(live[name]) if g is None else g for name, g in slopes.items()}

    def refuse_unknown(self, argument: str, models: Sequence[Mapping[str, Tensor]]) -> None:
        """Raises a ``ValueError`` that names the first tensor that is not of the module."""
        known = self.module.state_dict()
        for name in (name for model in models for name in model):
            if name not in known:
                raise ValueError(f"`{argument}` must be of the module, which has no {name!r}: leave it out.")

    def parts(self) -> list[Mapping[str, Tensor]]:
        """What decides a loss beside batches and heads: the base, the vectors, and the rest of the module."""
        rest = {name: value for name, value in self.module.state_dict().items() if name not in self.base}
        return [self.base, *self.vectors, rest]

    def _of(self, coefficients: Sequence[float], name: str, task: int) -> float:
        if name not in self._groups:
            return 1.0 / len(self.vectors)
        return coefficients[task * self._size + self._groups[name]]

    def _check(self) -> None:
        if not self.vectors or not self.vectors[0]:
            raise ValueError("`vectors` must be at least one task vector with at least one tensor.")
        expected = {name: self.base.get(name, torch.empty(0)) for name in self.vectors[0]}
        for task, vector in enumerate(self.vectors):
            if (difference := first_mismatch(expected, vector)) is not None:
                raise ValueError(
                    f"task {task} of `vectors` is not of the base: {difference}. Tensors that differ between tasks, as"
                    " their heads, are not merged: leave them out of `vectors`, and hand them in as `heads`."
                )
            for name, tensor in (*vector.items(), *((name, self.base[name]) for name in vector)):
                if reason := why_not(tensor):
                    raise ValueError(f"`{name}` of task {task} {reason}.")
                if tensor.is_complex():
                    raise ValueError(
                        f"`{name}` of task {task} holds complex numbers, of which there is no gradient here."
                    )
                if not is_averaged(tensor):
                    raise ValueError(
                        f"`{name}` of task {task} holds {str(tensor.dtype).removeprefix('torch.')}, of which there are"
                        " no task vectors, as of quantised weights: convert it to floating point first, scale applied."
                    )
            if damaged := nonfinite(vector):
                raise ValueError(f"`{next(name for name in vector if name in damaged)}` of task {task} is not finite.")
        base = {name: torch.zeros_like(tensor) for name, tensor in self.vectors[0].items() if "lora" in name.lower()}
        refuse_lora_in([base, *({name: vector[name] for name in base} for vector in self.vectors)])
        self.refuse_unknown("vectors", self.vectors)
        self.refuse_unknown("base", [self.base])
