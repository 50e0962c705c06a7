"""Statistics of a trained model that combiners weigh its numbers by."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from lightning_merge._checks import instance, one_of, path, settle, whole
from lightning_merge._mergeable import named
from lightning_merge.importance import _file
from lightning_merge.weights import Inventory, Weights, canonical, is_averaged

Kind: TypeAlias = Literal["fisher", "gram", "adam"]
Labels: TypeAlias = Literal["true", "model"]

_FEW = 32
"""Numbers of each parameter that say which weights statistics are of."""


@final
@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one model, by the name of the parameter that they are of.

    ``"fisher"`` and ``"adam"`` hold a number for each number of the parameter: the mean over samples of squared
    gradients of their loss, and the second moments of Adam, a mean over steps of squared gradients of a batch.
    ``"gram"`` holds for the weight of a layer, (out, in, ...), the mean over its inputs ``x`` of ``x x^T``, of shape
    (d, d) with ``d = in * ...`` as the weight is flattened: a convolution takes a patch of its image at a time.

    Args:
        kind: ``"fisher"``, ``"gram"`` or ``"adam"``.
        tensors: The statistics, on any device. Those of a file stay on the disk until they are used.
        samples: Samples they were measured on, over all processes; 0 if nobody counted.
        labels: Of ``"fisher"``: whether the loss was of the data's own labels, or of some that the model drew.
        left_out: Why a parameter has none, by its name.
        weights: A few numbers of each parameter, which tell weights apart; empty if it may be those of any model.
        aliases: Further names of tied tensors, with the name that the statistics have.
        names: All tensors of the model and of its files; empty if nobody knows.

    Raises:
        TypeError: If ``tensors`` are not named tensors.
        ValueError: If ``kind`` is none of these, or statistics hold a NaN or an infinity or are all zero.

    Example:
        >>> Statistics("fisher", {"w": torch.tensor([1.0, 0.0])}).norm
        1.0
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    samples: int = 0
    labels: Labels | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        one_of("kind", self.kind, Kind)
        named("weights", self.weights)
        for argument in ("left_out", "aliases"):
            instance(argument, getattr(self, argument), Mapping, "texts by name")
        instance("names", self.names, frozenset, "a frozen set of texts")
        settle(self, samples=whole("samples", self.samples, 0))
        one_of("labels", self.labels, ("true", "model", None))
        if self.file is None:
            for name, tensor in named("tensors", self.tensors).items():
                self._refuse_damage(name, tensor)
        norms = (float(torch.linalg.vector_norm(t.detach().double())) for t in self.tensors.values())
        settle(self, _norm=self.tensors.norm if isinstance(self.tensors, _file.OnDisk) else math.hypot(*norms))
        if not self.norm:
            raise ValueError(
                f"{self.title} are all zero, so nothing of this model would count: measure them on data that"
                " the loss has a gradient on. One that is 0 for a sample alone, as a contrastive one, has none."
            )

    def __eq__(self, other: object) -> bool:
        """Whether it is the same, or was read from the same file."""
        if self is other or not isinstance(other, Statistics):
            return self is other
        return self.file is not None and self.tensors == other.tensors

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The file, which combiners take in its place."""
        return f"Statistics({self.kind!r}, {len(self.tensors)} tensors)" if self.file is None else repr(self.file)

    @property
    def file(self) -> str | None:
        """Where they are read from."""
        return self.tensors.path if isinstance(self.tensors, _file.OnDisk) else None

    @property
    def title(self) -> str:
        """What messages call them."""
        return f"statistics of kind {self.kind!r}" + ("" if self.file is None else f" in {self.file}")

    @property
    def summary(self) -> str:
        """What they are, in a line."""
        of = f" of {self.samples:,} samples" if self.samples else ""
        labels = {"true": " with labels of the data", "model": " with labels that the model drew", None: ""}
        return f"{self.title}{of}{labels[self.labels]}"

    @property
    def omissions(self) -> str:
        """What was left out, as the end of a line; empty if nothing was."""
        names: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            names.setdefault(why, []).append(name)
        parts = [f"{', '.join(some[:4])}{', ...' if len(some) > 4 else ''} ({why})" for why, some in names.items()]
        return "".join([f"; left out, {len(self.left_out)} in all: ", ", ".join(parts)]) if parts else ""

    @property
    def norm(self) -> float:
        """The 2-norm of all of them."""
        known: float = vars(self)["_norm"]
        return known

    @classmethod
    def of(cls, module: nn.Module, kind: Kind, tensors: Weights, **facts: Any) -> "Statistics":
        """Statistics of a module's weights as they are now.

        Args:
            module: The module.
            kind: As for the class.
            tensors: By canonical name of the parameter.
            facts: ``samples``, ``labels`` and ``left_out``.
        """
        found = Inventory(module)
        held = {name: tensor for name, tensor in found.tensors.items() if is_averaged(tensor)}
        few = {name: few_of(tensor) for name, tensor in found.parameters.items() if name in held}
        aliases = {alias: name for alias, name in found.aliases.items() if name in held}
        # What else a file holds, as metrics and hooks of the module add.
        saved = [canonical(key) for key, value in module.state_dict().items() if isinstance(value, Tensor)]
        return cls(kind, tensors, weights=few, aliases=aliases, names=frozenset([*held, *aliases, *saved]), **facts)

    @classmethod
    def open(cls, file: str | os.PathLike[str]) -> "Statistics":
        """Those of a file that ``ImportanceStatistics`` or ``write`` has written.

        Args:
            file: Its path.

        Raises:
            ValueError: If there is no such file, it is none of statistics, or they hold a NaN or are all zero.
        """
        return cls(**_file.read(path("file", file)))

    def write(self, file: str | os.PathLike[str]) -> None:
        """Writes them to a file in safetensors format, whole or not at all.

        Args:
            file: A path, in a folder that exists, or a URL.

        Raises:
            OSError: If the system refuses.
        """
        facts: dict[str, Any] = {"samples": self.samples, "labels": self.labels, "left_out": dict(self.left_out)}
        facts |= {"norm": self.norm, "aliases": dict(self.aliases), "names": sorted(self.names)}
        _file.write(path("file", file), self.kind, self.tensors, self.weights, facts)

    def find(self, name: str) -> Tensor | None:
        """The statistics of a tensor of the model; ``None`` if it has none.

        Args:
            name: Its name.

        Raises:
            ValueError: If the model that they are of has no such tensor, or they cannot be read.
        """
        if self.shape_of(name) is None:
            return None
        tensor = self.tensors[self.aliases.get(name, name)]
        if self.file is not None:
            self._refuse_damage(name, tensor)
        return tensor

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Their shape, without reading them; ``None`` if the tensor has none.

        Args:
            name: Its name.

        Raises:
            ValueError: If the model that they are of has no such tensor.
        """
        own = self.aliases.get(name, name)
        if isinstance(self.tensors, _file.OnDisk) and own in self.tensors:
            return self.tensors.entries[own].shape
        if own in self.tensors:
            return tuple(self.tensors[own].shape)
        if self.names and name not in self.names:
            raise ValueError(f"{self.title} are of another model: it has no `{name}`, but {_some(self.names)}.")
        return None

    def refuse_other_weights(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Raises if they were measured on other weights, in whatever precision these are.

        Args:
            weights: Some tensors of the model.
            where: What messages call them.

        Raises:
            ValueError: Naming the first tensor that differs.
        """
        for name, tensor in weights.items():
            few = self.weights.get(self.aliases.get(name, name))
            if few is not None and not _equal(few, few_of(tensor)):
                raise ValueError(
                    f"{self.title} are of other weights than {where}: `{name}` differs. Give the statistics in the"
                    " order of the models, and the checkpoint of the step they were measured at, which is the end of"
                    " the fit; of a file with an average that may be its other set. `lightning-merge statistics FILE`"
                    " measures those of a file."
                )

    def _refuse_damage(self, name: str, tensor: Tensor) -> None:
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.title} hold a NaN or an infinity, in `{name}`.")
        if self.kind != "gram" and bool((tensor < 0).any()):
            raise ValueError(f"{self.title} cannot be mean squares: `{name}` holds a negative number.")


def few_of(tensor: Tensor) -> Tensor:
    """Some numbers of a tensor, from its first to its last, in host memory."""
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, max(0, len(flat) - 1), min(len(flat), _FEW), dtype=torch.float64).round().long()
    return flat[places.to(flat.device)].cpu()


def checked(name: str, value: Any, kinds: tuple[str, ...], title: str) -> dict[int | str, Statistics]:
    """Statistics by task, read from files where paths are given.

    Raises:
        TypeError: If it is no mapping from tasks to statistics.
        ValueError: If a file is none of statistics, or they are of another kind than the combiner takes.
    """
    instance(name, value, Mapping, "a mapping from tasks to statistics or to their files")
    return {task: one(f"`{name}` of task {task}", each, kinds, title) for task, each in value.items()}


def one(which: str, value: Any, kinds: tuple[str, ...], title: str) -> Statistics:
    """Statistics of a kind that a combiner takes, from a file where a path is given.

    Raises:
        TypeError: If it is neither.
        ValueError: If the file is none of statistics, or they are of another kind.
    """
    if not isinstance(value, Statistics | str | os.PathLike):
        raise TypeError(f"{which} must be statistics or the path of their file, got {value!r}.")
    try:
        found = value if isinstance(value, Statistics) else Statistics.open(value)
    except ValueError as error:
        raise ValueError(f"{which}: {error}") from error
    if found.kind not in kinds:
        raise ValueError(
            f"{which}: {title} takes statistics of kind {' or '.join(map(repr, kinds))}, and got {found.title}."
        )
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the numbers are the same in the precision of one of the two."""
    return a.shape == b.shape and (torch.equal(a.to(b), b) or torch.equal(b.to(a), a))


def _some(names: frozenset[str]) -> str:
    found = sorted(names)
    return ", ".join(f"`{name}`" for name in found[:3]) + (", ..." if len(found) > 3 else "")
