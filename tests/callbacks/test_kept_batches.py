"""Batches that are kept: copies whatever they are made of, and in files nothing but plain data."""

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, NetParts, batches, of, read, trainer, validation
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge._to_host import ToHost
from lightning_merge.callbacks import LAWA, SWA, TWA, Anchor, Lookaround
from lightning_merge.callbacks._lightning._batch_copies import BatchCopy, is_plain
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.selections import Selection

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    more: Any = None


class Graph:
    """A batch of a class of its own, whose attributes a step may write to."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.nested = {"same": [x]}

    def to(self, *args: Any, **kwargs: Any) -> "Graph":
        return self


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


FORMS: dict[str, tuple[Any, Any, int, bool]] = {
    # how it is made of a tensor, how that is found again, copies of the tensor in it, whether it is plain
    "tensor": (lambda x: x, lambda b: b, 1, True),
    "list": (lambda x: [x, 1, "a", None], lambda b: b[0], 1, True),
    "dict of tuples": (lambda x: {"a": (x, {"b": 2.0})}, lambda b: b["a"][0], 1, True),
    "named tuple": (lambda x: Pair(x, 1), lambda b: b.x, 1, False),
    "frozen dataclass": (Record, lambda b: b.x, 1, False),
    "object": (Graph, lambda b: b.x, 1, False),
    "object in a list": (lambda x: [Graph(x)], lambda b: b[0].nested["same"][0], 1, False),
    "slots": (Slots, lambda b: b.x, 1, False),
    "array beside it": (lambda x: Record(x, np.zeros(2, np.float32)), lambda b: b.x, 2, False),
    "packed sequence": (
        lambda x: nn.utils.rnn.PackedSequence(x, torch.ones(1, dtype=torch.int64)),
        lambda b: b.data,
        2,
        False,
    ),
    "objects as keys": (lambda x: {(1, 2): x}, lambda b: b[1, 2], 1, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_shares_nothing_with_its_batch_and_counts_all_of_it(form: str) -> None:
    make, find, tensors, plain = FORMS[form]
    batch = make(torch.arange(2.0))
    kept = BatchCopy.of(batch)
    find(batch).add_(10)
    used = kept.on(torch.device("cpu"))
    assert type(used) is type(batch)
    assert find(used).tolist() == [0.0, 1.0]
    find(used).add_(10)
    assert find(kept.on(torch.device("cpu"))).tolist() == [0.0, 1.0]
    assert kept.size == 8 * tensors
    assert is_plain(batch) is plain


def test_what_was_in_host_memory_beside_other_tensors_is_given_there_again() -> None:
    lengths = torch.ones(2)
    kept = BatchCopy([torch.ones(3), {"lengths": lengths}], 20, [False, True])
    recent = RecentBatches()
    recent._kept.append(kept)
    for each in (recent, RecentBatches.restored(recent.saved())):
        (copy,) = each.on(torch.device("meta"))
        data, rest = copy()
        assert (data.device.type, rest["lengths"].device.type) == ("meta", "cpu")


def test_tensors_that_overlap_in_memory_overlap_in_a_copy_and_others_take_no_more_than_their_own() -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    far, cut = torch.arange(1000.0), whole[:, 1:]
    kept = BatchCopy.of([whole, {"cut": cut}, whole[0].expand(2, 3), far[:1], far[-1:]])
    first, again = kept.on(torch.device("cpu")), kept.on(torch.device("cpu"))
    first[1]["cut"].zero_()
    assert torch.equal(first[0], torch.tensor([[0.0, 0, 0], [3, 0, 0], [6, 0, 0], [9, 0, 0]]))
    assert first[2].tolist() == [[0, 0, 0]] * 2
    assert torch.equal(again[0], torch.arange(12.0).reshape(4, 3))
    assert torch.equal(whole, torch.arange(12.0).reshape(4, 3))
    assert [each.untyped_storage().nbytes() for each in first[3:]] == [4, 4]


def test_a_copy_is_marked_for_gradients_and_carries_what_hangs_on_its_tensors() -> None:
    x: Any = torch.ones(2, requires_grad=True)
    x.lengths = [torch.ones(1)]
    copied = BatchCopy.of({"x": x}).on(torch.device("cpu"))["x"]
    assert copied.requires_grad
    assert copied.is_leaf
    assert torch.equal(copied.lengths[0], x.lengths[0])
    assert copied.lengths[0] is not x.lengths[0]


def test_copies_from_a_device_arrive_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on the device is recorded, in its order, with nothing of a device."""
    done: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            done.append("the side waits for the batch")

        def record_event(self) -> Any:
            done.append("recorded")
            return self

        def synchronize(self) -> None:
            done.append("arrived")

    class OnDevice:
        """A tensor on a device, as far as it is asked."""

        device = torch.device("cuda", 0)
        layout = torch.strided

        def __init__(self) -> None:
            self.numbers = torch.ones(2)

        def detach(self) -> Any:
            return self

        def clone(self) -> Any:
            done.append("cloned")
            return self

        def record_stream(self, stream: Any) -> None:
            done.append("the clone lives until then")

        def to(self, device: str, *, non_blocking: bool) -> Tensor:
            assert (device, non_blocking) == ("cpu", True)
            done.append("sent")
            return self.numbers

    stream = Stream()
    monkeypatch.setattr("lightning_merge._to_host.Tensor", OnDevice)
    monkeypatch.setattr("lightning_merge._to_host._stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    way = ToHost()
    copied: Any = way.copy(OnDevice())
    way.sent()
    assert copied.tolist() == [1, 1]
    way_there = ["cloned", "the side waits for the batch", "sent", "the clone lives until then", "recorded"]
    assert done == way_there
    recent = RecentBatches()
    recent._kept.append(BatchCopy(copied, 8, [], way))
    recent.batches, recent.batches  # noqa: B018 (reading waits, once)
    assert done == [*way_there, "arrived"]


def test_a_batch_that_cannot_be_copied_is_refused_with_its_class() -> None:
    with pytest.raises(ValueError, match=r"a batch \(dict\) cannot be copied: .*generator.*__deepcopy__"):
        RecentBatches().hold({"x": torch.ones(2), "rest": (number for number in range(3))})


def test_objects_count_towards_the_limit_of_bytes() -> None:
    recent = RecentBatches(bytes=1000)
    for size in (100, 100, 100):
        recent.hold(Graph(torch.zeros(size)))
        recent.keep()
    assert len(recent.batches) == 2


class FrozenNorm(Net):
    """Its BatchNorm is frozen, for good or in its first epochs."""

    def __init__(self, until: int = 99) -> None:
        super().__init__(norm=True)
        self.until = until
        self.net[1].eval()

    def on_train_epoch_start(self) -> None:
        self.net[1].train(self.current_epoch >= self.until)


NEEDED: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
    # an average, a module, and how many of 3 * 4 batches are kept
    "measured from the start": (lambda: LAWA(k=2), lambda: Net(norm=True), 12),
    "before the window: one is tried": (lambda: SWA(start_epoch=9), lambda: Net(norm=True), 1),
    "in the window: one is tried, then all": (lambda: SWA(start_epoch=3), lambda: Net(norm=True), 1 + 4),
    "no statistics": (lambda: SWA(start_epoch=0), lambda: Net(), 0),
    "frozen statistics": (lambda: SWA(start_epoch=0), FrozenNorm, 0),
    "frozen statistics of branches": (lambda: Lookaround(2, every_n_steps=2), FrozenNorm, 0),
    "buffers averaged": (lambda: SWA(0, selection=Selection(buffers="average")), lambda: Net(norm=True), 0),
}


@pytest.mark.parametrize("case", NEEDED)
def test_batches_are_copied_only_where_statistics_will_be_measured_on_them(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average, module, expected = NEEDED[case]
    copied: list[int] = []
    make = BatchCopy.of

    def of(batch: Any) -> BatchCopy:
        copied.append((copy := make(batch)).size)
        return copy

    monkeypatch.setattr(BatchCopy, "of", of)
    trainer(tmp_path, [average()], max_epochs=3).fit(module(), batches(4, size=4), validation())
    assert sum(copied) == expected * 4 * (4 + 1) * 4


def test_a_batch_that_several_branches_train_on_is_copied_once() -> None:
    recent, batch = RecentBatches(), torch.ones(3)
    for again in (False, True, False):
        recent.hold(batch, again=again)
        recent.keep()
    first, second, third = recent.batches
    assert first is second
    assert first is not third


def test_batches_are_kept_once_statistics_are_no_longer_frozen(tmp_path: Path) -> None:
    average = LAWA(k=1)
    module = FrozenNorm(until=2)
    module.net[1].train()  # found when the fit starts
    trainer(tmp_path, [average], max_epochs=3).fit(module, batches(4), validation())
    assert len(average._recent.batches) == 4


class GraphsParts(NetParts):
    """Normalises its batch, an object, in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch.x = batch.x * 0.5 - 2.5
        batch.nested["same"][0].mul_(3)
        return self(batch.x).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self(batch.x).square().mean(), batch_size=4)

    test_step = validation_step


Graphs = of(GraphsParts)


def graphs() -> DataLoader[Any]:
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 2 + 5
    return DataLoader(list(rows), batch_size=4, collate_fn=lambda some: Graph(torch.stack(some)))


AVERAGES = {
    "SWA": lambda: SWA(1),
    "LAWA": lambda: LAWA(every_n_steps=2),
    "TWA": lambda: TWA(every=1, stage=4),
    "Lookaround": lambda: Lookaround(1, every_n_steps=2),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_files_of_a_run_on_objects_are_plain_and_a_resumed_run_collects_anew(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    run = trainer(tmp_path, [AVERAGES[name](), saved], max_epochs=2)
    module = Graphs(norm=True)
    with caplog.at_level("INFO"):
        run.fit(module, graphs(), graphs())
    state = module.state_dict()
    seen = torch.cat([batch.x for batch in graphs()]) * 0.5 - 2.5
    expected = nn.functional.linear(seen, state["net.0.weight"], state["net.0.bias"]).mean(0)
    # Not all of its batches are in every window; normalised twice, they would be off by 2 and more.
    torch.testing.assert_close(state["net.1.running_mean"], expected, rtol=0, atol=0.5)
    assert caplog.text.count("stay out of checkpoints: a batch (Graph)") == 1
    last = saved.last_model_path
    read(last)
    Graphs.load_from_checkpoint(saved.best_model_path, norm=True)
    run.test(Graphs(norm=True), graphs(), ckpt_path="best", verbose=False)
    again = trainer(tmp_path / "again", [average := AVERAGES[name](), ModelCheckpoint(tmp_path / "b")], max_epochs=3)
    again.fit(Graphs(norm=True), graphs(), graphs(), ckpt_path=last)
    assert average.ready


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x, y: Graph(x), "got none in Graph"),
        (lambda x, y: [x, torch.ones(3)], r"got tensors of lengths \[3, 4\]"),
    ],
)
def test_fisher_information_of_samples_that_cannot_be_told_apart_is_refused_at_once(
    batch: Any, message: str, tmp_path: Path
) -> None:
    class Any_(of(NetParts)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch.x if isinstance(batch, Graph) else batch[0]).square().mean()

    loader = DataLoader([batch(*each) for each in batches(2)], batch_size=None)
    run = trainer(tmp_path, [Anchor(1.0, "fisher", at="last")], max_epochs=1)
    with pytest.raises(ValueError, match=f"`importance='fisher'` takes the loss of single samples.*{message}"):
        run.fit(Any_(), loader)
    assert run.global_step == 0


def test_fisher_information_under_manual_optimisation_is_refused(tmp_path: Path) -> None:
    class Manual(of(NetParts)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(
        ValueError, match=r"steps optimizers under manual optimization\. Choose `importance='identity'`"
    ):
        trainer(tmp_path, [Anchor(1.0, "fisher")], max_epochs=1).fit(Manual(), batches(), validation())
