"""Streaming DiLoCo: fragments in turn, results that arrive later and are mixed, few bits; in turn and in processes."""

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch, start, wait
from tiny import Net, NetParts, batches, differing, of, trainer, validation, values
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_merge.branches import Average, InTurn, OuterStep, Policy, StreamingOuterStep
from lightning_merge.branches._arriving import QuantisedMean, mean_here
from lightning_merge.branches._fragments import divided
from lightning_merge.branches._quantised import blocks, dequantised, mean_of, quantised, unblocked
from lightning_merge.callbacks import Branching, BranchStrategy, DiLoCo
from lightning_merge.schedules import EveryNSteps

BENDS = [lambda batch, by=by: [batch[0] + by * batch[0].square(), batch[1]] for by in (0.0, 0.3, 0.6)]
LAYERS = {"long": 700, "short": 5, "middle": 30}


# ---- values, beside a loop that knows nothing of the package


class Pulled(pl.LightningModule):
    """Three layers that every step of every branch pulls a fifth of the way to a target of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in LAYERS.items():
            self.add_module(name, nn.Linear(size, 1, bias=False, dtype=torch.float64))
            nn.init.constant_(getattr(self, name).weight, 0.5)

    def training_step(self, batch: tuple[int, int], batch_idx: int) -> Tensor:
        pairs = ((getattr(self, name).weight, target(name, *batch)) for name in LAYERS)
        return torch.stack([(weight * (weight.detach() - goal)).sum() for weight, goal in pairs]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def target(layer: str, step: int, branch: int) -> Tensor:
    numbers = torch.Generator().manual_seed(1000 * LAYERS[layer] + 10 * int(step) + branch)
    return torch.randn(1, LAYERS[layer], generator=numbers, dtype=torch.float64) * (1 + branch)


def rounded(numbers: Tensor, bits: int) -> Tensor:
    if bits == 32:
        return numbers
    most, found = {8: 127, 4: 7}[bits], []
    for block in numbers.flatten().split(256):
        scale = (block.abs().max() / most).float().double()
        found.append((block / scale).round() * scale)
    return torch.cat(found).view_as(numbers)


def reference(parts: list[list[str]], every: int, delay: int, mix: float, bits: int, count: int, steps: int) -> Any:
    """Algorithm 2 of the paper, as it reads: the branches, the anchor and the velocity after so many steps of each."""
    start = {name: torch.full((1, size), 0.5, dtype=torch.float64) for name, size in LAYERS.items()}
    branches = [{name: t.clone() for name, t in start.items()} for _ in range(count)]
    anchor, velocity = dict(start), {name: torch.zeros_like(t) for name, t in start.items()}
    sent: dict[int, tuple[int, dict[str, Tensor]]] = {}
    for step in range(1, steps + 1):
        for j, own in enumerate(branches):
            for name in LAYERS:
                own[name] = own[name] - 0.2 * (own[name] - target(name, step - 1, j))
        for number, names in enumerate(parts):
            if step % every == (number + 1) * every // len(parts) % every:
                ways = {name: [rounded(anchor[name] - own[name], bits) for own in branches] for name in names}
                sent[number] = step + delay, {n: rounded(sum(each) / count, bits) for n, each in ways.items()}
            if number in sent and sent[number][0] == step:
                for name, way in sent.pop(number)[1].items():
                    velocity[name] = 0.9 * velocity[name] + way
                    anchor[name] = anchor[name] - 0.7 * (way + 0.9 * velocity[name])
                    for own in branches:
                        own[name] = (1 - mix) * own[name] + mix * anchor[name]
    return branches, anchor, velocity


SETTINGS = [
    (1, 0, 1.0, 8),
    (1, 2, 0.5, 32),
    (1, 5, 1.0, 4),
    (2, 0, 1.0, 32),
    (2, 1, 0.5, 8),
    (2, 5, 0.3, 32),
    (3, 2, 0.5, 4),
    (3, 3, 0.7, 32),
    (3, 5, 1.0, 8),
]
PARTS = {1: [["long", "short", "middle"]], 2: [["long"], ["short", "middle"]], 3: [["long"], ["middle"], ["short"]]}


def held(callback: Branching) -> list[dict[str, Tensor]]:
    own, raw = callback._running.branches, callback.raw_weights()
    return [{name: raw[name] for name in own.live} if j == own.active else own.weights(j) for j in own.own]


@pytest.mark.parametrize(("fragments", "delay", "mix", "bits"), SETTINGS)
def test_a_run_is_the_published_algorithm(fragments: int, delay: int, mix: float, bits: Any, tmp_path: Path) -> None:
    views: list[Callable[[Any], Any]] = [lambda batch, j=j: (int(batch), j) for j in range(3)]
    settings: Any = {"fragments": fragments, "delay": delay, "mix": mix, "bits": bits, "augmentations": views}
    diloco, module = DiLoCo(3, 6, batches="same", **settings), Pulled()
    data = DataLoader(torch.arange(20), batch_size=None)
    trainer(tmp_path, [diloco], max_epochs=1, precision="64-true").fit(module, data)
    branches, anchor, velocity = reference(PARTS[fragments], 6, delay, mix, bits, 3, 20)
    state = diloco._policy_state
    assert state is not None
    for name in LAYERS:
        key = f"{name}.weight"
        close = {"rtol": 0, "atol": 1e-12}
        for found, expected in zip(held(diloco), branches, strict=True):
            torch.testing.assert_close(found[key], expected[name], **close)
        torch.testing.assert_close(state["anchor"][key], anchor[name], **close)
        torch.testing.assert_close(state["momentum"][key], velocity[name], **close)
        torch.testing.assert_close(module.state_dict()[key], sum(each[name] for each in branches) / 3, **close)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_fragment_at_once_and_whole_is_diloco_to_the_last_bit(count: int, tmp_path: Path) -> None:
    found = []
    for policy in (DiLoCo(lr=0.7, momentum=0.9).policy, StreamingOuterStep(1, 0, 1.0, 32, 0.7, 0.9)):
        module = Net(norm=True)
        callback = Branching(
            policy, EveryNSteps(3), count, augmentations=BENDS[:count], batches="turns", buffers="average"
        )
        trainer(tmp_path, [callback], max_epochs=2).fit(module, batches(4 * count), validation())
        assert callback.merges == 2
        state = callback._policy_state or {}
        found.append([values(module), state["anchor"], state["momentum"], *map(values, held(callback))])
    for plain, streaming in zip(*found, strict=True):
        assert not differing(plain, streaming)
    assert DiLoCo(fragments=1, delay=0, mix=1, bits=32).policy == DiLoCo().policy


# ---- few bits


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (4, 7)])
def test_a_number_is_off_by_half_a_scale_at_most_and_blocks_keep_to_their_tensor(bits: Any, most: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    tensors = {
        "large": 100 * torch.randn(3, 200, generator=numbers),
        "small": torch.randn(7, generator=numbers) / 100,
        "zero": torch.zeros(2),
        "complex": torch.randn(2, 2, generator=numbers, dtype=torch.complex64),
    }
    rows = blocks(tensors)
    again = unblocked(dequantised(quantised(rows, bits), bits, rows.dtype), tensors)
    for name, tensor in tensors.items():
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        assert (again[name] - tensor).abs().max() <= 1.5 * parts.abs().max() / most / 2
        assert again[name].shape == tensor.shape
    assert quantised(rows, bits).nbytes == len(rows) * (256 * bits // 8 + 4)
    assert (again["zero"] == 0).all()
    scale = quantised(torch.zeros(1, 256), bits)[:, -4:].contiguous().view(torch.float32)
    assert scale > 0  # so that no zero is divided by it


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_not_finite_after_it_has_travelled(broken: float) -> None:
    rows = torch.ones(2, 256)
    rows[1, 3] = broken
    found = dequantised(mean_of([quantised(rows, 8), quantised(torch.ones(2, 256), 8)], 8, rows.dtype), 8, rows.dtype)
    assert (found[0] == 1).all()
    assert not found[1].isfinite().any()


class Counted(nn.Module):
    """A layer that counts its calls, and a large number that no eight bits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.layer.register_buffer("calls", torch.tensor([12345, 3]))
        self.layer.register_buffer("scale", torch.tensor([0.1, 1000.0]))


def test_integers_are_never_rounded_nor_are_buffers() -> None:
    module = Counted()
    branches = InTurn(module, [], 2, buffers="average")
    policy = StreamingOuterStep(1, 0, 1.0, 4)
    state = policy.init(branches)
    branches.weights(1)["layer.calls"].copy_(torch.tensor([4, 54321]))
    policy.merge(state, branches)
    for branch in (0, 1):
        assert branches.weights(branch)["layer.calls"].tolist() == [12345, 54321]
        assert torch.equal(branches.weights(branch)["layer.scale"], torch.tensor([0.1, 1000.0]))
    with pytest.raises(ValueError, match=r"`bits` rounds fractions, and `layer\.calls` holds torch.int64"):
        branches.start_mean(lambda own: {"layer.calls": own["layer.calls"]}, 8)


# ---- fragments


def test_fragments_are_whole_layers_of_about_the_same_size() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)
    module = nn.Sequential(nn.Embedding(100, 32), nn.TransformerEncoder(layer, 4), nn.Linear(32, 100))
    live = dict(module.named_parameters())
    found = divided(live, 4)
    sizes = [sum(live[name].numel() for name in names) for names in found]
    assert sorted(name for names in found for name in names) == sorted(live)
    homes = {name: number for number, names in enumerate(found) for name in names}
    assert all(homes[name] == homes[name.removesuffix("bias") + "weight"] for name in live if name.endswith(".bias"))
    assert max(sizes) < 1.15 * min(sizes)


def test_what_is_unfrozen_later_joins_its_layer_or_the_smallest_fragment() -> None:
    module = nn.Sequential(*(nn.Linear(size, 1) for size in (8, 4, 2)))
    before = [["0.weight"], ["1.weight", "1.bias"]]
    assert divided(dict(module.named_parameters()), 2, before) == [
        ["0.weight", "0.bias"],
        [*before[1], "2.weight", "2.bias"],
    ]


def test_each_merge_sends_one_fragment_and_rounds_go_on(tmp_path: Path) -> None:
    diloco = DiLoCo(2, 4, batches="same", augmentations=BENDS[:2], fragments=2, delay=3, mix=0.5)
    trainer(tmp_path, [diloco], max_epochs=1).fit(Net(), batches(9))
    state = diloco._policy_state or {}
    assert diloco.merges == state["merges"] == 4  # after 2, 4, 6 and 8 steps
    assert state["waiting"] == {1: 2}  # what was sent after step 8; that of step 6 has arrived at the last step


def test_a_fragment_that_is_merged_again_takes_in_first_what_it_sent() -> None:
    branches = InTurn(nn.Linear(1, 1, bias=False), [], 1)
    branches.weights(0)["weight"].fill_(1.0)
    policy = StreamingOuterStep(1, 5, 1.0, 32, lr=1.0, momentum=0.0)
    state = policy.init(branches)
    for own in (0.5, 9.0):  # what the second merge finds is given up for what the first one sent
        branches.weights(0)["weight"].fill_(own)
        policy.merge(state, branches)
    assert branches.weights(0)["weight"].item() == 0.5
    assert state["waiting"] == {0: 5}


# ---- resuming


PLAIN = {"fragments": 1, "delay": 0, "mix": 1.0, "bits": 32}


def resumable(**settings: Any) -> DiLoCo:
    defaults = {"fragments": 2, "delay": 4, "mix": 0.5, "bits": 8, "augmentations": BENDS[:2]}
    return DiLoCo(2, 6, **defaults | settings)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_run_resumes_at_every_step_of_a_delay_bit_for_bit(bits: Any, tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Path | None = None) -> tuple[Any, DiLoCo]:
        checkpoint = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        diloco, module = resumable(bits=bits), Net(norm=True)
        data = DataLoader([next(iter(batches(1)))] * 24, batch_size=None)
        trainer(tmp_path, [diloco, checkpoint], max_epochs=1).fit(module, data, ckpt_path=ckpt_path)
        return module, diloco

    whole, first = fit("whole")
    caught = 0
    for step in range(6, 19):  # fragments are sent after 6, 12 and 18 steps, and arrive after 14 and 20
        file = tmp_path / "whole" / f"step={step}.ckpt"
        section = torch.load(file, weights_only=True)["lightning_merge"]["states"]["diloco"]["policy"]
        caught += bool(section["arrived"])
        again, second = fit(f"from-{step}", file)
        assert not differing(whole, again), step
        for one, other in zip(held(first), held(second), strict=True):
            assert not differing(one, other)
    assert caught == 13


OTHER_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "fewer fragments": ({}, {"fragments": 1}, "`fragments` must be 2, as where the run goes on from, got 1"),
    "few bits to many": ({}, {"bits": 32}, "`bits` must be 8, as where the run goes on from, got 32"),
    "many bits to few": ({"bits": 32}, {"bits": 4}, "`bits` must be 32, as where the run goes on from, got 4"),
    "to plain": ({}, PLAIN, r"written with StreamingOuterStep\(.*'fragments'.* is nothing to OuterStep"),
    "from plain": (PLAIN, {}, r"written with OuterStep\(.* is nothing to StreamingOuterStep"),
    "eight bits to four": ({}, {"bits": 4}, None),
    "a shorter delay": ({}, {"delay": 1, "mix": 1.0}, None),
}


@pytest.mark.filterwarnings("ignore:.* goes on from a file that was written with")
@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_resume_in_mid_delay_with_other_settings_goes_on_or_names_them(name: str, tmp_path: Path) -> None:
    before, after, message = OTHER_SETTINGS[name]
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    trainer(tmp_path, [resumable(**before), checkpoint], max_steps=7).fit(Net(), batches(8))
    again, module = resumable(**after), Net()
    told = nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with told:
        trainer(tmp_path, [again], max_steps=16).fit(module, batches(16), ckpt_path=tmp_path / "step=7.ckpt")
    assert (again.merges > 1) is (message is None)


def test_a_policy_that_remembers_goes_on_from_one_that_does_not(tmp_path: Path) -> None:
    def local(policy: Policy) -> Branching:
        return Branching(policy, EveryNSteps(3), 2)

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, [local(Average()), checkpoint], max_steps=4).fit(Net(), batches(8))
    again = local(OuterStep())
    with pytest.warns(UserWarning, match=r"written with Average\("):
        trainer(tmp_path, [again], max_steps=8).fit(Net(), batches(8), ckpt_path=tmp_path / "step=4.ckpt")
    assert (again._policy_state or {}).keys() == {"anchor", "momentum"}


def test_a_second_fit_takes_in_what_the_first_one_sent(tmp_path: Path) -> None:
    diloco, module = resumable(), Net()
    trainer(tmp_path, [diloco], max_epochs=1).fit(module, batches(8))
    sent = dict((diloco._policy_state or {})["arrived"])
    trainer(tmp_path, [diloco], max_epochs=1).fit(module, batches(8))
    assert sent
    assert not set(sent) & set((diloco._policy_state or {})["arrived"])


def test_weights_changed_after_a_file_was_read_forget_what_was_sent(tmp_path: Path) -> None:
    class Loads(Net):  # type: ignore[misc, valid-type]
        def on_train_start(self) -> None:
            with torch.no_grad():
                self.net[0].weight.fill_(0.25)

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    trainer(tmp_path, [resumable(), checkpoint], max_epochs=1).fit(Net(), batches(8))
    diloco = resumable()
    trainer(tmp_path, [diloco], max_epochs=2, max_steps=9).fit(Loads(), batches(8), ckpt_path=tmp_path / "step=8.ckpt")
    kept = (diloco._policy_state or {})["arrived"]
    assert "net.0.weight" not in kept
    assert kept


# ---- what goes wrong


def test_a_branch_that_diverges_during_a_delay_goes_on_from_the_others(tmp_path: Path) -> None:
    spoil = [BENDS[0], lambda batch: [batch[0] * (math.nan if counted(batch) == 5 else 1), batch[1]]]
    seen = [0]

    def counted(batch: Any) -> int:
        seen[0] += 1
        return seen[0]

    diloco, module = resumable(augmentations=spoil, batches="same"), Net()
    with pytest.warns(UserWarning, match=r"branches \[1\] hold a NaN or an infinity"):
        trainer(tmp_path, [diloco], max_epochs=1).fit(module, batches(16))
    assert diloco.revived == 1
    assert all(tensor.isfinite().all() for own in [values(module), *held(diloco)] for tensor in own.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiLoCo(fragments=0), "`fragments` must be at least 1, got 0"),
        (lambda: DiLoCo(2, 10, fragments=3), "`fragments` must divide `every_n_steps`, got 3 fragments and 10 steps"),
        (lambda: DiLoCo(delay=-1), "`delay` must be at least 0, got -1"),
        (lambda: DiLoCo(2, 10, delay=10), "`delay` must be less than `every_n_steps`, got 10 and 10"),
        (lambda: DiLoCo(mix=0.0), r"`mix` must be in \(0, 1\], got 0.0"),
        (lambda: DiLoCo(mix=1.5), r"`mix` must be in \(0, 1\], got 1.5"),
        (lambda: DiLoCo(bits=16), "`bits` must be 32, 8 or 4, got 16"),  # type: ignore[arg-type]
        (lambda: DiLoCo(delay=1, optimizer_state="reset"), "`optimizer_state` must be 'keep' with .*, got 'reset'"),
    ],
)
def test_an_argument_out_of_range_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_more_fragments_than_layers_are_refused(tmp_path: Path) -> None:
    diloco = DiLoCo(2, 6, fragments=3, buffers="average")
    with pytest.raises(
        ValueError, match="at most the number of layers whose parameters are branched, which is 2, got 3"
    ):
        trainer(tmp_path, [diloco], max_epochs=1).fit(Net(), batches(2))


# ---- a branch in each process


class Sent(TorchDispatchMode):
    """Bytes that collectives were handed in this process, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            taken = args[1] if "gather" in func.__name__ or "alltoall" in func.__name__ else args[0]
            tensors = taken if isinstance(taken, list) else [taken]
            flat = [each for tensor in tensors for each in (tensor if isinstance(tensor, list) else [tensor])]
            self.bytes.setdefault(func.__name__.split(".")[0], []).append(sum(each.nbytes for each in flat))
        return func(*args, **(kwargs or {}))


class OnTheWay(pl.Callback):
    """How many exchanges are on their way after each step, and how many of them on their way back."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.back: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        (diloco,) = (each for each in trainer.callbacks if isinstance(each, Branching))
        on_the_way = diloco._running.branches.on_the_way.values()
        self.counts.append(len(on_the_way))
        self.back.append(sum(getattr(each, "_is_back", False) for each in on_the_way))


IN_PROCESSES: dict[str, dict[str, Any]] = {
    "whole": {},
    "late": {"delay": 1, "mix": 0.5},
    "fragments": {"fragments": 3, "delay": 4, "mix": 0.5},
    "eight bits": {"bits": 8},
    "eight bits, late": {"fragments": 2, "delay": 5, "mix": 0.5, "bits": 8},
    "four bits, a step": {"fragments": 3, "delay": 1, "mix": 0.7, "bits": 4},
    "four bits, late": {"fragments": 2, "delay": 2, "mix": 1.0, "bits": 4},
}


class ParallelParts(NetParts):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)


def one_fit(root: Path, name: str, count: int, ckpt_path: Path | None = None, **settings: Any) -> dict[str, Any]:
    diloco = DiLoCo(count, 6, augmentations=BENDS[:count], batches="same", **IN_PROCESSES[name])
    watch, module = OnTheWay(), of(ParallelParts)(norm=True, lr=0.05)
    files = ModelCheckpoint(root / name, "{step}", every_n_train_steps=1, save_top_k=-1)
    saving = [files] if ckpt_path is None and "strategy" in settings else []
    run = trainer(root, [diloco, watch, *saving], max_epochs=1, use_distributed_sampler=False, **settings)
    data = DataLoader([next(iter(batches(1)))] * 16, batch_size=None)
    with Sent() as sent:
        run.fit(module, data, validation(), ckpt_path=ckpt_path)
    state = diloco._policy_state or {}
    own = diloco._running.branches
    return {
        "end": values(module),
        "anchor": state["anchor"],
        "branch": {j: values(each) for j, each in zip(own.own, held(diloco), strict=True)},
        "waiting": state.get("waiting", {}),
        "arrived": state.get("arrived", {}),
        "on the way": watch.counts,
        "back": watch.back,
        "sent": sent.bytes,
    }


def way(branch: int) -> dict[str, Tensor]:
    """What a branch sends: four blocks, which three processes do not share evenly."""
    numbers = torch.Generator().manual_seed(branch)
    return {"long": torch.randn(2, 300, generator=numbers), "short": torch.randn(3, generator=numbers)}


def every_setting(root: Path) -> dict[str, Any]:
    def strategy() -> dict[str, Any]:
        return {"strategy": BranchStrategy(process_group_backend="gloo"), "devices": 3}

    found: dict[str, Any] = {name: one_fit(root, name, 3, **strategy()) for name in IN_PROCESSES}
    found["means"] = {bits: QuantisedMean(way(dist.get_rank()), bits, 3, None).result() for bits in (8, 4)}
    found["again"] = {
        step: one_fit(root, "eight bits, late", 3, root / "eight bits, late" / f"step={step}.ckpt", **strategy())
        for step in (4, 6, 10)
    }
    return found


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(3, every_setting, tmp_path_factory.mktemp("ranks"))


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_processes_do_what_branches_in_turn_do(name: str, in_processes: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = one_fit(tmp_path, name, 3)
    for branch, each in enumerate(in_processes):
        found = each[name]
        assert found["waiting"] == alone["waiting"]
        assert found["branch"].keys() == {branch}
        pairs = [(found[key], alone[key]) for key in ("end", "anchor", "arrived")]
        pairs.append((found["branch"][branch], alone["branch"][branch]))
        for tensors, expected in pairs:
            assert tensors.keys() == expected.keys()
            for key in expected:
                torch.testing.assert_close(tensors[key], expected[key], rtol=0, atol=3e-6)


@pytest.mark.multiprocess
def test_few_bits_give_the_same_mean_in_processes_and_in_one_to_the_last_bit(
    in_processes: list[dict[str, Any]],
) -> None:
    for bits in (8, 4):
        expected = mean_here([way(branch) for branch in range(3)], bits)
        for each in in_processes:
            assert not differing(each["means"][bits], expected)
        assert max((expected[n] - t).abs().max() for n, t in way(0).items()) > 0


@pytest.mark.multiprocess
def test_processes_resume_in_mid_delay_bit_for_bit(in_processes: list[dict[str, Any]]) -> None:
    for each in in_processes:
        whole = each["eight bits, late"]
        for again in each["again"].values():
            for key in ("end", "anchor", "arrived"):
                assert not differing(whole[key], again[key])
            assert not any(differing(whole["branch"][j], again["branch"][j]) for j in whole["branch"])


@pytest.mark.multiprocess
def test_an_exchange_runs_beside_the_steps_of_its_delay(in_processes: list[dict[str, Any]]) -> None:
    # Without the files that are written at every step, which wait for what is on its way.
    for each in in_processes:
        counts = each["again"][4]["on the way"]
        # From step 5 on: sent after 6, 9, 12 and 15 steps, taken in five steps later.
        assert counts == [0, 1, 1, 1, 2, 2, 1, 2, 2, 1, 2, 2]
        assert each["again"][4]["back"] == [0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1]  # three steps after they were sent
        assert set(each["whole"]["on the way"]) == {0}


class Breaks(NetParts):
    """The second process fails in its eighth step, with two fragments on their way."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 7 and dist.get_rank() == 1:
            raise ArithmeticError("as planned")
        return super().training_step(batch, batch_idx)


def interrupted_in_mid_delay(root: Path) -> None:
    diloco, module = DiLoCo(2, 6, fragments=2, delay=5, mix=0.5, bits=8), of(Breaks)(norm=True)
    strategy = BranchStrategy(process_group_backend="gloo")
    run = trainer(root, [diloco], max_epochs=1, use_distributed_sampler=False, strategy=strategy, devices=2)
    data = DataLoader([next(iter(batches(1)))] * 16, batch_size=None)
    try:
        run.fit(module, data)
    except Exception as error:
        state = diloco._policy_state or {}
        told = {"error": repr(error), "merges": diloco.merges, "arrived": state["arrived"], "module": values(module)}
        torch.save(told, root / f"told{dist.get_rank()}.pt")
    os._exit(0)  # as after an error: without a word to the others


@pytest.mark.multiprocess
def test_a_process_that_fails_in_mid_delay_leaves_nobody_waiting(tmp_path: Path) -> None:
    wait(start(2, interrupted_in_mid_delay, tmp_path), 120)
    first, second = (torch.load(tmp_path / f"told{rank}.pt") for rank in (0, 1))
    assert "as planned" in second["error"]
    assert first["merges"] >= second["merges"] == 2
    for told in (first, second):
        assert not told["arrived"]  # the other process is not waited for
        assert all(tensor.isfinite().all() for tensor in told["module"].values())
