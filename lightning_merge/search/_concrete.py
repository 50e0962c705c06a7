"""A mask that all tasks share, relaxed so that it has a gradient."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_merge._checks import function, instance, number, numbers, whole
from lightning_merge._checks import path as checked_path
from lightning_merge._checks import seed as checked_seed
from lightning_merge.files import read, replacing
from lightning_merge.search._objectives import CrossEntropy, Entropy
from lightning_merge.weights import Weights, average_dtype

_FIRST, _SECOND, _FLOOR = 0.9, 0.999, 1e-8


@torch.no_grad()
def concrete_mask(
    score: Entropy | CrossEntropy,
    coefficients: Sequence[float],
    steps: int,
    *,
    rate: float = 1e-3,
    inner_rate: float = 0.0,
    temperature: float = 0.5,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    every: int = 50,
    on_step: Callable[[int, float], None] | None = None,
) -> Weights:
    """Learns ``m`` so that the loss of ``base + sum_t a_t (m / mean m) v_t`` falls: Concrete subspace learning.

    Every number has a logit ``x``, 0 at first; at each step ``m = sigmoid((x + log u - log(1 - u)) / temperature)``
    with fresh uniform ``u``, a mean for each tensor, and Adam follows the loss of the next batches. The mask of one
    more draw is what comes back, divided by its means: multiply the task vectors with it, and search their coefficients
    as those of any others. With an ``inner_rate`` the coefficients first take a step of Adam under that mask, from
    where they are given each time, on batches of their own: the two levels of Concrete AdaMerging.

    Memory: the vectors, and seven more copies of the weights. Time of a step: a forward and a backward pass for each
    data set, twice with an ``inner_rate``.

    Args:
        score: Module, base, vectors and batches.
        coefficients: As ``search`` would give them to ``score``, as 0.3 for each.
        steps: At least 1.
        rate: Of the logits; more than 0.
        inner_rate: Of the coefficients, 1 in the published code; 0: they stay as they are (Concrete Task Arithmetic).
        temperature: More than 0; the lower, the closer the mask to 0 and 1.
        seed: Of all draws.
        log: A file of the state, written every so many steps and at the end; the same call goes on from it bit for
            bit, and any other is refused.
        every: Steps between two writes; at least 1.
        on_step: Told the number of steps and the loss, to show progress.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range, a loss is not finite, or ``log`` is of another call.

    Example:
        >>> module = torch.nn.Linear(2, 2, bias=False)
        >>> base, vectors = {"weight": torch.zeros(2, 2)}, [{"weight": torch.eye(2)}]
        >>> mask = concrete_mask(Entropy(module, base, vectors, [[torch.eye(2)]]), [0.3], steps=2)
        >>> mask["weight"].shape, round(float(mask["weight"].mean()), 4)
        (torch.Size([2, 2]), 1.0)

    References:
        Tang et al., "Concrete subspace learning based interference elimination for multi-task model fusion", 2023.
    """
    instance("score", score, (Entropy, CrossEntropy), "an `Entropy` or a `CrossEntropy`")
    shares = numbers("coefficients", coefficients)
    steps, every, seed = whole("steps", steps, 1), whole("every", every, 1), checked_seed("seed", seed, 2**32 - 1)
    rate, inner_rate = number("rate", rate, "(0, inf)"), number("inner_rate", inner_rate, "[0, inf)")
    temperature = number("temperature", temperature, "(0, inf)")
    if on_step is not None:
        function("on_step", on_step)
    header = {
        "coefficients": list(shares),
        "steps": steps,
        "rate": rate,
        "inner_rate": inner_rate,
        "temperature": temperature,
    }
    run = _Run(score, shares, {**header, "seed": seed, "subject": score.subject})
    path = None if log is None else Path(checked_path("log", log))
    if path is not None and path.exists():
        run.go_on(path)
    while run.step < steps:
        loss = run.advance()
        if path is not None and (run.step % every == 0 or run.step >= steps):
            run.write(path)
        if on_step is not None:
            on_step(run.step, loss)
    return run.mask()


class _Run:
    """The logits, and the means of both levels' gradients."""

    def __init__(self, score: Entropy | CrossEntropy, shares: tuple[float, ...], header: dict[str, Any]) -> None:
        self.score, self.shares, self.header, self.step = score, shares, header, 0
        like = score.merged_module.vectors[0]
        # In half precision a step of 1e-3 is lost.
        self.logits = {n: torch.zeros_like(like[n], dtype=average_dtype(like[n])) for n in score.tensors}
        self.outer = {name: _Means.of(tensor) for name, tensor in self.logits.items()}
        self.inner = _Means.of(torch.zeros(len(shares), dtype=torch.float64))

    def advance(self) -> float:
        """One step; gives its loss."""
        drawn = self._drawn()
        mask = {name: _divided(z) for name, z in drawn.items()}
        shares, two = self.shares, self.header["inner_rate"] > 0.0
        if two:
            slopes = torch.tensor(self._loss(shares, mask, 2 * self.step)[2], dtype=torch.float64)
            moved = torch.tensor(shares, dtype=torch.float64) - self.inner.move(slopes, self.header["inner_rate"])
            shares = tuple(moved.tolist())
        loss, slopes_of, _ = self._loss(shares, mask, 2 * self.step + 1 if two else self.step)
        for name, z in drawn.items():
            by_mask = slopes_of[name] * self.score.merged_module.total(shares, name)
            by_log = by_mask - (by_mask * mask[name]).sum() / max(1, z.numel())
            by_logit = by_log * mask[name] * torch.sigmoid(-z) / self.header["temperature"]
            self.logits[name] -= self.outer[name].move(by_logit, self.header["rate"])
        self.step += 1
        return loss

    def mask(self) -> Weights:
        """That of the next draw, divided by its means."""
        return {name: _divided(z) for name, z in self._drawn().items()}

    def write(self, path: Path) -> None:
        outer = {name: each.state() for name, each in self.outer.items()}
        state = {"step": self.step, "logits": self.logits, "outer": outer, "inner": self.inner.state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            torch.save({"mask": self.header, **state}, unfinished)

    def go_on(self, path: Path) -> None:
        state = read(path)
        found = state.get("mask") if isinstance(state, Mapping) else None
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} is not the log of a mask. Give `log` another file.")
        for key, value in self.header.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path} is the log of another mask: `{key}` is {found.get(key)} there and {value} here. Give `log`"
                    " another file, or search as before."
                )
        try:
            self.step, self.logits = state["step"], {name: state["logits"][name] for name in self.logits}
            self.outer = {name: _Means(*state["outer"][name]) for name in self.logits}
            self.inner = _Means(*state["inner"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is a log of a mask that lacks {error}. Give `log` another file.") from None

    def _drawn(self) -> Weights:
        """What the relaxed mask of this step is the sigmoid of, whatever was drawn before."""
        generator = torch.Generator().manual_seed(self.header["seed"] * 2**20 + self.step)
        found = {}
        for name, logits in self.logits.items():
            uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).to(logits.device)
            small = torch.finfo(logits.dtype).eps
            noise = torch.logit(uniform.clamp(small, 1 - small))
            found[name] = (logits + noise) / self.header["temperature"]
        return found

    def _loss(
        self, shares: tuple[float, ...], mask: Weights, batch: int
    ) -> tuple[float, dict[str, Tensor], tuple[float, ...]]:
        loss, slopes, by_share = self.score.under(shares, mask, batch)
        if loss != loss or loss in (float("inf"), -float("inf")):
            raise ValueError(f"the loss at step {self.step} is {loss}: lower `rate` or `coefficients`.")
        return loss, slopes, by_share


def _divided(z: Tensor) -> Tensor:
    """``m / mean m`` of ``m = sigmoid z``, also where all of a tensor is too close to 0 for a number."""
    return logsigmoid(z).reshape(-1).softmax(0).mul(z.numel()).view_as(z)


class _Means:
    """Adam's of one tensor."""

    def __init__(self, mean: Tensor, square: Tensor, steps: int) -> None:
        self.mean, self.square, self.steps = mean, square, steps

    @classmethod
    def of(cls, like: Tensor) -> "_Means":
        return cls(torch.zeros_like(like), torch.zeros_like(like), 0)

    def state(self) -> list[Any]:
        return [self.mean, self.square, self.steps]

    def move(self, slope: Tensor, rate: float) -> Tensor:
        """What is subtracted for a gradient."""
        self.steps += 1
        self.mean.lerp_(slope, 1 - _FIRST)
        self.square.mul_(_SECOND).addcmul_(slope, slope, value=1 - _SECOND)
        scale = (self.square.sqrt() / (1 - _SECOND**self.steps) ** 0.5).add_(_FLOOR)
        return self.mean.mul(rate / (1 - _FIRST**self.steps)).div_(scale)
