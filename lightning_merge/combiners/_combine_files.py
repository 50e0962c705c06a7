"""Combining models that are files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge._checks import instance, path, sequence
from lightning_merge._mergeable import carried
from lightning_merge.combiners._base import Combiner, label
from lightning_merge.combiners._vectors import add_vector, task_vector
from lightning_merge.combiners._with_statistics import WithStatistics
from lightning_merge.files._layouts import open_set
from lightning_merge.weights import Weights, first_mismatch, region

_GROUP = 2**23


def combine_files(
    combiner: Combiner, base: str | Path, files: Sequence[str | Path], tasks: Iterable[int | str] | None = None
) -> Weights:
    """The model that ``base`` and the task vectors of the files combine to: ``base + combiner(file - base, ...)``.

    A group of tensors is merged over all files before the next is read, and one file is open at a time, so the memory
    it takes is that of the result and little more, whatever the number of files. Rules that need the whole model at
    once (``Combiner.locality``: OPCM, TIES with global ranking) hold their state and one vector besides.

    Args:
        combiner: How the vectors are merged.
        base: A checkpoint of any kind that ``lightning-merge inspect`` knows, as a path or ``PATH:SET``.
        files: Checkpoints of models trained from the base, at least one.
        tasks: A label for each; 0, 1, 2, ... if left out.

    Returns:
        Weights under the names and in the dtypes of the base; counters are the base's. What is tied in all files is one
        tensor.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a file cannot be read, is of another model (the first difference is named), or holds a NaN, or
            whole numbers that are no counters (quantised weights, packed codes, masks) and not those of the base.

    Example:
        >>> import tempfile, torch
        >>> from lightning_merge.combiners import Sum
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name, value in (("base", 1.0), ("cars", 3.0), ("pets", 0.0)):
        ...     torch.save({"w": torch.tensor([value])}, folder / f"{name}.pt")
        >>> combine_files(Sum(scale=0.5), folder / "base.pt", [folder / "cars.pt", folder / "pets.pt"])
        {'w': tensor([1.5000])}
    """
    instance("combiner", combiner, Combiner)
    for argument, file in (("base", base), *(("files", file) for file in sequence("files", files, "several paths"))):
        path(argument, file)
    labels = [label("tasks", task) for task in (range(len(files)) if tasks is None else sequence("tasks", tasks))]
    if not files or len(labels) != len(files):
        raise ValueError(f"`files` must be at least one, and `tasks` as many, got {len(files)} and {len(labels)}.")
    layout = _opened("base", base)
    places = {name: [_place(tensor)] for name, tensor in layout.items()}
    for file in files:
        weights = _opened("files", file)
        if (difference := first_mismatch(layout, weights)) is not None:
            raise ValueError(f"{file} is of another model than {base}: {difference}.")
        for name, found in places.items():
            found.append(_place(weights[name]))
    first: dict[Any, str] = {}  # of tied tensors, which are merged and count once
    owners = {name: first.setdefault(tuple(found), name) for name, found in places.items()}
    groups = list(_groups({name: tensor for name, tensor in layout.items() if owners[name] == name}))
    del layout, weights
    merged: Weights = {}
    for together in [[name for group in groups for name in group]] if combiner.locality == "model" else groups:
        pairs = zip(files, labels, strict=True)
        vector = combiner.combine((_vector(file, base, together, combiner, task) for file, task in pairs), labels)
        for group in groups:
            if own := [name for name in group if name in together]:
                part = {name: vector.pop(name) for name in own if name in vector}
                merged |= add_vector(_read(base, own), part)
    return {name: merged[owner] for name, owner in owners.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors of a file that are the same numbers in the same shape."""
    return region(tensor), tensor.shape, tensor.stride()


def _groups(layout: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors of about ``_GROUP`` numbers together."""
    group: list[str] = []
    room = _GROUP
    for name, tensor in layout.items():
        group.append(name)
        room -= tensor.numel()
        if room <= 0:
            yield group
            group, room = [], _GROUP
    if group:
        yield group


def _vector(file: str | Path, base: str | Path, names: list[str], combiner: Combiner, task: int | str) -> Weights:
    vector: Weights = {}
    layout = _open(base)
    for group in _groups({name: layout[name] for name in names}):
        try:
            own, start = _read(file, group), _read(base, group)
            for name in [name for name in group if not own[name].is_floating_point() and not own[name].is_complex()]:
                carried(name, (start[name], own[name]))
            vector |= task_vector(own, start)
            if isinstance(combiner, WithStatistics):
                combiner.refuse_other_base(start, str(base))
                combiner.refuse_other_weights(task, own, str(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return vector


def _read(file: str | Path, names: list[str]) -> Weights:
    """Copies of some tensors of a file, which is mapped into memory only meanwhile."""
    weights = _open(file)
    return {name: weights[name].clone() for name in names}


def _opened(argument: str, file: str | Path) -> Weights:
    try:
        return _open(file)
    except ValueError as error:
        raise ValueError(f"`{argument}`: {error}") from error


def _open(file: str | Path) -> Weights:
    opened, chosen = open_set(str(file))
    return opened.choose(chosen).weights
