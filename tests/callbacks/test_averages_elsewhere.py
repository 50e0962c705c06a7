"""``device="cpu"``: an average in host memory, made while the device goes on, is the average on the device."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_host_reads import Spoilt, WithoutMomentum, same
from tiny import batches, differing, read, trainer, validation

from lightning_merge import weights
from lightning_merge._averaging._tensors import Tensors
from lightning_merge.callbacks import (
    ASWA,
    BEMA,
    EMA,
    LAWA,
    SMA,
    SWA,
    SWAD,
    TWA,
    AcceptIfBetter,
    Anneal,
    BestK,
    Extrapolate,
    Lookaround,
    PostHocEMA,
)
from lightning_merge.rules import ExponentialMean
from lightning_merge.selections import Selection

AVERAGES: dict[str, Callable[..., Any]] = {
    "ema": lambda **o: EMA(0.8, **o),
    "compensated": lambda **o: EMA(half_life=3, compensated=True, warmup="timm", **o),
    "copied buffers": lambda **o: EMA(0.8, selection=Selection(buffers="copy"), **o),
    "from later on": lambda **o: EMA(0.8, start_step=4, every_n_steps=2, **o),
    "sma": lambda **o: SMA("val/loss", start_step=2, **o),
    "swad": lambda **o: SWAD("val/loss", n_converge=1, n_tolerance=2, stop=False, **o),
    "swa": lambda **o: SWA(start_epoch=0, **o),
    "lawa": lambda **o: LAWA(k=2, every_n_steps=1, **o),
    "aswa": lambda **o: ASWA("val/loss", start_epoch=0, **o),
    "best": lambda **o: BestK("val/loss", k=2, **o),
    "post-hoc": lambda **o: PostHocEMA(every=2, **o),
    "bema": lambda **o: BEMA(0.7, **o),
    "anneal": lambda **o: Anneal("cosine", 7, 2, **o),
    "sliding anneal": lambda **o: Anneal("1-sqrt", 6, memory=3, **o),
    "extrapolate": lambda **o: Extrapolate(1.3, **o),
}


@pytest.fixture
def as_if_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights count as being on a device, so all is done as there."""
    monkeypatch.setattr(Tensors, "is_elsewhere", property(lambda self: self._on_host))
    yield
    assert not [thread for thread in threading.enumerate() if "average in host memory" in thread.name]


def run(average: Any, root: Path, spoilt: set[int], others: tuple[Any, ...] = (), **settings: Any) -> dict[str, Any]:
    saver = ModelCheckpoint(root, filename="last", every_n_train_steps=5)
    fit = trainer(root, [Spoilt(spoilt), average, *others, saver], **{"max_epochs": 3, **settings})
    fit.fit(WithoutMomentum(norm=True), batches(), validation())
    return read(saver.best_model_path)


@pytest.mark.filterwarnings("ignore:.*holds a NaN or an infinity")
@pytest.mark.parametrize("spoilt", [set(), {1, 6}], ids=str)
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_in_host_memory_is_that_on_the_device(
    name: str, spoilt: set[int], tmp_path: Path, as_if_on_a_device: None
) -> None:
    there, here = AVERAGES[name](), AVERAGES[name](device="cpu")
    file, other = run(there, tmp_path / "there", spoilt), run(here, tmp_path / "here", spoilt)
    assert here._background is None
    assert differing(here.merged_weights() or {}, there.merged_weights() or {}) == []
    for field in ("updates", "steps", "update_window", "skipped_nonfinite", "evaluations", "final_metrics"):
        assert getattr(here, field) == getattr(there, field)
    assert same(other["lightning_merge"]["states"], file["lightning_merge"]["states"])
    assert differing(other["state_dict"], file["state_dict"]) == []


def test_a_run_goes_on_in_host_memory_from_a_file_of_the_device_and_back(
    tmp_path: Path, as_if_on_a_device: None
) -> None:
    whole = EMA(0.8)
    run(whole, tmp_path / "whole", set(), max_epochs=4)
    for first, second in ((None, "cpu"), ("cpu", None)):
        root = tmp_path / str(first)
        saver = ModelCheckpoint(root, save_top_k=-1)
        trainer(root, [EMA(0.8, device=first), saver], max_epochs=2).fit(
            WithoutMomentum(norm=True), batches(), validation()
        )
        average = EMA(0.8, device=second)
        trainer(root, [average, ModelCheckpoint(root / "on")], max_epochs=4).fit(
            WithoutMomentum(norm=True), batches(), validation(), ckpt_path=saver.best_model_path
        )
        assert differing(average.merged_weights(), whole.merged_weights()) == []


def test_an_update_that_comes_early_waits_for_the_one_before_and_says_how_long(
    tmp_path: Path, as_if_on_a_device: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    update, threads = ExponentialMean.update, set()

    def slow(self: Any, *args: Any) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.12)
        update(self, *args)

    quick, late = EMA(0.8), EMA(0.8, device="cpu")
    run(quick, tmp_path / "quick", set())
    monkeypatch.setattr(ExponentialMean, "update", slow)
    with caplog.at_level("INFO"):
        run(late, tmp_path / "late", set())
    assert differing(late.merged_weights(), quick.merged_weights()) == []
    assert "training waited 1." in caplog.text
    assert threads == {"an average in host memory_0"}


class Fails(Callback):
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise KeyboardInterrupt if self.interrupts else RuntimeError("of the user")

    def __init__(self, interrupts: bool) -> None:
        self.interrupts = interrupts


def test_an_update_under_way_is_finished_when_the_fit_fails(tmp_path: Path, as_if_on_a_device: None) -> None:
    average = EMA(0.5, device="cpu")
    with pytest.raises(RuntimeError, match="of the user"):
        run(average, tmp_path, set(), (Fails(interrupts=False),))
    assert (average.updates, average.update_window) == (3, (1, 3))


def test_what_an_update_raises_ends_the_fit(
    tmp_path: Path, as_if_on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise MemoryError("of the host")

    monkeypatch.setattr(ExponentialMean, "update", fails)
    with pytest.raises(MemoryError, match="of the host"):
        run(EMA(0.5, device="cpu"), tmp_path, set())


@pytest.mark.parametrize("interrupts", [False, True])
def test_an_update_that_fails_as_the_fit_does_hides_nothing_and_leaves_nothing(
    interrupts: bool, tmp_path: Path, as_if_on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = ExponentialMean.update

    def fails(self: Any, state: Any, live: Any) -> None:
        if self.decay == 0.5 and state["updates"] == 2:
            raise MemoryError("of the host")
        update(self, state, live)

    monkeypatch.setattr(ExponentialMean, "update", fails)
    average, other = EMA(0.5, device="cpu"), EMA(0.9, name="other")
    fit = trainer(tmp_path, [average, other, Fails(interrupts)], max_epochs=3)
    with (
        pytest.raises((RuntimeError, SystemExit), match=r"of the user|1"),
        pytest.warns(UserWarning, match="its last update failed as well, MemoryError: of the host"),
    ):
        fit.fit(WithoutMomentum(norm=True), batches(), validation())
    assert (average.updates, other.updates) == (2, 3)
    assert average._background is None
    assert "teardown" not in vars(fit.strategy)  # nor is anything else wrapped


def test_accepted_weights_lie_between_the_two_places(tmp_path: Path, as_if_on_a_device: None) -> None:
    there, here = EMA(0.8), EMA(0.8, device="cpu")
    for average, root in ((there, "there"), (here, "here")):
        run(average, tmp_path / root, set(), (AcceptIfBetter("val/loss", shares=(0.25, 0.5)),))
    assert here.accepted == there.accepted
    assert differing(here.published_weights(), there.published_weights()) == []


def test_on_the_host_it_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, given = EMA(0.8), EMA(0.8, device="cpu")
    run(plain, tmp_path / "plain", set())
    run(given, tmp_path / "given", set())
    assert given._background is None
    assert differing(given.merged_weights(), plain.merged_weights()) == []


def test_torch_s_object_for_host_memory_is_as_good_as_the_word() -> None:
    assert EMA(device=torch.device("cpu")).device == EMA(device="cpu").device == "cpu"


# ---- what is refused


@pytest.mark.parametrize("device", ["cuda:9", "CPU", torch.device("cuda", 9), 3])
def test_other_devices_are_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=r"`device` must be None .* or 'cpu' \(host memory\), got "):
        EMA(device=device)


@pytest.mark.parametrize("make", [TWA, Lookaround])
def test_callbacks_that_keep_more_than_an_average_take_no_device(make: Any) -> None:
    with pytest.raises(TypeError, match="takes no `device`"):
        make(device="cpu")


def test_memory_that_is_short_is_said_before_training(
    tmp_path: Path, as_if_on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "free_bytes", lambda device: 100)
    with pytest.raises(MemoryError, match=r"`device='cpu'` needs \d{3} bytes of host memory.* 100 are available"):
        run(EMA(device="cpu"), tmp_path, set())
