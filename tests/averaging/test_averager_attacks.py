"""``Averager`` where the model, the optimizer or the block around it is not what it was made with."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_merge import Averager
from lightning_merge.rules import ExponentialMean, Mean, Rule, ValleyMean, WindowMean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).to(dtype)


def step(module: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    dtype = next(module.parameters()).dtype
    module(torch.randn(16, 4, dtype=dtype)).square().mean().backward()
    optimizer.step()


def made(**options: Any) -> tuple[nn.Sequential, Optimizer, Averager]:
    module = net()
    optimizer = SGD(module.parameters(), lr=0.1)
    return module, optimizer, Averager(module, optimizer, ExponentialMean(0.5), **options)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _loaded(module: nn.Sequential, optimizer: Optimizer) -> None:
    module.load_state_dict({name: tensor + 1 for name, tensor in values(module).items()})


def _written(module: nn.Sequential, optimizer: Optimizer) -> None:
    module[0].weight.data.normal_()  # which no version counter notices


def _with_another_head(module: nn.Sequential, optimizer: Optimizer) -> None:
    module[3] = nn.Linear(8, 2)
    optimizer.param_groups[0]["params"][-2:] = list(module[3].parameters())


def _in_another_precision(module: nn.Sequential, optimizer: Optimizer) -> None:
    module.double()


@pytest.mark.parametrize("change", [_loaded, _written, _with_another_head, _in_another_precision])
def test_an_average_starts_where_training_does(change: Callable[[nn.Sequential, Optimizer], None]) -> None:
    module, optimizer, averager = made()
    change(module, optimizer)
    before = values(module)
    step(module, optimizer)
    merged = averager.merged_weights() or {}
    for name, now in module.named_parameters():
        assert merged[name].dtype == now.dtype
        assert torch.allclose(merged[name], before[name].lerp(now, 0.5), atol=1e-6), name


def test_a_model_that_the_optimizer_steps_no_more_is_refused_at_the_first_step() -> None:
    module, optimizer, _ = made()
    module.load_state_dict(values(module), assign=True)
    with pytest.raises(ValueError, match="`optimizer` must step parameters of Sequential"):
        step(module, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_that_is_called_in_inference_mode_ends_training(dtype: torch.dtype) -> None:
    module = net(dtype)
    optimizer = SGD(module.parameters(), lr=0.1)
    with torch.inference_mode():
        averager = Averager(module, optimizer, ExponentialMean(0.5))
    step(module, optimizer)
    with torch.inference_mode():
        with averager.merged():
            module(torch.randn(4, 4, dtype=dtype))
        averager.load_state_dict(averager.state_dict())
    step(module, optimizer)
    with torch.inference_mode():
        averager.publish()
    step(module, optimizer)


def test_an_average_that_nobody_holds_is_gone_and_its_hooks_with_it() -> None:
    module, optimizer, averager = made()
    step(module, optimizer)
    alive = weakref.ref(averager._loop)
    del averager
    gc.collect()
    assert alive() is None
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    step(module, optimizer)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_that_would_count_no_steps_is_refused(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="an Averager cannot be copied or pickled"):
        copied(made()[2])


class Halving(Optimizer):
    """Does more after the step of the optimizer that it is around, as Lookahead does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(0.5)


def test_weights_are_taken_in_after_the_whole_step_of_an_optimizer_around_another() -> None:
    module = net()
    optimizer = Halving(SGD(module.parameters(), lr=0.1))
    averager = Averager(module, optimizer, WindowMean(1))
    step(module, optimizer)
    assert averager.steps == 1
    assert torch.equal((averager.merged_weights() or {})["0.weight"], module[0].weight)


def _another_optimizer(module: nn.Sequential) -> None:
    step(module, SGD(module[3].parameters(), lr=0.1))


def _initialised(module: nn.Sequential) -> None:
    nn.init.zeros_(module[0].weight)


@pytest.mark.parametrize("write", [_another_optimizer, _initialised, lambda m: m.load_state_dict(values(m))])
def test_a_write_to_the_average_itself_is_refused(write: Callable[[nn.Sequential], Any]) -> None:
    module, optimizer, averager = made()
    step(module, optimizer)
    raw = values(module)
    with pytest.raises(RuntimeError, match=r"weight` was written to inside of `merged\(\)`"), averager.merged():
        write(module)
    assert torch.equal(module[0].weight, raw["0.weight"])


def test_publishing_what_the_block_would_undo_is_refused() -> None:
    module, optimizer, averager = made()
    step(module, optimizer)
    with pytest.raises(RuntimeError, match=r"leave the block first"), averager.merged():
        averager.publish()


def test_what_was_averaged_once_stays_so_in_a_resumed_run_that_has_it_frozen() -> None:
    module, optimizer, averager = made(selection=Selection(trainable=True))
    step(module, optimizer)
    again = net()
    again.load_state_dict(module.state_dict())
    again[0].requires_grad_(False)
    resumed = Averager(
        again, SGD(again.parameters(), lr=0.1), ExponentialMean(0.5), selection=Selection(trainable=True)
    )
    assert "0.weight" not in (resumed.merged_weights() or {})
    resumed.load_state_dict(averager.state_dict())
    assert torch.equal((resumed.merged_weights() or {})["0.weight"], (averager.merged_weights() or {})["0.weight"])


RULES: list[Rule] = [Mean(), ExponentialMean(0.5), WindowMean(3), ValleyMean()]


@pytest.mark.parametrize("now", RULES, ids=repr)
def test_a_state_of_another_rule_is_refused_by_both_names_and_changes_nothing(now: Rule) -> None:
    module = net()
    optimizer = SGD(module.parameters(), lr=0.1)
    averages = {rule: Averager(module, optimizer, rule) for rule in RULES if rule != now}
    own = Averager(module, optimizer, now)
    step(module, optimizer)
    before = copy.deepcopy(own.state_dict())
    for rule, other in averages.items():
        words = f"the average by {type(now).__name__} cannot go on from the state of {type(rule).__name__}"
        with pytest.raises(ValueError, match=words):
            own.load_state_dict(other.state_dict())
    assert str(own.state_dict()) == str(before)
    own.load_state_dict(before)


def test_other_settings_of_a_rule_and_a_state_without_an_average_go_on() -> None:
    module, optimizer, averager = made()
    step(module, optimizer)
    with pytest.warns(UserWarning, match="goes on from a state of ExponentialMean"):
        Averager(module, optimizer, ExponentialMean(0.9)).load_state_dict(averager.state_dict())
    empty = Averager(module, optimizer, ExponentialMean(0.5), EveryNSteps(start=9)).state_dict()
    mean = Averager(module, optimizer, Mean(), EveryNSteps(start=9))
    with pytest.warns(UserWarning, match="goes on from a state of ExponentialMean"):
        mean.load_state_dict(empty)
    step(module, optimizer)
    assert (mean.updates, mean.steps) == (0, 1)


def test_an_optimizer_that_is_made_anew_gets_an_average_that_goes_on() -> None:
    module, optimizer, averager = made()
    step(module, optimizer)
    other = torch.optim.Adam(module.parameters())
    again = Averager(module, other, ExponentialMean(0.5))
    again.load_state_dict(averager.state_dict())
    step(module, other)
    assert (averager.steps, again.steps) == (1, 2)
    assert again.health()["merged/start_share"] == 0.25
