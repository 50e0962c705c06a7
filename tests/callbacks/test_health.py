"""What loggers get of each average: how often it took weights in, how far it is from them, and what it is made of."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from device_counts import fake_cuda
from golden.runs import METHODS, averages, loaders, module
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.logger import DummyLogger
from test_averages_elsewhere import AVERAGES
from test_host_reads import Reads
from tiny import Net, Walk, batches, differing, steps, trainer, validation, values
from torch import Tensor

from lightning_merge import callbacks as merging
from lightning_merge.callbacks import EMA, LAWA, SWA, EvaluationWeights
from lightning_merge.diagnostics import distance
from lightning_merge.weights import _distances, squared_distance

ALL = {"updates", "distance", "start_share", "decay"}


class Rows(DummyLogger):
    """Keeps what it is given, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, Any]] = {}
        self.twice: list[tuple[int, str]] = []  # keys that are logged again at a step

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        row = self.rows.setdefault(step, {})
        self.twice += [(step, key) for key in metrics if key in row and key != "epoch"]
        row.update(metrics)

    def of(self, *names: str) -> dict[int, dict[str, Any]]:
        """What is of averages of these names, at the steps that have any."""
        found = {
            step: {key: value for key, value in row.items() if key.split("/")[0] in names and "/val/" not in key}
            for step, row in self.rows.items()
        }
        return {step: row for step, row in found.items() if row}


class Compares(pl.Callback):
    """Measures by hand, after every batch, what is logged of the averages."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        found = self.found[len(self.found)] = {}
        for average in averages(trainer.callbacks):
            merged = average.merged_weights()
            names = [name for name in average.tensors if name not in average.buffer_names]
            if merged is not None and merged.keys() >= set(names):
                raw = {name: average.tensors[name].detach() for name in names}
                found[f"{average.name}/distance"] = distance({name: merged[name] for name in names}, raw)
            found[f"{average.name}/updates"] = average.updates


def logged(root: Path, callbacks: list[Any], **settings: Any) -> Rows:
    rows = Rows()
    trainer(root, callbacks, **{"logger": rows, "log_every_n_steps": 2, "max_epochs": 3, **settings}).fit(
        Net(norm=True), batches(), validation()
    )
    return rows


# ---- the numbers


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    rows = Rows()
    fit = trainer(tmp_path, [EMA(0.5)], max_epochs=1, logger=rows, log_every_n_steps=2)
    fit.fit(Walk(), steps(4))  # the weight is 1, 2, 3, 4 after the steps, and the average 0.5, 1.25, 2.125, 3.0625
    assert rows.of("ema") == {
        1: {"ema/updates": 2, "ema/distance": 0.75, "ema/start_share": 0.25, "ema/decay": 0.5},
        3: {"ema/updates": 4, "ema/distance": 0.9375, "ema/start_share": 0.0625, "ema/decay": 0.5},
    }


WITHOUT_DECAY = ALL - {"decay"}
KEYS = {
    "ema": ALL,
    "bema": ALL,
    "post-hoc": ALL,
    "compensated": ALL,
    "copied buffers": ALL,
    "from later on": ALL,
}
"""Of those of ``AVERAGES``; all others have no decay."""


@pytest.mark.parametrize("name", AVERAGES)
def test_every_average_logs_what_it_is(name: str, tmp_path: Path) -> None:
    average, compares = AVERAGES[name](), Compares()
    rows = logged(tmp_path, [average, compares], max_epochs=4).of(average.name)
    assert rows
    for step, row in rows.items():
        assert step % 2 == 1
        keys = {key.partition("/")[2] for key in row}
        assert keys <= KEYS.get(name, WITHOUT_DECAY)
        assert row[f"{average.name}/updates"] == compares.found[step][f"{average.name}/updates"]
        expected = compares.found[step].get(f"{average.name}/distance")
        found = row.get(f"{average.name}/distance")
        assert found == (expected if expected is None else pytest.approx(expected, rel=1e-5, abs=1e-7))
    assert {key.partition("/")[2] for key in row} == KEYS.get(name, WITHOUT_DECAY)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_logs_its_updates(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows, callbacks = Rows(), METHODS[method]()
    trainer(tmp_path, callbacks, max_epochs=3, logger=rows, log_every_n_steps=2).fit(module(method), *loaders())
    merged = {average.name for average in averages(callbacks) if average.updates}
    assert {key.partition("/")[0] for row in rows.of(*merged).values() for key in row} == merged
    last = [row for _, row in sorted(rows.rows.items()) if any(key.endswith("/updates") for key in row)]
    for average in averages(callbacks):
        if average.updates:
            assert 0 < last[-1][f"{average.name}/updates"] <= average.updates


def test_averages_in_host_memory_log_counts_and_wait_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_merge._averaging import _elsewhere
    from lightning_merge._averaging._tensors import Tensors

    monkeypatch.setattr(Tensors, "is_elsewhere", property(lambda self: self._on_host))
    waits: list[str] = []
    finish = _elsewhere.Background.finish

    def counted(self: Any) -> None:
        waits.append("")
        finish(self)

    monkeypatch.setattr(_elsewhere.Background, "finish", counted)

    def run(**settings: Any) -> tuple[Rows, int]:
        waits.clear()
        rows = logged(tmp_path, [EMA(0.5, device="cpu", validate="raw", **settings)], max_epochs=1)
        return rows, len(waits)

    (rows, with_logs), (_, without) = run(), run(log_health=False)
    # One update behind: that of the same step is under way.
    assert rows.of("ema") == {
        1: {"ema/updates": 1, "ema/start_share": 0.5, "ema/decay": 0.5},
        3: {"ema/updates": 3, "ema/start_share": 0.125, "ema/decay": 0.5},
    }
    assert with_logs == without


def test_the_weights_that_an_optimizer_gives_for_evaluation_are_not_asked_for(tmp_path: Path) -> None:
    average = EvaluationWeights(lambda module: {})
    rows = logged(tmp_path, [average], max_epochs=1)
    assert rows.of("evaluation") == {1: {"evaluation/updates": 2}, 3: {"evaluation/updates": 4}}


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [
        (torch.float32, [(3, 4), (), (0,), (7,)]),
        (torch.float64, [(3,)]),
        (torch.complex64, [(2, 3), (5,)]),
        (torch.float32, [(1 << 20,), (3 << 19, 2), (5,)]),
        (torch.float32, []),
    ],
)
def test_a_squared_distance_is_what_it_says(
    dtype: torch.dtype, shapes: list[tuple[int, ...]], on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_distances, "_is_host", lambda tensor: on_host)
    monkeypatch.setattr(_distances, "_ON_DEVICE", 1 << 18)
    left, right = ({f"{i}": torch.randn(shape, dtype=dtype) for i, shape in enumerate(shapes)} for _ in range(2))
    expected = sum(float((left[name] - right[name]).abs().double().square().sum()) for name in left)
    assert float(squared_distance(left, right)) == pytest.approx(expected, rel=1e-4)


def test_a_squared_distance_on_a_device_takes_few_launches_and_waits_for_nothing() -> None:
    with fake_cuda() as counts:
        left, right = ({f"{i}": torch.empty(64, 64, device="cuda") for i in range(160)} for _ in range(2))
        counts.restart()
        squared_distance(left, right)
        assert counts.reads == []
        assert len(counts.launches) <= 10


def test_a_squared_distance_from_weights_in_half_precision_is_taken_in_float32() -> None:
    left, right = {"w": torch.full((8,), 1.001)}, {"w": torch.ones(8, dtype=torch.bfloat16)}
    assert float(squared_distance(left, right)) == pytest.approx(8e-6, rel=1e-3)


# ---- when, and where to


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"accumulate_grad_batches": 2}, [1, 3, 5]),
        ({"log_every_n_steps": 5}, [4, 9]),
        ({"max_epochs": 1, "log_every_n_steps": 50}, []),
        ({"log_every_n_steps": 0}, []),
        ({"logger": False}, []),
        ({"fast_dev_run": 4}, []),
    ],
    ids=str,
)
def test_they_come_when_the_module_logs(settings: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    rows = logged(tmp_path, [EMA(0.5)], **settings)
    assert list(rows.of("ema")) == expected
    assert [step for step, row in rows.rows.items() if "train/loss" in row] == expected
    assert rows.twice == []


def test_without_a_logger_nothing_takes_the_place_of_lightnings_own(tmp_path: Path) -> None:
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            seen.append("update_train_step_metrics" in vars(trainer._logger_connector))

    seen: list[bool] = []
    for logger, log_health, quick in ((False, True, 0), (Rows(), False, 0), (Rows(), True, 1), (Rows(), True, 0)):
        callbacks = [EMA(0.5, log_health=log_health), Looks()]
        trainer(tmp_path, callbacks, max_steps=1, logger=logger, fast_dev_run=quick).fit(Net(), batches())
    assert seen == [False, False, False, True]


def test_an_average_that_has_not_begun_logs_nothing(tmp_path: Path) -> None:
    rows = logged(tmp_path, [EMA(0.5, start_step=100), SWA(start_epoch=1)])
    assert list(rows.of("ema")) == []
    assert list(rows.of("swa")) == [3, 5, 7, 9, 11]  # it takes weights in at the end of an epoch


def test_every_logger_and_every_average_that_is_asked(tmp_path: Path) -> None:
    one, other = Rows(), CSVLogger(tmp_path, "", "")
    callbacks = [EMA(0.5), EMA(0.9, name="slow"), LAWA(k=2, every_n_steps=1, log_health=False)]
    logged(tmp_path, callbacks, logger=[one, other], max_epochs=1)
    expected = {f"{name}/{key}" for name in ("ema", "slow") for key in ALL}
    assert set(one.of("ema", "slow", "lawa")[3]) == expected
    header = set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {key for key in header if re.match("(ema|slow|lawa)/(?!val)", key)} == expected


def test_a_key_of_the_module_stays_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("ema/decay", 7.0)
            return super().training_step(batch, batch_idx)

    rows = Rows()
    fit = trainer(tmp_path, [EMA(0.5)], max_epochs=2, logger=rows, log_every_n_steps=2)
    with caplog.at_level("INFO"):
        fit.fit(Logs(), batches(), validation())
    assert [(row["ema/decay"], row["ema/start_share"]) for row in rows.of("ema").values()] == [
        (7.0, 0.5**n) for n in (2, 4, 6, 8)
    ]
    assert caplog.text.count("`ema/decay` is logged by the module") == 1


def test_a_metric_of_another_average_by_that_name_stays_its_own(tmp_path: Path) -> None:
    class Measures(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("updates", 3.0)

    rows = Rows()
    fit = trainer(tmp_path, [SWA(start_epoch=0), EMA(0.5)], max_epochs=3, logger=rows, log_every_n_steps=4)
    fit.fit(Measures(), batches(), validation())
    # At the end of the first epoch ours comes before it is known that the module has one.
    assert rows.twice == [(3, "ema/updates")]
    assert {row["ema/updates"] for row in rows.rows.values() if "ema/updates" in row} == {3.0}


def test_a_second_fit_and_a_resumed_one_go_on(tmp_path: Path) -> None:
    def fitted(epochs: int, average: EMA, path: Path | None = None, fit: Any = None) -> dict[int, dict[str, Any]]:
        rows = Rows()
        saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=1, every_n_epochs=1)
        fit = trainer(tmp_path, [average, saver], max_epochs=epochs, logger=rows, log_every_n_steps=2)
        fit.fit(Net(), batches(), ckpt_path=path)
        return rows.of("ema")

    whole = fitted(4, EMA(0.5))
    (tmp_path / "last.ckpt").unlink()
    first = fitted(2, EMA(0.5))
    resumed = fitted(4, EMA(0.5), tmp_path / "last.ckpt")
    assert {**first, **resumed} == whole
    average = EMA(0.5)
    fit = trainer(tmp_path, [average], max_epochs=2, logger=(rows := Rows()), log_every_n_steps=2)
    module = Net()
    fit.fit(module, batches())
    fit.fit_loop.max_epochs = 4
    fit.fit(module, batches())
    assert rows.of("ema").keys() == whole.keys()
    assert rows.of("ema")[15]["ema/updates"] == 16


# ---- what they leave alone


@pytest.mark.parametrize("name", ["ema", "lawa", "swad", "bema", "best", "sliding anneal"])
def test_training_metrics_and_files_are_those_without(name: str, tmp_path: Path) -> None:
    def run(**settings: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        average, rows, network = AVERAGES[name](**settings), Rows(), Net(norm=True)
        fit = trainer(tmp_path, [average], max_epochs=3, logger=rows, log_every_n_steps=1)
        fit.fit(network, batches(shuffle=True), validation())
        metrics = {key: float(value) for key, value in fit.callback_metrics.items()}
        others = {
            step: {key: value for key, value in row.items() if key.partition("/")[2] not in ALL}
            for step, row in rows.rows.items()
        }
        state = {key for key in average._state if key != "cache"}
        return values(network), average.raw_weights(), metrics, others, state, torch.rand(1).item()

    with_logs, without = run(), run(log_health=False)
    assert differing(with_logs[0], without[0]) == []
    assert differing(with_logs[1], without[1]) == []
    assert with_logs[2:] == without[2:]


def test_what_was_made_to_be_compared_is_not_kept(tmp_path: Path) -> None:
    kept: list[bool] = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            if average._state is not None:
                kept.append("cache" in average._state)

    average = LAWA(k=2, every_n_steps=1, validate="raw")
    rows = logged(tmp_path, [average, Looks()], log_every_n_steps=1, max_epochs=1)
    assert "lawa/distance" in rows.of("lawa")[3]
    assert kept == [False] * 4


class Between(pl.Callback):
    """Counts reads in whole steps, and by whether they are logged."""

    def __init__(self, reads: Reads, every: int) -> None:
        self.reads, self.every = reads, every
        self.found: dict[bool, list[int]] = {True: [], False: []}

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self.reads.counting:
            self.found[step % self.every == 0].append(sum(self.reads.found.values()))
        self.reads.found.clear()
        self.reads.counting = step > 0


@pytest.mark.parametrize("method", ["ema", "lawa", "swa", "posthoc-ema", "two-averages", "lookaround", "branching"])
def test_a_step_that_is_not_logged_reads_nothing_more(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def counts(logger: Logger | bool) -> dict[bool, list[int]]:
        with Reads() as reads:
            between = Between(reads, 3)
            fit = trainer(tmp_path, [between, *METHODS[method]()], max_epochs=1, logger=logger, log_every_n_steps=3)
            fit.fit(module(method), loaders()[0])
        return between.found

    with_logs, without = counts(Rows()), counts(False)
    assert with_logs[False] == without[False]
    assert all(one <= other + 1 for one, other in zip(with_logs[True], without[True], strict=True))


def test_it_is_an_option_of_every_average() -> None:
    classes: list[Callable[..., Any]] = [getattr(merging, name) for name in ("EMA", "PAPA", "TWA", "EvaluationWeights")]
    assert [each(log_health=False).log_health for each in classes] == [False] * 4
    with pytest.raises(TypeError, match="log_health"):
        EMA(log_health="no")  # type: ignore[arg-type]
