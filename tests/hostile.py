"""What public callables do with values that nobody should hand them: shared by the tests of engine and callbacks."""

import inspect
import math
import signal
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

HOSTILE = (None, "x", math.nan, math.inf, -1, 0, 1.5, True, [], np.int64(2), 10**30, object())

W = {"w": torch.ones(2, 2)}
LORA = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
LIKE = {"w": torch.zeros(2, 2)}
"""Weights that differ from the others."""


class Slow(Exception):
    """A second has passed."""


@contextmanager
def at_most_a_second() -> Iterator[None]:
    def alarm(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def checkpoint() -> Path:
    path = Path(tempfile.mkdtemp()) / "step=1.ckpt"
    torch.save({"state_dict": W, "global_step": 1}, path)
    return path


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([("w", nn.Parameter(torch.ones(2, 2)))], lr=0.1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))


def of_perceptron() -> dict[str, torch.Tensor]:
    return dict(perceptron().state_dict())


# What each required argument may be, by its name, or by the callable's and its own.
GOOD: dict[str, Callable[[], Any]] = {
    "a": lambda: torch.ones(2),
    "adapter": lambda: LORA,
    "Adapter.config": lambda: {"peft_type": "LORA", "r": 1, "lora_alpha": 1},
    "Adapter.weights": lambda: LORA,
    "combine_adapters.adapters": lambda: [
        import_module("lightning_merge.adapters").Adapter(LORA, GOOD["Adapter.config"]())
    ],
    "factored.like": lambda: LORA,
    "factored.vector": lambda: {"q.weight": torch.ones(2, 2)},
    "expert": lambda: LIKE,
    "after": lambda: 0,
    "align.module": perceptron,
    "align.to": of_perceptron,
    "align.weights": of_perceptron,
    "alpha": lambda: 0.5,
    "amounts": lambda: (1, 2),
    "analogy.a": lambda: W,
    "analogy.b": lambda: W,
    "analogy.c": lambda: W,
    "anneal.base": lambda: 0.1,
    "b": lambda: torch.ones(2),
    "Bank.base": lambda: None,
    "base": lambda: W,
    "baseline": lambda: torch.ones(2),
    "base_optimizer": sgd,
    "batches": lambda: [torch.ones(2, 1)],
    "before": lambda: W,
    "candidates": lambda: {"a": W, "b": LIKE},
    "capacity": lambda: 2,
    "checkpoints": lambda: [import_module("lightning_merge.trajectory").Checkpoint(checkpoint())],
    "classes": lambda: (0, 1),
    "coefficients": lambda: (0.5, 0.5),
    "combine_files.base": lambda: checkpoint(),
    "combiner": lambda: import_module("lightning_merge.combiners").Sum(),
    "complete": lambda: True,
    "contestants": lambda: [import_module("lightning_merge.callbacks").EMA()],
    "count": lambda: 2,
    "dataset": lambda: torch.utils.data.TensorDataset(torch.ones(2, 1), torch.tensor([0, 1])),
    "decay": lambda: 0.5,
    "default": lambda: import_module("lightning_merge.selections").Selection(),
    "selection": lambda: None,
    "elapsed": lambda: 1,
    "epoch": lambda: 0,
    "files": lambda: [checkpoint()],
    "found": lambda: import_module("lightning_merge.search").Found((1.0,), 0.0, [], True),
    "find.number": lambda: 0.0,
    "adapters": lambda: [{"lora_A.weight": torch.ones(1, 2), "lora_B.weight": torch.ones(2, 1)}] * 2,
    "folder": lambda: Path(tempfile.mkdtemp()),
    "ForkMerge.branches": lambda: {"target": {"digit": 1.0}},
    "forward": lambda: lambda batch: batch,
    "head": lambda: nn.Linear(2, 2),
    "history": list,
    "init_from": lambda: "base",
    "k": lambda: 1,
    "kind": lambda: "fisher",
    "labels": lambda: torch.tensor([0, 1]),
    "left": lambda: W,
    "length": lambda: 4,
    "like": lambda: LIKE,
    "logits": lambda: torch.zeros(2, 2),
    "losses": lambda: [1.0, 2.0],
    "barrier.losses": lambda: {0.0: 1.0, 0.5: 2.0, 1.0: 1.0},
    "mean.candidates": lambda: [W, LIKE],
    "mean.count": lambda: 2,
    "measured": dict,
    "teacher.module": lambda: import_module("lightning.pytorch").LightningModule(),
    "teacher.name": lambda: "ema",
    "method": lambda: import_module("lightning_merge.search").Greedy(),
    "models": lambda: [W, W],
    "module": lambda: nn.BatchNorm1d(1),
    "InTurn.module": lambda: nn.Linear(1, 1),
    "monitor": lambda: "val/loss",
    "num_classes": lambda: 3,
    "optimizers": list,
    "path": lambda: checkpoint(),
    "successive_cosines.path": lambda: [W, LIKE, W],
    "patterns": lambda: None,
    "policy": lambda: import_module("lightning_merge.branches").Average(),
    "pretrained": lambda: "zero",
    "OnlineMerging.pretrained": lambda: "zero",
    "linearize.module": perceptron,
    "reference": lambda: W,
    "repair.members": lambda: [of_perceptron(), of_perceptron()],
    "repair.merged": of_perceptron,
    "repair.module": perceptron,
    "units.module": perceptron,
    "OnlineMerging.reference": lambda: None,
    "right": lambda: LIKE,
    "rule": lambda: import_module("lightning_merge.rules").Mean(),
    "schedule": lambda: import_module("lightning_merge.schedules").EveryNSteps(),
    "TWA.schedule": lambda: "linear",
    "score": lambda: 1.0,
    "search.score": lambda: lambda coefficients: 0.0,
    "by_tensor.tensors": lambda: ("w",),
    "data": lambda: [[torch.ones(2, 1)], [torch.ones(2, 1)]],
    "CrossEntropy.data": lambda: [[(torch.ones(2, 1), torch.tensor([0, 1]))]],
    "Entropy.module": lambda: nn.Linear(1, 2, bias=False),
    "CrossEntropy.module": lambda: nn.Linear(1, 2, bias=False),
    "Entropy.base": lambda: {"weight": torch.ones(2, 1)},
    "CrossEntropy.base": lambda: {"weight": torch.ones(2, 1)},
    "Entropy.vectors": lambda: [{"weight": torch.ones(2, 1)}],
    "CrossEntropy.vectors": lambda: [{"weight": torch.ones(2, 1)}],
    "per": lambda: "model",
    "scores": lambda: [(1.0, 0.0), (0.0, 1.0)],
    "shape": lambda: (0.5, 0.2),
    "share": lambda: 0.5,
    "step": lambda: 1,
    "steps": lambda: 1,
    "concrete_mask.score": lambda: import_module("lightning_merge.search").Entropy(
        nn.Linear(1, 2, bias=False),
        {"weight": torch.ones(2, 1)},
        [{"weight": torch.ones(2, 1)}] * 2,
        [[torch.ones(2, 1)]],
    ),
    "stored": dict,
    "statistics": lambda: {0: import_module("lightning_merge.importance").Statistics("fisher", W)},
    "RegMean.statistics": dict,
    "MaTS.statistics": dict,
    "tensors": lambda: W,
    "strength": lambda: 1.0,
    "swa_lrs": lambda: 0.1,
    "target": lambda: 0.01,
    "tasks": lambda: 2,
    "Split.tasks": lambda: ((0,), (1,)),
    "trained": lambda: W,
    "value": lambda: 1.0,
    "vector": lambda: W,
    "vectors": lambda: [W, LIKE],
    "weights": lambda: W,
    "t": lambda: 0.5,
}

# Classes that hand out what a run found, hot inner objects, bases that nobody makes, and what trains (test_replay.py).
LEFT_OUT = {
    "Moment",
    "Tangent",
    "Units",
    "Finding",
    "Examination",
    "Replayed",
    "Standing",
    "BranchStrategy",
    "Published",
    "Branches",
    "Placement",
    "OnePerRank",
    "replay",
}


ANYTHING = {("Answer", "value"), ("Measured", "value"), ("Found", "score"), ("Evaluation", "score")}
"""What may be any number, infinities included."""


def callables(package: str) -> dict[str, Callable[..., Any]]:
    """The public classes that can be made, and functions."""
    module = import_module(f"lightning_merge.{package}")
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    found = {name: getattr(module, name) for name in names if not name.startswith("_") and name not in LEFT_OUT}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isclass(value) and not inspect.isabstract(value) and value.__module__.startswith("lightning_merge"))
        or inspect.isfunction(value)
    }


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Those that have a name, with the options that are handed on."""
    every = inspect.signature(function).parameters.values()
    named = {p.name: p for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for p in every:
        for option in options(p.annotation) if p.kind is p.VAR_KEYWORD else ():
            named[option] = inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=...)
    return named


def options(annotation: Any) -> dict[str, Any]:
    """The types of options in ``**options: Unpack[Options]``, by their names."""
    handed_on = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Unpack else ()
    return typing.get_type_hints(handed_on[0]) if handed_on else {}


def good(name: str, argument: str) -> Any:
    key = f"{name}.{argument}" if f"{name}.{argument}" in GOOD else argument
    return GOOD[key]()


def arguments_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """What it can be called with: its required arguments."""
    given = {a: good(name, a) for a, p in parameters(function).items() if p.default is inspect.Parameter.empty}
    if name in ("OnDARE", "OnTIES"):
        given |= {"reference": W, "pretrained": "zero"}
    if name == "Bank":
        given["combiner"] = good(name, "combiner")
    if name == "OnlineMerging":
        given["pretrained"] = "zero"
    if name in ("ASWA", "BestK", "Report", "SMA"):
        given["mode"] = "min"  # asked for where the name of the metric does not say it
    return given


def outcome(function: Callable[..., Any], arguments: Mapping[str, Any], argument: str, value: Any) -> str | None:
    """What is wrong with how it takes a value; ``None`` if nothing is."""
    try:
        with at_most_a_second():
            made = function(**{**arguments, argument: value})
    except Slow:
        return "does not end"
    except (TypeError, ValueError) as error:
        return None if f"`{argument}" in str(error) else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(value, np.generic) and "np." in repr(made):
        return f"keeps NumPy's number: {made!r}"
    return None if may_be(function, argument, value) or (function.__name__, argument) in ANYTHING else "takes it"


def may_be(function: Callable[..., Any], argument: str, value: Any) -> bool:
    """Whether a value of this type can be what the annotation of the argument says."""
    target = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    hints = typing.get_type_hints(target)
    hint = {**hints, **options(hints.get("options"))}.get(argument, Any)
    return any(_fits(each, value) for each in _flat(hint))


def _flat(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, type(int | str)):
        return [each for part in typing.get_args(hint) for each in _flat(part)]
    return [hint]


def _fits(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    if hint is type(None) or value is None:
        return hint is type(None) and value is None
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    if hint is int:
        return isinstance(value, (int, np.integer))
    if hint is float:
        return isinstance(value, (int, float, np.integer)) and math.isfinite(value)
    if isinstance(value, list) and inspect.isclass(origin) and issubclass(origin, (tuple, Sequence)):
        return True  # of nothing
    if isinstance(value, str) and str in typing.get_args(hint):
        return True  # one pattern stands for itself
    return inspect.isclass(origin) and isinstance(value, origin)


def cases(packages: Sequence[str]) -> list[Any]:
    found = [(f"{package}.{name}", name, value) for package in packages for name, value in callables(package).items()]
    return [pytest.param(name, value, id=title) for title, name, value in found]


def refused_otherwise(name: str, function: Callable[..., Any]) -> list[str]:
    wrong = []
    for argument in parameters(function):
        for value in HOSTILE:
            if problem := outcome(function, arguments_of(name, function), argument, value):
                wrong.append(f"{name}({argument}={value!r}): {problem}")
    return wrong
