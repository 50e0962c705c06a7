"""``Averager``: what a callback does, in a loop of one's own, without Lightning."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NetParts, batches, differing
from torch import nn

from lightning_merge import Averager
from lightning_merge.rules import ExponentialMean, Interpolation, Mean, Rule, ValleyMean, WindowMean
from lightning_merge.schedules import EveryNEpochs, EveryNSteps, RunLength, Schedule
from lightning_merge.selections import Selection

RULES: list[tuple[Rule, Schedule]] = [
    (ExponentialMean(0.9), EveryNSteps()),
    (ExponentialMean(half_life="25%", warmup="timm"), EveryNSteps(2, start=1)),
    (Mean(), EveryNSteps(1, start=0.5)),
    (Mean(), EveryNEpochs(start=2)),
    (WindowMean(3), EveryNSteps(2)),
    (Interpolation(0.5), EveryNSteps()),
]
LENGTH = RunLength(steps=12, epochs=3, steps_per_epoch=4)


class Net(NetParts, nn.Module):
    """The network without a Trainer."""


def net(norm: bool = True) -> Any:
    return Net(norm=norm)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def train(module: Any, optimizer: torch.optim.Optimizer, epochs: int = 3, ended: Callable[[], None] = int) -> None:
    module.train()
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
        ended()


@pytest.mark.parametrize(("rule", "schedule"), RULES, ids=repr)
def test_it_is_the_callback_bit_for_bit_on_the_same_steps(rule: Rule, schedule: Schedule, tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from lightning_merge.callbacks import WeightMerging

    callback = WeightMerging(rule, schedule)
    with_callback = type("Net", (NetParts, pl.LightningModule), {})(norm=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = pl.Trainer(default_root_dir=tmp_path, max_epochs=3, accelerator="cpu", callbacks=[callback], **quiet)
    run.fit(with_callback, batches())
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, rule, schedule, run=LENGTH)
    train(module, optimizer, ended=averager.end_epoch)
    assert (averager.steps, averager.updates) == (callback.steps, callback.updates)
    assert averager.update_window == callback.update_window
    assert differing(callback.raw_weights(), module) == []
    assert differing(callback.merged_weights(), averager.merged_weights()) == []
    with averager.merged():
        assert differing(with_callback, module) == []
    assert differing(callback.raw_weights(), module) == []
    raw = averager.publish()
    assert differing(with_callback, module) == []
    assert differing(callback.raw_weights(), raw) == []


@pytest.mark.parametrize(("rule", "schedule"), RULES, ids=repr)
def test_a_resumed_run_equals_an_uninterrupted_one(rule: Rule, schedule: Schedule, tmp_path: Path) -> None:
    whole = net()
    optimizer = sgd(whole)
    of_whole = Averager(whole, optimizer, rule, schedule, run=LENGTH)
    train(whole, optimizer, 3, of_whole.end_epoch)

    first = net()
    optimizer = sgd(first)
    averager = Averager(first, optimizer, rule, schedule, run=LENGTH)
    train(first, optimizer, 1, averager.end_epoch)
    torch.save([first.state_dict(), optimizer.state_dict(), averager.state_dict()], tmp_path / "run.pt")

    second = net()
    optimizer = sgd(second)
    resumed = Averager(second, optimizer, rule, schedule, run=LENGTH)
    for each, state in zip((second, optimizer, resumed), torch.load(tmp_path / "run.pt"), strict=True):
        each.load_state_dict(state)
    train(second, optimizer, 2, resumed.end_epoch)
    assert differing(whole, second) == []
    assert differing(of_whole.merged_weights(), resumed.merged_weights()) == []
    assert (resumed.steps, resumed.updates, resumed.update_window) == (12, of_whole.updates, of_whole.update_window)


def test_a_state_that_was_loaded_is_a_copy() -> None:
    module = net()
    optimizer = sgd(module)
    averager, other = (Averager(module, optimizer, ExponentialMean(0.5)) for _ in range(2))
    train(module, optimizer, 1)
    state = averager.state_dict()
    other.load_state_dict(state)
    kept = {name: tensor.clone() for name, tensor in (averager.merged_weights() or {}).items()}
    averager.close()
    train(module, optimizer, 1)
    assert differing(kept, averager.merged_weights()) == []
    assert differing(kept, other.merged_weights()) != []


# ---- steps


def test_accumulated_batches_are_no_steps() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, Mean())
    for number, batch in enumerate(batches(8)):
        module.loss(batch).backward()
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert averager.steps == averager.updates == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_does_not_count(fused: bool) -> None:
    module = net(norm=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)
    averager = Averager(module, optimizer, Mean())
    scaler = torch.amp.GradScaler("cpu")
    for number, (inputs, targets) in enumerate(batches(4)):
        optimizer.zero_grad()
        loss = module.loss((inputs, targets)) * (float("inf") if number in (0, 2) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert averager.steps == averager.updates == 2


def test_a_step_that_leaves_a_nan_leaves_the_average_as_it_was_and_is_named() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, ExponentialMean(0.5))
    train(module, optimizer, 1)
    before = {name: tensor.clone() for name, tensor in (averager.merged_weights() or {}).items()}
    optimizer.zero_grad()
    module.loss(next(iter(batches()))).backward()
    module.net[2].weight.grad.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"`net\.2\.weight` holds a NaN or an infinity after applied step 5"):
        optimizer.step()
    assert (averager.steps, averager.updates, averager.skipped_nonfinite) == (5, 4, 1)
    assert differing(before, averager.merged_weights()) == []


def test_of_two_optimizers_it_counts_the_one_it_was_given() -> None:
    module = net()
    first = torch.optim.SGD(module.net[0].parameters(), lr=0.1)
    second = torch.optim.SGD(module.net[2].parameters(), lr=0.1)
    averager = Averager(module, second, Mean())
    train(module, first, 1)
    assert averager.steps == 0
    train(module, second, 1)
    assert averager.steps == 4


def test_a_rule_that_decides_by_a_score_is_told_it() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, ValleyMean(n_converge=1, n_tolerance=1, tolerance=0.1))
    finished = []
    for score in (1.0, 1.05, torch.tensor(5.0)):
        train(module, optimizer, 1)
        finished.append(averager.evaluate(score))  # type: ignore[arg-type]
    assert finished == [False, False, True]
    assert averager.ready


# ---- merged weights in place


class Failure(Exception):
    pass


def test_raw_weights_are_back_whatever_happens_in_the_block() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, ExponentialMean(0.5))
    with averager.merged():  # nothing is merged yet
        assert not averager.ready
    train(module, optimizer, 1)
    raw, objects = {n: t.clone() for n, t in module.state_dict().items()}, list(module.parameters())

    def fail() -> None:
        with averager.merged():
            with averager.merged():
                pass
            assert differing(raw, module) != []  # the inner block has not ended the outer one
            assert differing(raw, averager.raw_weights()) == []
            module.net[1](torch.randn(4, 8))  # writes to running statistics
            raise Failure

    with pytest.raises(Failure):
        fail()
    assert differing(raw, module) == []
    assert all(one is other for one, other in zip(objects, module.parameters(), strict=True))


def test_a_forward_pass_in_the_block_does_not_change_the_average() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, ExponentialMean(0.5))
    train(module, optimizer, 1)
    before = {name: tensor.clone() for name, tensor in (averager.merged_weights() or {}).items()}
    with averager.merged():
        module(torch.randn(4, 4))
    assert differing(before, averager.merged_weights()) == []


def test_an_optimizer_step_in_the_block_is_refused() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, ExponentialMean(0.5))
    train(module, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"inside of `merged\(\)` would train the average"), averager.merged():
        optimizer.step()


class Caching(nn.Module):
    """Doubles its weight in eval mode, once, as LoRA layers merge theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.doubled = False

    def train(self, mode: bool = True) -> "Caching":
        if mode == self.doubled:
            self.weight.data.mul_(0.5 if mode else 2.0)
            self.doubled = not mode
        return super().train(mode)


@pytest.mark.parametrize("before", [True, False])
def test_what_a_module_derives_in_eval_mode_is_of_the_weights_that_are_in_place(before: bool) -> None:
    module = Caching()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    averager = Averager(module, optimizer, Mean())
    for _ in range(3):
        module.weight.grad = torch.ones(1)
        optimizer.step()  # 0, -1, -2, of mean -1
    if before:
        module.eval()
    with averager.merged():
        module.eval()
        assert module.weight.item() == -2.0
    assert module.weight.item() == -4.0
    module.train()
    assert module.weight.item() == -2.0
    assert (averager.merged_weights() or {})["weight"].item() == -1.0


def test_statistics_are_measured_again_before_merged_weights_are_used() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, Mean(), selection=Selection(buffers="recompute"))
    averager.recalibrate([])  # nothing is merged yet
    train(module, optimizer, 2)
    with pytest.raises(RuntimeError, match=r"call `recalibrate\(batches\)` before"), averager.merged():
        pass
    averager.recalibrate(batches())
    with averager.merged():
        inputs = torch.cat([batch[0] for batch in batches()])
        hidden = module.net[0](inputs)
        assert torch.allclose(module.net[1].running_mean, hidden.mean(0), atol=1e-6)
        assert torch.allclose(module.net[1].running_var, hidden.var(0), atol=1e-6)
    assert module.training
    saved = averager.state_dict()
    averager.load_state_dict(saved)
    with averager.merged():
        pass


# ---- what is refused


def _of_others(module: nn.Module) -> torch.optim.Optimizer:
    return sgd(nn.Linear(1, 1))


def test_misuse_is_answered_at_construction() -> None:
    module = net()
    good = sgd(module)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (("net", good, Mean()), {}, TypeError, "`model` must be a module"),
        ((module, [good, good], Mean()), {}, TypeError, "`optimizer` must be one optimizer of torch"),
        ((module, _of_others(module), Mean()), {}, ValueError, "`optimizer` must step parameters of Net"),
        ((module, good, 0.999), {}, TypeError, "`rule` must be a Rule"),
        ((module, good, Mean(), 5), {}, TypeError, "`schedule` must be a Schedule"),
        ((module, good, Mean(), EveryNSteps(start=0.5)), {}, ValueError, r"give `run=RunLength\(steps="),
        ((module, good, Mean()), {"device": "cuda"}, ValueError, "`device` must be None"),
        ((net().to("meta"), good, Mean()), {}, ValueError, "`net.0.weight` is on the meta device"),
        ((module, good, Mean()), {"selection": Selection(("other.*",))}, ValueError, "matches no parameter"),
    ]
    for given, options, error, words in cases:
        with pytest.raises(error, match=words):
            Averager(*given, **options)


def test_misuse_of_its_methods_is_answered() -> None:
    module = net()
    averager = Averager(module, sgd(module), Mean())
    with pytest.raises(ValueError, match="`evaluate` is for rules that decide by a score"):
        averager.evaluate(1.0)
    with pytest.raises(ValueError, match=r"needs `selection=Selection\(buffers='recompute'\)`, got buffers='average'"):
        averager.recalibrate(batches())
    with pytest.raises(TypeError, match="`state` must be what"):
        averager.load_state_dict("average.pt")  # type: ignore[arg-type]


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    module = net()
    optimizer = sgd(module)
    averager = Averager(module, optimizer, Mean())
    train(module, optimizer, 1)
    linear = nn.Linear(2, 2)
    others = Averager(linear, other := sgd(linear), Mean())
    linear(torch.ones(1, 2)).sum().backward()
    other.step()
    before = {name: tensor.clone() for name, tensor in (averager.merged_weights() or {}).items()}
    for state, words in (
        (others.state_dict(), "holds the average of another model: `net.0.weight`"),
        (module.state_dict(), "is not as lightning-merge writes it"),
    ):
        with pytest.raises(ValueError, match=words):
            averager.load_state_dict(state)
        assert (averager.steps, differing(before, averager.merged_weights())) == (4, [])


# ---- without Lightning

WITHOUT = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "timm"):
    sys.modules[name] = None  # as if it were not installed
import lightning_merge
assert "torch" not in sys.modules
import torch
from lightning_merge import Averager, combiners, rules, schedules, selections, soups
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
averager = Averager(model, optimizer, rules.ExponentialMean(0.9))
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
with averager.merged():
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
models = [average, model.state_dict()]
print(averager.updates, len(combiners.Average().combine(models)), len(soups.soup(models)))
"""


def test_without_lightning_there_are_rules_combiners_soups_and_averagers() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "2", "2"], done.stderr


def test_a_loaded_average_lies_in_memory_as_one_that_was_never_saved(tmp_path: Path) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(600, 600) for _ in range(3)))

    def gaps(averager: Averager) -> list[int]:
        starts = [tensor.data_ptr() for tensor in averager.state_dict()["state"]["average"].values()]
        return [start - starts[0] for start in starts]

    module = layers()
    whole = Averager(module, sgd(module), ExponentialMean(0.9))
    torch.save(whole.state_dict(), tmp_path / "average.pt")
    resumed = Averager(module, sgd(module), ExponentialMean(0.9))
    resumed.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    assert gaps(resumed) == gaps(whole)
