"""The path of a run through weight space, sketched by a few thousand coordinates."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_merge.weights import local, named_parameters

_COORDINATES = 4096
_MOST = 200  # points that are kept


class WeightPath:
    """Sketches of the weights along a run: the same random coordinates each time, at most 200 of them.

    When there are more, every second is dropped and the interval doubles, so the points stay evenly spread whatever the
    length of the run. A sketch costs microseconds and 16 kB.
    """

    def __init__(self) -> None:
        self.points: dict[int, Tensor] = {}  # applied step -> coordinates
        self._chosen: dict[str, Tensor] = {}
        self._interval = 1

    def add(self, module: nn.Module, step: int) -> None:
        """Records a sketch of the live weights if one is due."""
        if step % self._interval:
            return
        parameters = local(named_parameters(module))  # of sharded ones what the first process holds
        if not self._chosen:
            self._choose(parameters)
        self.points[step] = self.sketch(parameters)
        if len(self.points) > _MOST:
            self._interval *= 2
            self.points = {step: point for step, point in self.points.items() if step % self._interval == 0}

    def sketch(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The chosen coordinates of a set of weights."""
        parts = [weights[name].detach().flatten()[index].float().cpu() for name, index in self._chosen.items()]
        return torch.cat(parts)

    def plane(self, others: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor], float]:
        """Projects the path and other sets onto the path's first two principal components.

        Args:
            others: Further sets of weights by name; a tensor that one lacks is that of the end of the path.

        Returns:
            The path (points, 2), each set (2,), and the share of the path's variance that the plane holds.
        """
        path = torch.stack(list(self.points.values())).double()
        centre = path.mean(0)
        _, sizes, axes = torch.linalg.svd(path - centre, full_matrices=False)
        axes = axes[:2]
        held = float((sizes[:2] ** 2).sum() / (sizes**2).sum().clamp(min=1e-300))
        sizes_of = [len(index) for index in self._chosen.values()]
        last = dict(zip(self._chosen, torch.split(path[-1], sizes_of), strict=True))
        placed = {}
        for name, weights in others.items():
            parts = [
                weights[key].detach().flatten()[index].double().cpu() if key in weights else last[key]
                for key, index in self._chosen.items()
            ]
            placed[name] = (torch.cat(parts) - centre) @ axes.T
        return (path - centre) @ axes.T, placed, held

    def _choose(self, parameters: Mapping[str, Tensor]) -> None:
        total = sum(tensor.numel() for tensor in parameters.values())
        generator = torch.Generator().manual_seed(0)
        for name, tensor in parameters.items():
            if not tensor.numel():
                continue
            count = max(1, round(_COORDINATES * tensor.numel() / total)) if total > _COORDINATES else tensor.numel()
            index = torch.randint(tensor.numel(), (count,), generator=generator) if total > _COORDINATES else None
            self._chosen[name] = (torch.arange(tensor.numel()) if index is None else index).to(tensor.device)
