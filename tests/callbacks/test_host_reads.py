"""A step waits for nothing: no average and no policy reads a number from the device in the steady state."""

import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from device_counts import fake_cuda
from golden.runs import METHODS, loaders, module, standing
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, batches, differing, read, trainer, validation, values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_merge._averaging._undecided import by_reference, has_room
from lightning_merge.callbacks import ASWA, EMA, LAWA, SMA, SWA, SWAD, Extrapolate, PostHocEMA, WeightMerging
from lightning_merge.callbacks._publication import _canary
from lightning_merge.rules import Mean, Rule
from lightning_merge.selections import Selection
from lightning_merge.weights import Finding, made_anew

OURS = Path(__file__).resolve().parents[2]
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


class Reads(TorchDispatchMode):
    """Counts what would wait for a device, where code of the project asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counting and func._schema.name in READS and (place := _asked_by_us()):
            self.found[f"{func._schema.name} in {place}"] += 1
        return func(*args, **(kwargs or {}))


def _asked_by_us() -> str | None:
    frame: Any = sys._getframe(2)
    passing = ("/torch/", "contextlib", "_copies_before_writing")  # a mode that hands on what others ask
    while frame is not None and any(part in frame.f_code.co_filename for part in passing):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename) if frame is not None else Path()
    # An environment may lie in the checkout.
    ours = path.is_relative_to(OURS) and not {"tests", "site-packages"} & set(path.relative_to(OURS).parts)
    return f"{path.name}:{frame.f_lineno}" if ours else None


class Steady(pl.Callback):
    """Turns the counting on for the steps in the middle of an epoch."""

    def __init__(self, reads: Reads, on: bool) -> None:
        self.reads = reads
        self.on = on

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.on:
            self.reads.counting = trainer.current_epoch > 0 and not trainer.is_last_batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.on:
            self.reads.counting = False


READ_AT_A_STEP = {  # which methods do, and why
    "twa": "the coefficients that are trained are in host memory",
    "twa-before-its-stage": "as above",
    "onties": "a threshold is counted before what is below it is cut",
    "wash": "the places of a merge are drawn in host memory",
    "warp": "a merge decides by angles whether it is a mean",
    "branching": "a merge by ModelStock decides by angles",
    "branching-by-score": "a merge decides by scores",
    "forkmerge": "as above",
}


@pytest.mark.parametrize("method", [method for method in METHODS if method not in READ_AT_A_STEP])
def test_no_step_reads_a_number(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reads = Reads()
    around = [Steady(reads, True), *METHODS[method](), Steady(reads, False)]
    with reads:
        trainer(tmp_path, around, max_epochs=3).fit(module(method), *loaders())
    assert dict(reads.found) == {}


def test_a_read_at_a_step_is_counted(tmp_path: Path) -> None:
    class Reading(EMA):
        def take_in(self, *args: Any) -> None:
            super().take_in(*args)
            self._buffers["net.1.num_batches_tracked"].item()

    # As if it stood in a file of ours; one that is there, for a report of coverage opens it.
    Reading.take_in.__code__ = Reading.take_in.__code__.replace(co_filename=str(OURS / "callbacks" / "_ema.py"))
    reads = Reads()
    with reads:
        trainer(tmp_path, [Steady(reads, True), Reading(0.8), Steady(reads, False)], max_epochs=2).fit(
            module("ema"), *loaders()
        )
    assert sum(reads.found.values()) > 0


def test_the_weights_before_and_after_a_validation_are_compared_with_one_read() -> None:
    with fake_cuda() as counts:
        tensors = {("raw", f"{i}"): torch.empty(8, 8, device="cuda") for i in range(160)}
        before, after = _canary._fingerprints(tensors), _canary._fingerprints(tensors)
        assert counts.reads == []
        _canary._changed(before, after)
        assert counts.reads == ["tolist"]


# ---- an answer that comes after the step


LATE = {
    "ema": lambda: EMA(0.8),
    "ema, compensated": lambda: EMA(half_life=3, compensated=True, warmup="timm"),
    "ema of averaged buffers": lambda: EMA(0.8, selection=Selection(buffers="average")),
    "ema of copied buffers": lambda: EMA(0.8, selection=Selection(buffers="copy")),
    "ema from later on": lambda: EMA(0.8, start_step=4, every_n_steps=2),
    "sma": lambda: SMA("val/loss", start_step=2),
    "swad": lambda: SWAD("val/loss", n_converge=1, n_tolerance=2, stop=False),
    "swa": lambda: SWA(start_epoch=0),
    "lawa": lambda: LAWA(k=2, every_n_steps=1),
    "lawa on the host": lambda: LAWA(k=2, every_n_steps=1, store="cpu"),
    "aswa": lambda: ASWA("val/loss", start_epoch=0),
    "post-hoc": lambda: PostHocEMA(every=2),
    "extrapolate": lambda: Extrapolate(1.3),
    "a rule that cannot be undone": lambda: WeightMerging(Plain(), name="plain"),
}


class Plain(Rule):
    """The newest weights, written by torch alone."""

    def init(self, weights: Any) -> Any:
        return {"newest": {name: t.detach().clone() for name, t in weights.items()}, "updates": 0}

    def update(self, state: Any, weights: Any) -> None:
        state["updates"] += 1
        for name, tensor in state["newest"].items():
            tensor.copy_(weights[name].detach())

    def result(self, state: Any) -> Any:
        return dict(state["newest"]) if state["updates"] else None


class Spoilt(pl.Callback):
    """At some steps one number of one tensor is a NaN, which the next step begins without."""

    def __init__(self, at: set[int]) -> None:
        self.at = at

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before = values(pl_module)
        if trainer.global_step + 1 in self.at:
            pl_module.net[2].weight.grad[0, 0] = torch.nan

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.at:
            pl_module.load_state_dict(self.before)


class WithoutMomentum(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(make: Any, root: Path, spoilt: set[int]) -> tuple[Any, dict[str, Any], list[str]]:
    average = make()
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saver = ModelCheckpoint(root, filename="last", save_top_k=1, every_n_train_steps=5)
        fit = trainer(root, [Spoilt(spoilt), average, saver], max_epochs=3)
        fit.fit(WithoutMomentum(norm=True), batches(), validation())
    said = [str(each.message) for each in caught if "NaN" in str(each.message)]
    return average, read(saver.best_model_path), said


@pytest.mark.parametrize("spoilt", [{1}, {3, 6, 12}], ids=str)
@pytest.mark.parametrize("kind", LATE)
def test_an_answer_that_comes_later_changes_nothing(
    kind: str, spoilt: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, file, said = run(LATE[kind], tmp_path / "at once", spoilt)
    monkeypatch.setattr(Finding, "is_there", False)
    later, late_file, said_later = run(LATE[kind], tmp_path / "later", spoilt)
    assert standing(Net(norm=True), [later])["averages"].keys() == {later.name}
    assert differing(later.merged_weights() or {}, at_once.merged_weights() or {}) == []
    assert differing(later.raw_weights(), at_once.raw_weights()) == []
    for name in ("updates", "steps", "update_window", "skipped_nonfinite", "evaluations", "initial_share"):
        assert getattr(later, name) == getattr(at_once, name)
    assert said_later == said
    assert same(late_file["lightning_merge"]["states"], file["lightning_merge"]["states"])
    assert differing(late_file["state_dict"], file["state_dict"]) == []


def same(left: Any, right: Any) -> bool:
    """Whether nested values are the same, tensors bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_an_update_that_waits_for_its_answer_writes_nothing_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    average, live = {"w": torch.ones(2)}, {"w": torch.full((2,), torch.nan)}
    rule = Mean()
    state = rule.init(average)
    before = by_reference(state)
    with made_anew():
        rule.update(state, live)
    assert state["mean"]["w"].isnan().all()
    assert before["mean"]["w"].tolist() == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore:.*holds a NaN or an infinity")
def test_whoever_looks_at_an_average_sees_no_undecided_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Finding, "is_there", False)

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            was_undecided.append(average._undecided is not None)
            seen.append((average.updates, average.skipped_nonfinite, average.update_window))

    average, seen, was_undecided = EMA(0.5), [], []
    trainer(tmp_path, [Spoilt({2}), average, Looks()], max_steps=3).fit(WithoutMomentum(norm=True), batches())
    assert was_undecided == [True] * 3
    assert seen == [(1, 0, (1, 1)), (1, 1, (1, 1)), (2, 1, (1, 3))]


class Replaces(pl.Callback):
    """After a step, a parameter and a buffer are other tensors; after another the fit fails."""

    def __init__(self, replaced: int, fails: int) -> None:
        self.replaced, self.fails = replaced, fails

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.global_step == self.replaced:
            pl_module.net[0].bias = torch.nn.Parameter(torch.ones_like(pl_module.net[0].bias))
            pl_module.net[1].running_mean = torch.ones(8)
        if trainer.global_step == self.fails:
            raise RuntimeError("of the user")


@pytest.mark.filterwarnings("ignore:.*holds a NaN or an infinity")
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_an_update_is_decided_when_tensors_are_replaced_and_when_the_fit_fails(
    buffers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(Finding, "is_there", False)
        average = EMA(0.5, selection=Selection(buffers=buffers))
        fit = trainer(tmp_path, [average, Replaces(2, 6), Spoilt({2, 6})], max_epochs=3)
        with pytest.raises(RuntimeError, match="of the user"):
            fit.fit(WithoutMomentum(norm=True), batches())
        assert average._undecided is None
        found.append(average)
    at_once, later = found
    assert (later.updates, later.skipped_nonfinite) == (at_once.updates, at_once.skipped_nonfinite) == (4, 2)
    assert differing(later.merged_weights(), at_once.merged_weights()) == []


@pytest.mark.parametrize(("memory", "expected"), [(20 * 4000, True), (20 * 4000 - 20, False)])
def test_an_average_is_there_twice_only_where_it_takes_little_of_the_device(
    memory: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    with fake_cuda():
        tensors = {"w": torch.empty(1000, device="cuda", dtype=torch.bfloat16), "here": torch.empty(10**6)}
        assert has_room(tensors) is expected
