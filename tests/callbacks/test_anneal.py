"""Anneal: the merge that stands for a decay, in a run: its values, its window, what is resumed and what is refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, Walk, batches, differing, read, steps, trainer, values
from torch import Tensor

from lightning_merge.callbacks import Anneal
from lightning_merge.rules import SlidingAnnealedMean
from lightning_merge.schedules._decay import Decay, decay
from lightning_merge.trajectory import Trajectory, by_decay, wsm_1_sqrt, wsm_cosine, wsm_exponential, wsm_linear

COEFFICIENTS = {"linear": wsm_linear, "cosine": wsm_cosine, "1-sqrt": wsm_1_sqrt, "exponential": wsm_exponential}
SHAPES = get_args(Decay)


def walked(average: Anneal, root: Path, n: int = 10, **settings: Any) -> Any:
    """A run whose weight is the number of its steps."""
    module = Walk()
    run = trainer(root, [average], **{"max_epochs": 1, **settings})
    run.fit(module, steps(n), steps(1))
    return module


class Stop(Callback):
    """Ends a run early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_ends_with_the_merge_of_the_window_at_its_end(shape: Decay, tmp_path: Path) -> None:
    for window, every in ((6, 2), ("60%", 2), (7, 2), (10, 1), (1, 1)):
        average = Anneal(shape, window, every)
        module = walked(average, tmp_path)
        count = average.updates
        seen = [10 - every * age for age in range(count)][::-1]
        assert count * every <= (6 if window == "60%" else window)
        assert module.w.item() == pytest.approx(sum(map(float.__mul__, COEFFICIENTS[shape](count), map(float, seen))))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_average_makes_of_the_checkpoints_of_the_run(shape: Decay, tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path / "files", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    last, sliding = Anneal(shape, 12, 2, validate="raw"), Anneal(shape, 12, 2, memory=6, name="s", validate="raw")
    trainer(tmp_path, [last, sliding, files], max_epochs=4).fit(Net(), batches(5), batches(1))
    run = Trajectory.of_run(tmp_path / "files")
    run = Trajectory(list(run)[-6:])
    expected = run.combine(COEFFICIENTS[shape](6))
    for average in (last, sliding):
        merged = average.merged_weights()
        assert merged is not None
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_merged_weights_are_validated_as_soon_as_there_are_some(tmp_path: Path) -> None:
    seen: dict[str, dict[int, float]] = {"fixed": {}, "sliding": {}}

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            for name, found in seen.items():
                found[trainer.global_step] = float(trainer.callback_metrics.get(f"{name}/val/w", torch.nan))

    averages = [
        Anneal("linear", 4, name="first"),
        Anneal("linear", 4, name="fixed"),
        Anneal("linear", 4, name="sliding", memory=4),
    ]
    run = trainer(tmp_path, [*averages, Watch()], max_epochs=1, val_check_interval=1)
    run.fit(Walk(), steps(8), steps(1))
    # Before there are some, it is the raw weights that are measured.
    assert list(seen["fixed"].values()) == [1.0, 2.0, 3.0, 4.0, 5.0, 5.5, 6.0, 6.5]
    assert list(seen["sliding"].values()) == [1.0, 2.0, 3.0, 2.5, 3.5, 4.5, 5.5, 6.5]


@pytest.mark.parametrize("memory", [None, 3, 10], ids=["fixed", "blocks", "snapshots"])
def test_resumed_in_its_window_it_ends_as_the_uninterrupted_run(memory: int | None, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def fitted(root: Path, *files: Any, **settings: Any) -> tuple[Anneal, Any]:
        average, module = Anneal("1-sqrt", "50%", 1, memory), Net(norm=True)
        run = trainer(root, [average, *files], max_epochs=5)
        run.fit(module, stateful(batches(4).dataset, batch_size=4), batches(1), **settings)
        return average, module

    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    whole, module = fitted(tmp_path, files)
    resumed, again = fitted(tmp_path / "again", ckpt_path=str(tmp_path / "step=14.ckpt"))
    assert resumed.updates == whole.updates == (20 if memory else 10)
    assert differing(module, again) == []
    assert differing(whole.raw_weights(), resumed.raw_weights()) == []


@pytest.mark.filterwarnings("ignore:.*goes on from a file that was written with")
def test_a_window_that_began_goes_on_under_its_own_decay_only(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    trainer(tmp_path, [Anneal("linear", 8), files], max_epochs=2).fit(Net(), batches(5))
    again = trainer(tmp_path, [Anneal("cosine", 8)], max_epochs=2)
    with pytest.raises(ValueError, match="began with `shape` 'linear' and 8 weights, and now `shape` is"):
        again.fit(Net(), batches(5), ckpt_path=tmp_path / "step=6.ckpt")


@pytest.mark.parametrize("at", [3, 6, 9])
@pytest.mark.parametrize("shape", ["linear", "exponential"])
@pytest.mark.parametrize("other", [("1-sqrt", 8, 8), (None, 8, 6), (None, 4, 4), (None, 12, 8)], ids=str)
@pytest.mark.filterwarnings("ignore:.*goes on from a file that was written with")
def test_a_sliding_window_goes_on_under_its_own_decay_only(
    shape: Decay, at: int, other: tuple[Any, int, int], tmp_path: Path
) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    trainer(tmp_path, [Anneal(shape, 8, memory=8), files], max_epochs=4).fit(Net(), batches(5))
    again = trainer(tmp_path, [Anneal(other[0] or shape, other[1], memory=other[2])], max_epochs=4)
    with pytest.raises(
        ValueError, match=rf"began with `shape` '{shape}' and 8 weights in 8 copies, and now `shape` is"
    ):
        again.fit(Net(), batches(5), ckpt_path=tmp_path / f"step={at}.ckpt")


def test_a_sliding_share_of_a_run_that_became_longer_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10)
    trainer(tmp_path, [Anneal("linear", "40%", memory=4), files], max_epochs=1).fit(Walk(), steps(10), steps(1))
    again, module = Anneal("linear", "40%", memory=4), Walk()
    run = trainer(tmp_path, [again], max_epochs=2)
    run.fit(module, steps(10), steps(1), ckpt_path=tmp_path / "step=10.ckpt")
    assert "the run is another length than it was, and a window begins anew" in caplog.text + "".join(
        capsys.readouterr()
    )
    assert module.w.item() == pytest.approx(16.5, rel=0.01)  # of 13 to 20


def test_a_file_of_the_run_holds_the_merged_weights(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", monitor="val/w", save_top_k=-1)
    module = Walk()
    run = trainer(tmp_path, [Anneal("linear", 4), files], max_epochs=1, val_check_interval=2)
    run.fit(module, steps(8), steps(1))
    found = {Path(path).stem: read(path)["state_dict"]["w"].item() for path in files.best_k_models}
    assert found == {"step=2": 2.0, "step=4": 4.0, "step=6": 5.5, "step=8": 6.5}


def test_a_bfloat16_run_is_averaged_in_float32(tmp_path: Path) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.path: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.path.append(values(pl_module))

    average, watch = Anneal("cosine", 6, validate="raw"), Watch()
    trainer(tmp_path, [average, watch], max_epochs=2, precision="bf16-true").fit(Net(), batches(4), batches(1))
    merged = average.merged_weights()
    assert merged is not None
    for name, tensor in merged.items():
        assert tensor.dtype is torch.float32
        expected = sum(c * w[name].double() for c, w in zip(wsm_cosine(6), watch.path[-6:], strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def test_a_run_that_ends_early_publishes_what_there_is_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    average = Anneal("1-sqrt", 8)
    module = Walk()
    trainer(tmp_path, [average, Stop(6)], max_epochs=1).fit(module, steps(10), steps(1))
    assert module.w.item() == pytest.approx(sum(map(float.__mul__, wsm_1_sqrt(4), (3.0, 4.0, 5.0, 6.0))))
    said = caplog.text + "".join(capsys.readouterr())
    assert "the window has 4 of its 8 weights" in said
    assert "for a decay of 4 steps" in said


def test_a_run_that_goes_on_longer_than_planned_begins_its_window_anew(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    trainer(tmp_path, [Anneal("linear", 4), files], max_steps=10).fit(Walk(), steps(30), steps(1))
    average, module = Anneal("linear", 4), Walk()
    trainer(tmp_path / "again", [average], max_steps=20).fit(
        module, steps(30), steps(1), ckpt_path=str(tmp_path / "step=8.ckpt")
    )
    assert (module.w.item(), average.updates) == (18.5, 2 + 4)  # two that the first window took, and 17 to 20


def test_a_second_fit_has_a_window_of_its_own(tmp_path: Path) -> None:
    average, module = Anneal("linear", 4), Walk()
    trainer(tmp_path, [average], max_epochs=1).fit(module, steps(10), steps(1))
    assert module.w.item() == 8.5
    trainer(tmp_path, [average], max_epochs=1).fit(module, steps(10), steps(1))
    assert (average.raw_weights()["w"].item(), module.w.item()) == (20.0, 18.5)


def test_a_window_for_what_is_left_of_a_run_that_had_none(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    trainer(tmp_path, [files], max_epochs=1).fit(Walk(), steps(10), steps(1))

    def resumed(average: Anneal) -> float:
        module, path = Walk(), str(tmp_path / "step=6.ckpt")
        trainer(tmp_path / "again", [average], max_epochs=1).fit(module, steps(10), steps(1), ckpt_path=path)
        return float(module.w)

    for memory in (None, 2, 4):
        assert resumed(Anneal("linear", 2, memory=memory)) == 9.5
        assert resumed(Anneal("linear", 4, memory=memory and 4)) == 8.5
        message = "`window` must be at most what is left of the run, 10 steps of which 6 are done, got 5 steps"
        with pytest.raises(ValueError, match=message):
            resumed(Anneal("linear", 5, memory=memory))


def test_weights_with_a_nan_are_left_out_of_the_window(tmp_path: Path) -> None:
    class Spoilt(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 7:
                self.kept = pl_module.w.item()
                pl_module.w.data.fill_(torch.nan)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 8:
                pl_module.w.data.fill_(self.kept + 1)

    for memory in (None, 4):
        average, module = Anneal("linear", 4, memory=memory), Walk()
        with pytest.warns(UserWarning, match="holds a NaN"):
            trainer(tmp_path, [Spoilt(), average], max_epochs=1).fit(module, steps(10), steps(1))
        assert average.skipped_nonfinite == 1
        assert module.w.item() == pytest.approx((7 + 9 + 10) / 3 if memory is None else (6 + 7 + 9 + 10) / 4)


def test_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`shape` must be 'linear', 'cosine', '1-sqrt' or 'exponential', got 'step'"):
        Anneal("step")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`window` must be at least 5 steps, from one update to the next"):
        Anneal(window=4, every_n_steps=5)
    with pytest.raises(ValueError, match="`memory` must be at least 2, got 1"):
        Anneal(memory=1)
    with pytest.raises(ValueError, match=r"`window` counts optimizer steps if it is a number.*write '20%'"):
        Anneal(window=0.2)
    with pytest.raises(ValueError, match="`window` must be at most the run's 10 steps, got 11"):
        walked(Anneal(window=11), tmp_path)
    with pytest.raises(ValueError, match="`window` must be at most what is left of the run, 10 steps of which 0"):
        walked(Anneal(window=11, memory=3), tmp_path)
    with pytest.raises(ValueError, match=r"`window` ends with the run, whose length is not known: .*\(memory=5\)"):
        walked(Anneal(window=4), tmp_path, max_epochs=-1, max_time="00:00:00:30")
    with pytest.raises(ValueError, match="needs a run of known length"):
        walked(Anneal(window="20%", memory=5), tmp_path, max_epochs=-1, max_time="00:00:00:30")
    average, module = Anneal(window=4, memory=5), Walk()
    trainer(tmp_path, [average, Stop(9)], max_epochs=-1).fit(module, steps(20), steps(1))
    assert module.w.item() == 7.5
    assert by_decay([0.5]) == (0.5, 0.5)


# ---- tokens


def of_tokens(shape: Decay, sizes: list[int], window: int) -> list[float]:
    """The merge weights of a window over the last tokens, by the formula: newest last, in full precision."""
    found, age = [], 0
    for size in reversed(sizes):
        low, high = max(0, window - age - size), max(0, window - age)
        found.append(decay(shape, low / window) - decay(shape, high / window))
        age += size
    return found[::-1]


SIZES = [3, 1, 7, 2, 2, 9, 1, 4, 0, 5, 6, 2]


def sized() -> Any:
    """Batches of as many samples, for ``Walk``, and for a loader that resumes."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    return stateful([torch.zeros(size) for size in SIZES], batch_size=None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_a_window_of_tokens_is_the_decay_over_them(shape: Decay, every: int, accumulate: int, tmp_path: Path) -> None:
    average = Anneal(shape, 20, every, memory=20, tokens=len, validate="raw")
    run = trainer(tmp_path, [average], max_epochs=1, accumulate_grad_batches=accumulate)
    run.fit(Walk(), sized(), steps(1))
    n = every * accumulate
    sizes = [max(1, sum(SIZES[i : i + n])) for i in range(0, len(SIZES), n)]
    merged = average.merged_weights()
    assert merged is not None
    at = [float(every * (i + 1)) for i in range(len(sizes))]
    expected = sum(map(float.__mul__, of_tokens(shape, sizes, 20), at))
    assert merged["w"].item() == pytest.approx(expected, rel=1e-5)


def test_few_copies_hold_a_window_of_tokens_of_any_sizes(tmp_path: Path) -> None:
    rule = SlidingAnnealedMean("exponential", 1000, memory=5)
    state, numbers, sizes = rule.init({"w": torch.tensor(0.0)}), torch.Generator().manual_seed(0), []
    for step in range(400):
        sizes.append(int(torch.randint(0, 60, (), generator=numbers)))
        rule.advance(state, sizes[-1])
        rule.update(state, {"w": torch.tensor(float(step), dtype=torch.float64)})
        assert len(state["blocks"]) <= 5
        if (found := rule.result(state)) is not None:
            exact = of_tokens("exponential", [max(1, size) for size in sizes], 1000)
            assert found["w"].item() == pytest.approx(sum(c * i for i, c in enumerate(exact)), abs=0.2 * 40)
    assert rule.shares(state) is None


@pytest.mark.parametrize("at", [3, 4, 7, 10])
@pytest.mark.parametrize("memory", [3, 20])
def test_a_window_of_tokens_resumes_at_any_step_bit_for_bit(at: int, memory: int, tmp_path: Path) -> None:
    def fitted(root: Path, *files: Any, **settings: Any) -> Any:
        average = Anneal("exponential", 20, 3, memory=memory, tokens=len)
        trainer(root, [average, *files], max_epochs=2).fit(Walk(lr=0.3), sized(), **settings)
        return average

    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    whole = fitted(tmp_path, files)
    again = fitted(tmp_path / "again", ckpt_path=tmp_path / f"step={at}.ckpt")
    assert whole.updates == again.updates == 8
    assert [block["count"] for block in whole._state["blocks"]] == [b["count"] for b in again._state["blocks"]]
    assert differing(whole.merged_weights(), again.merged_weights()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": None}, "`memory` must be given with `tokens`: a window that ends with the run begins at a step"),
        ({"window": "20%"}, "`window` must be a number of tokens where `tokens` counts them"),
        ({"window": "2 epochs"}, "`window` must be a number of tokens where `tokens` counts them"),
        ({"tokens": 3}, "`tokens` must be a function, got 3"),
    ],
    ids=str,
)
def test_what_tokens_do_not_go_with_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Anneal(**{"window": 100, "memory": 5, "tokens": len} | settings)


@pytest.mark.parametrize("given", [-1, 2.5, "many", None], ids=str)
def test_what_tokens_gives_is_checked(given: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path, [Anneal(window=100, memory=5, tokens=lambda batch: given)], max_epochs=1)
    with pytest.raises((TypeError, ValueError), match="what `tokens` of Anneal 'anneal' gives` must be"):
        run.fit(Walk(), steps(3))


def test_a_window_that_was_never_full_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    trainer(tmp_path, [Anneal(window=100, memory=5, tokens=len)], max_epochs=1).fit(Walk(), sized())
    assert "the window has 43 of its 100, so nothing was merged" in caplog.text + "".join(capsys.readouterr())
