"""Statistics of BatchNorm layers, measured again without leaving a trace."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from processes import launch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_merge import _moments
from lightning_merge.calibration import batch_norm_layers, recalibrated_statistics

RAGGED = [torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([[10.0], [14.0]])]


class Net(nn.Module):
    """Every kind of state that a pass over the training data could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(4, 3, 1)
        self.act = BatchNormAct2d(3)
        self.accuracy = torchmetrics.MeanMetric()
        self.seen = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.second(self.drop(self.norm(self.conv(x)))))
        for metric in (self.accuracy, self.seen, self.both):
            metric.update(y.detach().mean())
        self.calls += 1
        self.last = y.detach().mean()[None]
        return y


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(*sizes: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 6, 6, generator=generator) + size for size in sizes]


def everything(module: nn.Module) -> dict[str, object]:
    """All that must be the same after the pass, in a form that ``==`` compares."""
    metrics = {name: m.metric_state for name, m in module.named_modules() if isinstance(m, torchmetrics.Metric)}
    states = {f"{name}.{key}": copy.deepcopy(value) for name, m in metrics.items() for key, value in m.items()}
    counts = {name: m._update_count for name, m in module.named_modules() if isinstance(m, torchmetrics.Metric)}
    return {
        "modes": {name: m.training for name, m in module.named_modules()},
        "buffers": {name: (id(b), b.tolist()) for name, b in module.named_buffers()},
        "parameters": {name: (id(p), p.tolist()) for name, p in module.named_parameters()},
        "metrics": {key: torch.as_tensor(value).tolist() if value != [] else [] for key, value in states.items()},
        "updates": counts,
        "hooks": [len(m._forward_pre_hooks) for m in module.modules()],
    }


def random_states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def test_batches_count_by_size_and_variance_between_batches_counts():
    layer = nn.BatchNorm1d(1).double()
    result = recalibrated_statistics(layer, [batch.double() for batch in RAGGED], layer)
    assert result["running_mean"].item() == pytest.approx(6.0, abs=1e-12)
    assert result["running_var"].item() == pytest.approx(27.2, abs=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm1d(3), (3, 5)),
        (nn.BatchNorm2d(3), (3, 4, 5)),
        (nn.BatchNorm3d(3), (3, 2, 4, 5)),
        (nn.SyncBatchNorm(3), (3, 4, 5)),
        (BatchNormAct2d(3), (3, 4, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(len(value)),
)
@pytest.mark.parametrize("chunk", [2**23, 64, 1], ids="chunks of {}".format)
def test_statistics_are_those_of_all_values_at_once(layer, shape, chunk, monkeypatch):
    monkeypatch.setattr(_moments, "_CHUNK", chunk)
    torch.manual_seed(0)
    batches = [1000 + torch.randn(size, *shape) * (size + 1) for size in (4, 2, 3)]
    result = recalibrated_statistics(layer, batches, layer)
    values = torch.cat(batches).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(result["running_mean"], values.mean(1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result["running_var"], values.var(1).float(), rtol=1e-6, atol=0)


class Widened(TorchDispatchMode):
    """Notes the size of the largest tensor that is made in float64."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("shape", [(1000, 4), (50, 4, 25), (2, 4, 30, 30)], ids=str)
def test_activations_are_widened_a_chunk_at_a_time(shape, monkeypatch):
    monkeypatch.setattr(_moments, "_CHUNK", 128)
    layer = nn.BatchNorm2d(4) if len(shape) == 4 else nn.BatchNorm1d(4)
    with Widened() as widened:
        recalibrated_statistics(layer, [torch.randn(shape)], layer)
    assert 64 < widened.largest <= 128


def test_channels_last_and_half_precision_are_measured_in_float64():
    layer = nn.BatchNorm2d(3)
    batch = (torch.randn(8, 3, 5, 5) + 100).bfloat16()
    plain = recalibrated_statistics(layer, [batch.double()], layer.double())
    layer.float()
    strided = recalibrated_statistics(layer, [batch.to(memory_format=torch.channels_last)], layer)
    assert strided["running_var"].dtype == torch.float32
    torch.testing.assert_close(strided["running_var"].double(), plain["running_var"], rtol=1e-6, atol=0)


def test_deeper_layers_see_what_training_would_show_them_without_dropout():
    module, batches = net(), images(8, 8)
    result = recalibrated_statistics(module, batches, module)
    reference = copy.deepcopy(module)
    reference.drop.p = 0.0
    inputs: list[Tensor] = []
    reference.act.register_forward_pre_hook(lambda layer, args: inputs.append(args[0].detach()))
    for batch in batches:
        reference(batch)  # in train mode
    values = torch.cat(inputs).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(result["act.running_mean"], values.mean(1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result["act.running_var"], values.var(1).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["from train mode", "from eval mode"])
def test_module_is_left_as_it_was(training):
    module = net().train(training)
    module(images(5)[0])  # so that metrics and buffers hold something
    module.drop.train(not training)
    before = everything(module)
    recalibrated_statistics(module, images(4, 3), module)
    assert everything(module) == before


def test_module_is_left_as_it_was_after_an_exception():
    module = net()
    module(images(5)[0])
    before, states = everything(module), random_states()

    def fail(batch: Tensor) -> None:
        module(batch)
        random.random()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        recalibrated_statistics(module, images(4), fail)
    assert everything(module) == before
    assert random_states() == states


def test_metrics_go_on_where_they_were():
    module, undisturbed = net(), net()
    for each in (module, undisturbed):
        torch.manual_seed(3)  # for dropout
        each(images(5)[0])
        if each is module:
            recalibrated_statistics(module, images(4, 3), module)
        each(images(5, seed=2)[0])
    assert module.accuracy.compute() == undisturbed.accuracy.compute()
    assert torch.equal(module.seen.compute(), undisturbed.seen.compute())
    assert module.both.compute() == undisturbed.both.compute()


def test_metric_state_made_in_inference_mode_is_put_back():
    module = net()
    module.validation = torchmetrics.MeanMetric()
    with torch.inference_mode():
        module.validation.reset()
        module.validation.update(torch.tensor(3.0))
    recalibrated_statistics(module, images(4), module)
    assert module.validation.mean_value.is_inference()
    assert module.validation.compute() == 3.0


def test_attribute_that_a_metric_gets_in_the_pass_is_taken_away():
    module = net()

    def forward(batch: Tensor) -> None:
        module(batch)
        module.accuracy.mode = "found out from the data"

    recalibrated_statistics(module, images(4), forward)
    assert not hasattr(module.accuracy, "mode")


def draw_everywhere() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_random_numbers_are_fixed_inside_and_untouched_outside():
    layer, drawn = nn.BatchNorm1d(1), []

    def forward(batch: Tensor) -> None:
        drawn.append(draw_everywhere())
        layer(batch)

    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        states = random_states()
        recalibrated_statistics(layer, RAGGED, forward)
        assert random_states() == states
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_shuffled_loader_is_iterated_under_the_fixed_seed():
    layer, orders = nn.BatchNorm1d(1), []
    loader = torch.utils.data.DataLoader(torch.arange(6.0)[:, None], batch_size=6, shuffle=True)

    def forward(batch: Tensor) -> None:
        orders.append(batch.flatten().tolist())
        layer(batch)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in range(2):
        recalibrated_statistics(layer, loader, forward)
    assert orders[0] == orders[1]
    assert torch.equal(torch.rand(3), expected)


def test_statistics_measured_within_inference_mode_can_be_trained_with():
    module = net()
    with torch.inference_mode():
        result = recalibrated_statistics(module, images(4), module)
    assert not any(tensor.is_inference() for tensor in result.values())
    module.load_state_dict(result, strict=False)
    module.eval()(images(4)[0]).sum().backward()


def test_no_gradient_is_kept():
    module = net()

    def forward(batch: Tensor) -> None:
        assert not module(batch.requires_grad_()).requires_grad

    assert not any(t.requires_grad for t in recalibrated_statistics(module, images(4), forward).values())


def test_batch_of_one_value_counts_and_does_not_raise():
    layer = nn.BatchNorm1d(1).double()
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[7.0]])]
    outputs: list[Tensor] = []
    result = recalibrated_statistics(layer, [b.double() for b in batches], lambda batch: outputs.append(layer(batch)))
    assert result["running_mean"].item() == pytest.approx(3.0, abs=1e-12)
    assert result["running_var"].item() == pytest.approx(13.0, abs=1e-12)
    # It is normalised by what was seen so far: mean 3, variance 26 / 3.
    assert outputs[1].item() == pytest.approx(4 / (26 / 3 + 1e-5) ** 0.5, abs=1e-12)


def test_empty_batch_changes_nothing():
    layer = nn.BatchNorm1d(1)
    batches = [RAGGED[0], torch.empty(0, 1), torch.empty(2, 1, 0), RAGGED[1]]
    result = recalibrated_statistics(layer, batches, layer)
    assert result["running_mean"].item() == pytest.approx(6.0)


def test_layer_that_was_not_reached_is_left_out():
    module = nn.ModuleDict({"used": nn.BatchNorm1d(1), "unused": nn.BatchNorm1d(1)})
    result = recalibrated_statistics(module, RAGGED, module["used"])
    assert list(result) == ["used.running_mean", "used.running_var"]


def test_layer_that_is_used_twice_counts_both():
    layer = nn.BatchNorm1d(1)
    module = nn.ModuleDict({"first": layer, "again": layer})

    def forward(batch: Tensor) -> None:
        module["first"](batch)
        module["again"](batch + 2)

    result = recalibrated_statistics(module, [RAGGED[1]], forward)
    assert list(result) == ["first.running_mean", "first.running_var"]
    assert result["first.running_mean"].item() == pytest.approx(13.0)


def test_input_given_by_keyword_is_measured():
    layer = nn.BatchNorm1d(1)
    assert recalibrated_statistics(layer, RAGGED, lambda b: layer(input=b))["running_mean"].item() == pytest.approx(6.0)


def test_only_layers_with_running_statistics_are_measured():
    module = nn.ModuleDict(
        {
            "kept": nn.BatchNorm1d(1),
            "without": nn.BatchNorm1d(1, track_running_stats=False),
            "instance": nn.InstanceNorm1d(1, track_running_stats=True),
            "sync": nn.SyncBatchNorm(1),
            "timm": BatchNormAct2d(1),
            "metric": torchmetrics.MeanMetric(),
        }
    )
    module["metric"].inner = nn.BatchNorm1d(1)  # as the network that some image metrics bring along
    module["kept"].inner = torch.compile(nn.BatchNorm2d(1))
    assert list(batch_norm_layers(module)) == ["kept", "kept.inner", "sync", "timm"]


def test_layer_frozen_in_eval_mode_is_left_alone():
    module = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    module[0].eval()
    outputs: list[Tensor] = []
    module[0].register_forward_hook(lambda layer, args, output: outputs.append(output))
    result = recalibrated_statistics(module, RAGGED, module)
    assert list(result) == ["1.running_mean", "1.running_var"]
    torch.testing.assert_close(outputs[0], RAGGED[0], rtol=1e-4, atol=0)  # its own mean 0 and variance 1 still hold
    module.eval()  # a whole module in eval mode says nothing about single layers
    assert list(batch_norm_layers(module)) == ["0", "1"]


def test_no_batch_is_an_error_with_the_cure():
    with pytest.raises(ValueError, match=r"`batches` is empty, but Net .*`norm`.*at least one.*buffers='copy'"):
        recalibrated_statistics(net(), [], print)


def test_module_without_such_layers_needs_no_pass():
    def fail(batch: Tensor) -> None:
        raise AssertionError("ran")

    assert recalibrated_statistics(nn.Linear(1, 1), [torch.zeros(1)], fail) == {}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "wrapped"])
def test_compiled_module_is_measured_and_not_compiled_again(in_place):
    batches, plain, module, graphs = images(4, 4), net(), net(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    if in_place:
        module.conv.compile(backend=backend)
        module.norm.compile(backend=backend)
    else:
        module.conv = torch.compile(module.conv, backend=backend)
        module.norm = torch.compile(module.norm, backend=backend)
    module(batches[0])
    if in_place and not graphs:
        pytest.skip("this version of torch does not compile a built-in layer in place")
    assert len(graphs) == 2
    expected = recalibrated_statistics(plain, batches, plain)
    result = recalibrated_statistics(module, batches, module)
    module(batches[0])
    if in_place and not graphs:
        pytest.skip("this version of torch does not compile a built-in layer in place")
    assert len(graphs) == 2
    assert list(result) == list(expected)
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name])


def pool(root: Path) -> dict[str, Any]:
    """What one of two processes gets."""
    dist.init_process_group("gloo")
    found = {}
    for layer in (nn.BatchNorm1d, nn.SyncBatchNorm):
        module = nn.Sequential(layer(1), nn.BatchNorm1d(1), nn.BatchNorm1d(2)).double()
        found[layer.__name__] = recalibrated_statistics(module, [RAGGED[dist.get_rank()].double()], module[:2])
    layer = nn.BatchNorm1d(1)
    found["uneven"] = recalibrated_statistics(layer, [] if dist.get_rank() else RAGGED, layer)
    with pytest.raises(ValueError, match="`batches` is empty"):
        recalibrated_statistics(layer, [], layer)
    return found


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = launch(2, pool, tmp_path_factory.mktemp("pooled"))
    assert first == second
    return second


@pytest.mark.multiprocess
@pytest.mark.parametrize("layer", ["BatchNorm1d", "SyncBatchNorm"])
def test_processes_pool_what_they_saw(pooled, layer):
    result = pooled[layer]
    assert list(result) == ["0.running_mean", "0.running_var", "1.running_mean", "1.running_var"]
    assert result["0.running_mean"].item() == pytest.approx(6.0, abs=1e-12)
    assert result["0.running_var"].item() == pytest.approx(27.2, abs=1e-12)
    # What the second layer sees: SyncBatchNorm normalises by the batches of all processes together.
    together = [torch.cat(RAGGED).double()] if layer == "SyncBatchNorm" else [batch.double() for batch in RAGGED]
    normal = torch.cat([(part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt() for part in together])
    assert result["1.running_var"].item() == pytest.approx(normal.var().item(), rel=1e-12)


@pytest.mark.multiprocess
def test_process_without_a_batch_gets_what_the_others_saw(pooled):
    assert pooled["uneven"]["running_var"].item() == pytest.approx(27.2)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_a_scripted_layer_is_measured_too(momentum: float | None):
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(), nn.BatchNorm1d(4))
    scripted = torch.jit.script(plain)
    batches = [torch.randn(8, 3) + shift for shift in range(3)]
    expected = recalibrated_statistics(plain, batches, plain)
    before = {name: tensor.clone() for name, tensor in scripted.state_dict().items()}
    found = recalibrated_statistics(scripted, batches, scripted)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # Deviations about the mean of all values are weighted by n - 1 values of a batch here, by n there.
        torch.testing.assert_close(tensor, expected[name], rtol=0.2, atol=1e-5)
        if name.endswith("mean") and name.startswith("1"):
            torch.testing.assert_close(tensor, expected[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in scripted.state_dict().items())


def test_a_lazy_layer_that_has_not_run_is_left_out():
    module = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d())
    module[0](torch.randn(4, 2))
    assert recalibrated_statistics(module, RAGGED, lambda batch: module[0](batch.expand(-1, 2))).keys() == {
        "0.running_mean",
        "0.running_var",
    }


def test_a_forward_pass_may_need_gradients():
    layer = nn.BatchNorm1d(1)

    def forward(batch: torch.Tensor) -> None:
        with torch.enable_grad():
            given = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(layer(given).square().sum(), given, create_graph=True)
            layer(slope)

    found = recalibrated_statistics(layer, RAGGED, forward)
    assert not any(tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_a_traced_layer_is_measured_by_the_momentum_in_its_graph(momentum: float | None):
    batches = [torch.randn(4, 3) + n for n in range(3)]
    layers = [torch.jit.trace(nn.BatchNorm1d(3, momentum=momentum), batches[0], check_trace=False)]
    layers.append(torch.jit.script(nn.BatchNorm1d(3, momentum=momentum)))
    traced, scripted = (recalibrated_statistics(net, batches, net) for net in map(nn.Sequential, layers))
    assert traced.keys() == scripted.keys() != set()
    for name in traced:
        torch.testing.assert_close(traced[name], scripted[name])


def test_a_layer_traced_in_eval_mode_is_frozen():
    layer = torch.jit.trace(nn.BatchNorm1d(3).eval(), torch.randn(4, 3))
    assert not batch_norm_layers(nn.Sequential(layer))
