"""Where a window keeps its snapshots, and what becomes of them."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from live_memory import LiveMemory
from torch import Tensor

import lightning_merge.rules._snapshots as snapshots
from lightning_merge.rules import WindowMean
from lightning_merge.weights import State

CPU = {"w": torch.device("cpu")}
STORES = ["device", "cpu", "disk"]
DISK = {"store": "disk", "directory": "snapshots"}

every_store = pytest.mark.parametrize("store", STORES)


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def window(k: int, store: str) -> WindowMean:
    return WindowMean(k, store, "snapshots" if store == "disk" else None)


def weights(value: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"w": torch.full((3,), float(value), dtype=dtype)}


def push(rule: WindowMean, state: State, *values: float) -> State:
    for value in values:
        rule.update(state, weights(value))
    return state


def mean(rule: WindowMean, state: State) -> list[float]:
    return rule.result(state)["w"].tolist()


def files() -> set[str]:
    return set(os.listdir("snapshots"))


@every_store
def test_published_values(store):
    rule = window(3, store)
    state, found = rule.init(weights(0)), []
    for step in range(1, 13):
        if step % 2 == 0:
            push(rule, state, step**2)
            found.append(rule.result(state))
    assert found[:2] == [None, None]
    expected = {6: 56 / 3, 8: 116 / 3, 10: 200 / 3, 12: 308 / 3}
    assert [t["w"].tolist() for t in found[2:]] == [pytest.approx([v] * 3, rel=0, abs=1e-12) for v in expected.values()]


@every_store
def test_snapshots_are_copies(store):
    rule, live = window(2, store), weights(1)
    state = rule.init(live)
    for value in (1.0, 2.0):
        live["w"].fill_(value)
        rule.update(state, live)
    live["w"].fill_(7)
    assert mean(rule, state) == [1.5] * 3


@every_store
def test_result_stays_the_same_tensors_until_the_window_moves(store):
    rule = window(2, store)
    state = push(rule, rule.init(weights(0)), 1, 2)
    first = rule.stored(state)
    assert rule.stored(state) is first
    push(rule, state, 4)
    assert mean(rule, state) == [3.0] * 3


@every_store
def test_stores_differ_in_no_bit(store):
    generator = torch.Generator().manual_seed(0)
    stream = [{"w": torch.randn(7, generator=generator).to(torch.bfloat16)} for _ in range(9)]
    results = []
    for rule in (window(6, store), window(6, "device")):
        state = rule.init(stream[0])
        for each in stream:
            rule.update(state, each)
        results.append(rule.result(state)["w"])
    assert results[0].dtype == torch.float32
    assert torch.equal(*results)


def test_mean_does_not_drift():
    generator = torch.Generator().manual_seed(0)
    rule, stream = WindowMean(6), []
    state = rule.init({"w": torch.zeros(100)})
    for _ in range(2000):
        stream.append(1 + 0.01 * torch.randn(100, generator=generator))
        rule.update(state, {"w": stream[-1]})
    truth = torch.stack(stream[-6:]).double().mean(0)
    # Two units in the last place; a running sum is off by 5e-6.
    assert (rule.result(state)["w"] - truth).abs().max() < 2.5e-7


@pytest.mark.parametrize(("store", "copies"), [("device", 6), ("cpu", 6), ("disk", 0)])
def test_it_holds_k_copies_and_their_mean_once_asked_for(store, copies):
    live = {"w": torch.zeros(1000, dtype=torch.bfloat16)}
    rule = window(6, store)
    with LiveMemory() as memory:
        state = rule.init(live)
        for _ in range(20):
            rule.update(state, live)
        assert memory.now == copies * 4000
        assert memory.peak <= max(copies, 1) * 4000
        rule.result(state)
        assert memory.now == (copies + 1) * 4000


@pytest.mark.parametrize(("store", "cure"), [("device", "'cpu'.*'disk'"), ("cpu", "'disk'"), ("disk", "larger disk")])
def test_snapshots_larger_than_memory_are_refused_before_anything_is_allocated(store, cure):
    huge = {"w": torch.zeros(1, dtype=torch.bfloat16).expand(10**14)}
    with LiveMemory() as memory, pytest.raises(MemoryError, match=rf"6 snapshots.*2,800,000,000,000,000 bytes.*{cure}"):
        window(6, store).init(huge)
    assert memory.peak == 0


@pytest.mark.parametrize("store", ["device", "cpu"])
def test_snapshots_that_just_fit_are_taken(store, monkeypatch):
    free = 7 * 3 * 8
    monkeypatch.setattr(snapshots, "free_bytes", lambda device: free)
    window(6, store).init(weights(0))
    free -= 1
    with pytest.raises(MemoryError, match=r"needs 168 bytes .*, and 167 are available"):
        window(6, store).init(weights(0))


def test_of_a_sharded_tensor_the_part_that_is_here_counts():
    class Sharded:
        def to_local(self) -> Tensor:
            return torch.zeros(5)

    ((_, needed, _),) = snapshots.OnHost().room({"w": Sharded()}, copies=7)
    assert needed == 7 * 5 * 4


def test_memory_that_cannot_be_known_is_not_refused():
    assert snapshots.free_bytes(torch.device("meta")) is None
    WindowMean().init({"w": torch.empty(10**14, device="meta")})


def test_free_host_memory_is_known_without_proc(monkeypatch):
    known = snapshots.free_bytes(torch.device("cpu"))
    monkeypatch.setattr(Path, "read_text", lambda self: "")
    assert known > 0
    assert snapshots.free_bytes(torch.device("cpu")) > 0


@every_store
def test_window_that_was_resumed_smaller_keeps_the_newest(store):
    state = push(window(4, store), window(4, store).init(weights(0)), 1, 2, 3, 4)
    smaller = window(2, store)
    state = smaller.load(window(4, store).save(state), CPU)
    assert mean(smaller, state) == [3.5] * 3
    push(smaller, state, 6)
    assert mean(smaller, state) == [5.0] * 3
    assert len(state["snapshots"]) == 2


@every_store
def test_window_that_was_resumed_larger_is_filled_first(store):
    state = push(window(2, store), window(2, store).init(weights(0)), 1, 2)
    larger = window(3, store)
    state = larger.load(window(2, store).save(state), CPU)
    assert larger.result(state) is None
    push(larger, state, 6)
    assert mean(larger, state) == [3.0] * 3


@pytest.mark.parametrize(("store", "place"), [("device", "meta"), ("cpu", "cpu")])
def test_loaded_snapshots_are_where_the_store_says(store, place):
    rule = window(2, store)
    saved = rule.save(push(rule, rule.init(weights(0)), 1, 2))
    state = rule.load(saved, {"w": torch.device("meta")})
    assert [snapshot["w"].device.type for snapshot in state["snapshots"]] == [place] * 2


# ---- on disk


def test_as_many_files_as_snapshots():
    rule = WindowMean(3, **DISK)
    state = rule.init(weights(0))
    for step in range(1, 8):
        push(rule, state, step)
        assert files() == set(state["snapshots"])
        assert len(files()) == min(step, 3)


def test_checkpoint_names_the_files_instead_of_holding_them():
    rule = WindowMean(3, **DISK)
    state = push(rule, rule.init(weights(0)), 1, 2, 3)
    rule.result(state)
    assert set(rule.save(state)) == {"snapshots", "checkpointed", "updates"}
    assert all(isinstance(name, str) for name in rule.save(state)["snapshots"])


def checkpoint(rule: WindowMean, state: State, path: str) -> None:
    torch.save(rule.save(state), path)


def resume(rule: WindowMean, path: str) -> State:
    return rule.load(torch.load(path, weights_only=True), CPU)


def test_run_resumes_from_its_last_two_checkpoints_although_the_window_has_moved_on():
    rule = WindowMean(3, **DISK)
    state = push(rule, rule.init(weights(0)), 1, 2, 4)
    checkpoint(rule, state, "a.ckpt")
    push(rule, state, 8, 16, 32, 64)
    checkpoint(rule, state, "b.ckpt")
    checkpoint(rule, state, "b2.ckpt")  # several files are written at one step
    push(rule, state, 128, 256, 512)
    assert len(files()) == 9
    for path, expected in {"a.ckpt": 7 / 3, "b.ckpt": 112 / 3}.items():
        assert mean(rule, resume(rule, path)) == pytest.approx([expected] * 3, rel=1e-15)


def test_files_of_the_third_last_checkpoint_are_removed():
    rule = WindowMean(2, **DISK)
    state = rule.init(weights(0))
    for i, (a, b) in enumerate(itertools.pairwise(range(1, 8))):
        push(rule, state, a, b)
        checkpoint(rule, state, f"{i}.ckpt")
    assert len(files()) == 4
    assert mean(rule, resume(rule, "4.ckpt")) == [5.5] * 3
    with pytest.raises(FileNotFoundError, match=r"2 snapshots of the window are gone.*snapshots.*last two checkpoints"):
        resume(rule, "3.ckpt")


def test_resumed_run_leaves_the_files_of_other_checkpoints_alone():
    rule = WindowMean(2, **DISK)
    state = push(rule, rule.init(weights(0)), 1, 2)
    checkpoint(rule, state, "a.ckpt")
    push(rule, state, 3, 4)
    checkpoint(rule, state, "b.ckpt")
    other = resume(rule, "a.ckpt")
    push(rule, other, 30, 40)
    assert mean(rule, other) == [35.0] * 3
    assert mean(rule, resume(rule, "b.ckpt")) == [3.5] * 3


def test_files_that_are_gone_are_an_error_that_says_so():
    rule = WindowMean(2, **DISK)
    state = push(rule, rule.init(weights(0)), 1, 2)
    saved = rule.save(state)
    for name in files():
        Path("snapshots", name).unlink()
    with pytest.raises(FileNotFoundError, match=r"gone.*point `directory` to where they are now"):
        rule.load(saved, CPU)
    with pytest.raises(FileNotFoundError, match="gone"):
        rule.result(state)


def test_folder_may_move():
    rule = WindowMean(2, **DISK)
    saved = rule.save(push(rule, rule.init(weights(0)), 1, 2))
    Path("snapshots").rename("elsewhere")
    moved = WindowMean(2, "disk", "elsewhere")
    state = moved.load(saved, CPU)
    assert mean(moved, state) == [1.5] * 3
    push(moved, state, 4)
    assert mean(moved, state) == [3.0] * 3


def test_folder_is_made_when_a_run_goes_on_elsewhere():
    rule = WindowMean(1, **DISK)
    saved = rule.save(rule.init(weights(0)))
    Path("snapshots").rmdir()
    assert mean(rule, push(rule, rule.load(saved, CPU), 3)) == [3.0] * 3


def test_damaged_file_is_an_error_that_says_so():
    rule = WindowMean(2, **DISK)
    state = push(rule, rule.init(weights(0)), 1, 2)
    path = Path("snapshots", state["snapshots"][0])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        rule.result(state)


def test_file_that_was_cut_off_while_it_was_written_does_not_count(monkeypatch):
    rule = WindowMean(2, **DISK)
    state = push(rule, rule.init(weights(0)), 1)
    before = files()

    def full(value: object, file: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            push(rule, state, 2)
    assert files() == before
    assert mean(rule, push(rule, state, 3)) == [2.0] * 3


def test_file_appears_under_its_name_when_all_of_it_is_on_the_disk(monkeypatch):
    rule, seen, fsync = WindowMean(1, **DISK), [], os.fsync

    def watch(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(({Path(name).suffix for name in files()}, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", watch)
    state = push(rule, rule.init(weights(0)), 1)
    (name,) = state["snapshots"]
    whole, folder = seen
    assert whole == ({".tmp"}, Path("snapshots", name).stat().st_size)
    assert folder[0] == {".pt"}  # the name is brought to the disk too
    assert files() == {name}


def test_tensors_added_later_replace_the_files_unless_a_checkpoint_names_them():
    rule = WindowMean(2, **DISK)
    state = push(rule, rule.init(weights(0)), 1, 2)
    rule.extend(state, {"late": torch.ones((), dtype=torch.bfloat16)})
    assert {torch.load(Path("snapshots", name))["late"].dtype for name in state["snapshots"]} == {torch.float32}
    assert files() == set(state["snapshots"])
    saved = rule.save(state)
    rule.extend(state, {"later": torch.ones(())})
    assert files() == {*state["snapshots"], *saved["snapshots"]}
    assert set(rule.result(rule.load(saved, CPU))) == {"w", "late"}


def test_store_can_not_change_between_memory_and_disk():
    in_memory, on_disk = window(1, "cpu"), window(1, "disk")
    with pytest.raises(ValueError, match=r"saved window is in memory.*store='cpu'"):
        on_disk.load(in_memory.save(push(in_memory, in_memory.init(weights(0)), 1)), CPU)
    with pytest.raises(ValueError, match=r"saved window is on disk.*store='disk'"):
        in_memory.load(on_disk.save(push(on_disk, on_disk.init(weights(0)), 1)), CPU)


BAD_ARGUMENTS = {
    "no snapshot": ({"k": 0}, "`k` must be at least 1, got 0"),
    "unknown store": ({"store": "tape"}, "`store` must be 'device', 'cpu' or 'disk', got 'tape'"),
    "disk without a folder": ({"store": "disk"}, "`directory` must be given for `store='disk'`.*got None"),
    "folder without disk": ({"directory": "x"}, "`directory` must be given .* only for it, got 'x' .*'device'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=list(BAD_ARGUMENTS))
def test_bad_argument_is_refused_by_name_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowMean(**arguments)


def test_folder_may_be_a_path():
    assert WindowMean(1, "disk", Path("snapshots")) == WindowMean(1, "disk", "snapshots")


def test_tables_are_not_empty():
    assert STORES
    assert BAD_ARGUMENTS
