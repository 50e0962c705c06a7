"""An interruption anywhere leaves the raw weights live, and a resumed run ends where an uninterrupted one does."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny import NetParts, Walk, batches, differing, of, raw_of, read, steps, trainer, validation
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_merge.callbacks import EMA, SWA

# Hooks of the module, and which of their calls in the second of three epochs are interrupted. There are four batches of
# training and two of validation, which runs twice here: once for each average.
HOOKS = {
    "on_train_epoch_start": [1],
    "on_train_batch_start": [2],
    "training_step": [2],
    "on_before_zero_grad": [2],
    "on_before_backward": [2],
    "on_after_backward": [2],
    "on_before_optimizer_step": [2],
    "optimizer_step": [2],
    "on_train_batch_end": [2],
    "on_validation_start": [1, 2],
    "on_validation_epoch_start": [1, 2],
    "on_validation_batch_start": [1, 4],
    "validation_step": [1, 4],
    "on_validation_batch_end": [1, 4],
    "on_validation_epoch_end": [1, 2],
    "on_validation_end": [1, 2],
    "on_validation_model_train": [1, 2],
    "on_train_epoch_end": [1],
}
CALLS = [(hook, call) for hook, calls in HOOKS.items() for call in calls]
# These run outside the epochs.
CALLS += [("on_fit_start", 1), ("on_train_start", 1), ("on_train_end", 1)]
# From these, Lightning itself does not resume to the bits of the uninterrupted run, with or without a callback: it runs
# the forward pass of the interrupted batch again, which counts twice in BatchNorm, or counts the step or epoch twice.
INEXACT_IN_LIGHTNING = {
    "on_train_epoch_start",
    "training_step",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
}


class ScaledParts(NetParts):
    """Every batch is the same but for a factor that comes from its index.

    So a run that resumes in mid-epoch sees the data it would have seen, although its loader starts at the first batch.
    """

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0] * (1 + batch_idx / 10), batch[1]], batch_idx)


class ResumableLoader:
    """A loader with a state, for which Lightning resumes in mid-epoch with the batch that would have been next."""

    def __init__(self) -> None:
        self.batches = list(batches(4))
        self.position = 0
        self.resumed = False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.position, self.resumed = self.position if self.resumed else 0, False
        for batch in self.batches[self.position :]:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.resumed = state["position"] % len(self), True


def interrupted(hook: str, call: int, interrupt: Callable[[], None], package: ModuleType) -> LightningModule:
    """A module that is interrupted at the end of a hook: at the given call in the second epoch, or outside epochs."""
    base = of(ScaledParts, package)
    calls = 0

    def run(self: LightningModule, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = getattr(base, hook)(self, *args, **kwargs)
        calls += hook not in HOOKS or self.current_epoch == 1
        if calls == call:
            interrupt()
        return result

    return type("Interrupted", (base,), {hook: run})(norm=True)


def pull_the_plug() -> None:
    raise RuntimeError("pulled the plug")


def averages() -> list[Any]:
    return [EMA(decay=0.8), SWA(start_epoch=1)]


def fit(
    root: Path, module: LightningModule, callbacks: list[Any], package: ModuleType, ckpt_path: str | None = None
) -> LightningModule:
    run = trainer(root, callbacks, package=package, max_epochs=3)
    run.fit(module, DataLoader(list(batches(1)) * 4, batch_size=None), validation(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("hook", "call"), CALLS)
def test_interrupted_anywhere_the_raw_weights_are_live_and_the_run_goes_on(
    hook: str, call: int, package: ModuleType, tmp_path: Path
) -> None:
    live, resumed = {}, {}
    for name, callbacks in {"plain": lambda: [], "merging": averages}.items():
        rescue = package.callbacks.OnExceptionCheckpoint(tmp_path / name)
        at = call if name == "merging" or "validation" not in hook else 1
        module = interrupted(hook, at, pull_the_plug, package)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            fit(tmp_path, module, [*callbacks(), rescue], package)
        live[name] = module
        file = read(rescue.ckpt_path)
        again = callbacks()
        final = fit(tmp_path, of(ScaledParts, package)(norm=True), again, package, rescue.ckpt_path)
        resumed[name] = again[0].raw_weights() if again else final

    assert not differing(live["merging"], live["plain"])
    assert not differing(raw_of(file), live["plain"])
    assert not differing(resumed["merging"], resumed["plain"])
    if hook not in INEXACT_IN_LIGHTNING:
        whole = averages()
        fit(tmp_path, of(ScaledParts, package)(norm=True), whole, package)
        assert not differing(final, whole[0].merged_weights())
        assert not differing(again[1].merged_weights(), whole[1].merged_weights())
        assert [average.steps for average in again] == [average.steps for average in whole] == [12, 12]
        assert [average.updates for average in again] == [average.updates for average in whole] == [12, 3]


@pytest.mark.parametrize(("hook", "call"), [("training_step", 2), ("validation_step", 1), ("on_validation_end", 2)])
@pytest.mark.parametrize("kind", ["ctrl-c", "sigterm"])
def test_a_signal_leaves_the_raw_weights_live(kind: str, hook: str, call: int, tmp_path: Path) -> None:
    number, raised = {"ctrl-c": (signal.SIGINT, SystemExit), "sigterm": (signal.SIGTERM, SIGTERMException)}[kind]
    before = signal.getsignal(signal.SIGINT)
    live = []
    try:
        for callbacks in ([], averages()):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores Ctrl-C from the first one on
            at = call if callbacks or hook == "training_step" else 1
            module = interrupted(hook, at, lambda: os.kill(os.getpid(), number), lightning.pytorch)
            with pytest.raises(raised):
                fit(tmp_path, module, callbacks, lightning.pytorch)
            live.append(module)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not differing(*live)


@pytest.mark.parametrize("crash", [True, False])
def test_a_fit_leaves_nothing_behind_in_trainer_module_or_optimizer(crash: bool, tmp_path: Path) -> None:
    module = interrupted("validation_step", 1, pull_the_plug if crash else int, lightning.pytorch)
    optimizer = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer  # the same one in each fit
    ema = EMA(decay=0.8)
    run = trainer(tmp_path, [ema], max_epochs=2)
    with pytest.raises(RuntimeError, match="pulled the plug") if crash else nullcontext():
        run.fit(module, batches(4), validation())
    counted = ema.steps

    run.callbacks.remove(ema)
    run.fit_loop.max_epochs = 4
    run.fit(module, batches(4), validation())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    assert "lightning_merge" not in read(tmp_path / "plain.ckpt")
    assert not differing(read(tmp_path / "plain.ckpt")["state_dict"], module)
    assert ema.steps == counted


@pytest.mark.parametrize("trigger", ["last", "every 3 steps", "validation in mid-epoch"])
def test_a_run_resumed_from_any_file_ends_where_the_uninterrupted_run_does(
    trigger: str, package: ModuleType, tmp_path: Path
) -> None:
    arguments, settings = {
        "last": ({"save_last": True}, {}),
        "every 3 steps": ({"every_n_train_steps": 3, "save_top_k": -1}, {}),
        "validation in mid-epoch": ({"monitor": "val/loss", "save_top_k": -1}, {"val_check_interval": 2}),
    }[trigger]

    def run(folder: str, ckpt_path: Path | None = None, max_epochs: int = 3) -> tuple[Any, Any, dict[str, float]]:
        callbacks = averages()
        checkpoint = package.callbacks.ModelCheckpoint(tmp_path / folder, "{step}", **arguments)
        run = trainer(tmp_path, [*callbacks, checkpoint], package=package, max_epochs=max_epochs, **settings)
        module = of(NetParts, package)(norm=True)
        run.fit(module, ResumableLoader(), validation(), ckpt_path=ckpt_path)
        return module, callbacks, {key: value.item() for key, value in run.callback_metrics.items()}

    module, callbacks, metrics = run("whole")
    run("half", max_epochs=2)
    files = sorted(path for path in (tmp_path / "half").glob("*.ckpt") if "final" not in path.name)
    assert len(files) >= 2
    for number, file in enumerate(files):
        again, others, measured = run(f"again-{number}", ckpt_path=file)
        assert not differing(again, module)
        for left, right in zip(callbacks, others, strict=True):
            assert not differing(left.merged_weights(), right.merged_weights())
            assert not differing(left.raw_weights(), right.raw_weights())
            assert (left.steps, left.updates) == (right.steps, right.updates)
        assert measured == metrics


def test_a_fit_after_an_interrupted_one_goes_on_with_the_average(tmp_path: Path) -> None:
    class Crashing(Walk):
        def on_validation_end(self) -> None:
            raise RuntimeError("out of memory")

    ema, module = EMA(decay=0.5), Crashing()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, [ema], max_epochs=1).fit(module, steps(2), steps(1))
    assert (module.w.item(), ema.updates) == (2.0, 2)
    trainer(tmp_path, [ema], max_epochs=1).fit(module, steps(2))
    assert (module.w.item(), ema.updates) == (3.0625, 4)


def test_resuming_from_a_file_made_without_the_callback_starts_an_empty_average(tmp_path: Path) -> None:
    plain = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path)
    start = trainer(tmp_path, [plain], max_epochs=1)
    start.fit(Walk(), steps(2))
    ema = EMA(decay=0.5)
    module = Walk()
    trainer(tmp_path, [ema], max_epochs=2).fit(module, steps(2), ckpt_path=plain.best_model_path)
    # Starts as a copy of 2 and takes in 3 and 4.
    assert (module.w.item(), ema.updates) == (3.25, 2)
