"""Whether a module resumes bit for bit, and what differs first where it does not."""

from collections import UserDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge.callbacks import EMA, RandomState, replay
from lightning_merge.callbacks._replay_run._compare import first_difference
from lightning_merge.callbacks._replay_run._digests import digest, of_batch

pytest_plugins = ["pytester"]


class Noisy(tiny.Net):  # type: ignore[misc]
    """Dropout."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([nn.functional.dropout(batch[0]), *batch[1:]], batch_idx)


class Counting(tiny.Net):  # type: ignore[misc]
    """A number that no file holds, and that the loss depends on."""

    matters = 0.9

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx) * self.matters**self.seen


class Remembering(tiny.Net):  # type: ignore[misc]
    """A buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean += batch[0].mean()
        return super().training_step([batch[0] - self.mean, *batch[1:]], batch_idx)


class Watching(Counting):
    """A number that no file holds, and that nothing depends on."""

    matters = 1.0


def make(
    folder: Path, module: type = tiny.Net, callbacks: tuple[type, ...] = (RandomState,), shuffle: bool = False
) -> Any:
    torch.manual_seed(0)
    made = [EMA(decay=0.9) if kind is EMA else kind() for kind in callbacks]
    loader: Any = tiny.batches()
    if shuffle:
        data = next(iter(tiny.batches(1, size=24)))
        loader = DataLoader(TensorDataset(*data), batch_size=8, shuffle=True)
    return tiny.trainer(folder, made, max_epochs=3), module(), loader


SAME: dict[str, dict[str, Any]] = {
    "a plain module": {},
    "a number that nothing depends on": {"module": Watching},
    "an average": {"callbacks": (EMA, RandomState)},
    "dropout and a shuffled order": {"module": Noisy, "shuffle": True, "callbacks": (EMA, RandomState)},
}
DIFFERENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "dropout": ({"module": Noisy, "callbacks": ()}, "random state torch", "RandomState()"),
    "a number": ({"module": Counting}, "attribute seen", "on_save_checkpoint"),
    "a buffer": ({"module": Remembering}, "unsaved buffer mean", "persistent=False"),
    "a shuffled order": ({"shuffle": True, "callbacks": ()}, "batch 0", "RandomState()"),
}


@pytest.mark.parametrize("case", SAME)
def test_what_resumes_is_said_to(case: str, tmp_path: Path) -> None:
    found = replay(partial(make, tmp_path, **SAME[case]), tmp_path, epoch=1)
    assert found.difference is None, found
    assert found.compared > 4
    assert str(found).startswith("resumes bit for bit: ")


@pytest.mark.parametrize("case", DIFFERENT)
def test_the_first_difference_is_named_with_its_cure(case: str, tmp_path: Path) -> None:
    options, name, cure = DIFFERENT[case]
    found = replay(partial(make, tmp_path, **options), tmp_path, epoch=0)
    assert found.difference is not None
    assert found.difference.at.endswith("batch 0 of epoch 1")
    assert name in (*found.difference.names, *found.difference.unsaved)
    assert cure in str(found)


def test_a_point_in_an_epoch_takes_a_loader_that_remembers(tmp_path: Path) -> None:
    found = replay(partial(make, tmp_path, shuffle=True), tmp_path, epoch=1, batch=0)
    assert found.difference is not None
    assert "batch 0" in found.difference.names
    assert "StatefulDataLoader" in str(found.difference)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("make", None), ("folder", 3), ("epoch", -1), ("epoch", 1.5), ("epoch", None), ("batch", -1), ("batch", "x")],
)
def test_an_argument_is_refused_by_its_name(name: str, wrong: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        replay(**{"make": partial(make, tmp_path), "folder": tmp_path, name: wrong})


def test_what_was_never_reached_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never came to the end of epoch 7: it ended after batch"):
        replay(partial(make, tmp_path), tmp_path, epoch=7)
    with pytest.raises(TypeError, match="`make` must be a function that gives Trainer, module"):
        replay(lambda: None, tmp_path)  # type: ignore[arg-type, return-value]


AT_THE_END: dict[str, dict[str, Any]] = {
    "the last epoch": {"epoch": 2},
    "the last batch of the last epoch": {"epoch": 2, "batch": 3},
}


@pytest.mark.parametrize("case", AT_THE_END)
def test_a_file_after_which_nothing_is_trained_is_an_error(case: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="`epoch` must be one after which the run goes on, got 2: it ended after batch"
    ):
        replay(partial(make, tmp_path), tmp_path, **AT_THE_END[case])


AGAIN: dict[str, Any] = {
    "the same Trainer": (slice(0, 1), "Trainer"),
    "the same module": (slice(1, 2), "Net"),
    "the same loader": (slice(2, 3), "DataLoader"),
}


@pytest.mark.parametrize("case", AGAIN)
def test_objects_of_the_first_run_are_refused_in_the_second(case: str, tmp_path: Path) -> None:
    kept, kind = AGAIN[case]
    first = make(tmp_path)

    def again() -> Any:
        made = list(make(tmp_path))
        made[kept] = first[kept]
        return tuple(made)

    with pytest.raises(ValueError, match=rf"`make` must make everything anew, .* got the same {kind} twice"):
        replay(again, tmp_path)


def test_what_make_gives_is_checked_before_it_is_trained(tmp_path: Path) -> None:
    trainer, module, loader = make(tmp_path)
    with pytest.raises(TypeError, match=r"`make` must be a function that gives .* in this order, got Net first"):
        replay(lambda: (module, trainer), tmp_path)
    with pytest.raises(TypeError, match="at most two things for data, a loader to train and one to validate, got 5"):
        replay(lambda: (trainer, module, loader, loader, loader), tmp_path)


def test_a_loader_for_validation_is_trained_with(tmp_path: Path) -> None:
    found = replay(lambda: (*make(tmp_path, callbacks=(EMA, RandomState)), tiny.batches(1)), tmp_path, epoch=1)
    assert found.difference is None, found


class Lazy(tiny.Net):  # type: ignore[misc]
    """Has its parameters after the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(1))


def test_parameters_that_are_not_there_yet_are_no_difference(tmp_path: Path) -> None:
    found = replay(partial(make, tmp_path, module=Lazy), tmp_path)
    assert found.difference is None, found


def test_runs_of_other_lengths_are_different() -> None:
    whole = {f"before batch {n} of epoch 0": {"weight w": str(n)} for n in range(3)}
    assert first_difference(whole, dict(list(whole.items())[1:])) is None
    short = first_difference(whole, {"before batch 1 of epoch 0": {"weight w": "1"}})
    assert short is not None
    assert "2 points were left to train, and 1 were trained" in short.at
    assert "trained no batch" in str(first_difference(whole, {}))
    elsewhere = first_difference(whole, {"before batch 3 of epoch 0": {}})
    assert "went on before batch 3 of epoch 0, where the other never was" in str(elsewhere)
    other = first_difference(whole, {"before batch 0 of epoch 0": {"weight w": "0"}, "before batch 9 of epoch 0": {}})
    assert other is not None
    assert "before batch 1 of epoch 0: the resumed run is before batch 9" in other.at


@dataclass
class Pair:
    """A batch of a collate function."""

    inputs: torch.Tensor
    targets: torch.Tensor


def test_batches_of_all_kinds_are_taken_apart() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    names = {"inputs": one, "targets": two}
    for batch in (names, UserDict(names), Pair(one, two)):
        assert of_batch(batch) == {"batch inputs": digest(one), "batch targets": digest(two)}


def test_digests_are_of_bits() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([1.0])) != digest(torch.tensor([1.0], dtype=torch.float64))
    assert digest(torch.ones(2, dtype=torch.bfloat16)) == digest(torch.ones(2, dtype=torch.bfloat16))
    assert digest(np.ones(2)) == digest(torch.ones(2, dtype=torch.float64))
    assert digest(torch.eye(2).to_sparse()) == digest(torch.eye(2))
    assert digest(torch.zeros(0)) == digest(torch.zeros(0))


def test_the_fixture_of_the_plugin_passes_and_fails_a_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import lightning.pytorch as pl
        from lightning.pytorch.demos.boring_classes import BoringModel
        from lightning_merge.callbacks import RandomState

        class Model(BoringModel):
            seen = 0
            def training_step(self, *args):
                self.seen += self.counts
                return {"loss": super().training_step(*args)["loss"] * 0.5**self.seen}

        def make(counts):
            pl.seed_everything(0)
            Model.counts = counts
            quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
            few = dict(max_epochs=2, limit_train_batches=2, limit_val_batches=0)
            return pl.Trainer(callbacks=[RandomState()], **quiet, **few), Model()

        def test_one(assert_resumable):
            assert_resumable(lambda: make(0))

        def test_other(assert_resumable):
            assert_resumable(lambda: make(1))
        """
    )
    result = pytester.runpytest_inprocess("-q", "-p", "lightning_merge.pytest_plugin", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*first difference after batch 0 of epoch 1*", "*attribute seen*"])
