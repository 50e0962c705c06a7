"""Modules that are linear in their weights."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_merge.tangent import linearize


def moved(module: nn.Module, by: float = 0.1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in module.parameters():
            each.add_(by * torch.randn(each.shape, generator=generator, dtype=each.dtype))


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
        self.tied = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.tied.weight

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        y = self.again(self.tied(self.layers(x))) * scale
        return {"logits": nn.functional.scaled_dot_product_attention(y, y, y), "size": len(x)}


def test_values_of_the_published_code() -> None:
    # LinearizedModel of tangent_task_arithmetic at 0aa0e18; each tensor is linspace(-0.6, 0.7), every second negated.
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for i, each in enumerate(net.parameters()):
            each.copy_((-1) ** i * torch.linspace(-0.6, 0.7, each.numel(), dtype=torch.float64).view_as(each))
    x = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]], dtype=torch.float64)
    linearize(net)
    torch.testing.assert_close(
        net(x),
        torch.tensor(
            [[0.27619124312801024, -0.3455388228982263], [0.6929084803030205, -1.1803009102405084]], dtype=torch.float64
        ),
        rtol=0,
        atol=1e-12,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += torch.linspace(0.1, -0.2, parameter.numel(), dtype=torch.float64).view_as(parameter)
    torch.testing.assert_close(
        net(x),
        torch.tensor(
            [[0.4610834963574816, -0.9528868047815635], [0.6863499633424599, -1.2521308219819764]], dtype=torch.float64
        ),
        rtol=0,
        atol=1e-12,
    )


def test_a_linear_network_stays_what_it_is() -> None:
    net, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    linearize(net)
    moved(net)
    torch.testing.assert_close(net(x), x @ net.weight.T + net.bias)


def test_task_vectors_add_up_in_the_outputs() -> None:
    net, x = perceptron(), torch.randn(5, 3, dtype=torch.float64)
    tangent = linearize(net)
    start, before = tangent.start, net(x)
    changes, outputs = [], []
    for seed in (1, 2):
        moved(net, 1.0, seed)
        changes.append({name: each.detach() - start[name] for name, each in net.named_parameters()})
        outputs.append(net(x) - before)
        net.load_state_dict(start)
    net.load_state_dict({name: start[name] + changes[0][name] + changes[1][name] for name in start})
    torch.testing.assert_close(net(x) - before, outputs[0] + outputs[1])


def test_gradients_are_those_at_the_start() -> None:
    net, x = perceptron(), torch.randn(5, 3, dtype=torch.float64)
    net(x).sum().backward()
    expected = [each.grad for each in net.parameters()]
    net.zero_grad()
    linearize(net)
    moved(net)
    net(x).sum().backward()
    torch.testing.assert_close([each.grad for each in net.parameters()], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_attention_ties_keywords_and_structures(mode: Any, training: bool) -> None:
    torch.manual_seed(0)
    net, x = Attention().train(training), torch.randn(2, 4, 8)
    plain = net(x, scale=2.0)
    tangent = linearize(net)
    with mode():
        same = net(x, scale=2.0)
    assert same["size"] == 2
    torch.testing.assert_close(same["logits"], plain["logits"])
    moved(net)
    with mode():
        changed = net(x)["logits"]
    step = 1e-3
    with torch.no_grad():  # the derivative, by difference quotients of the network itself, in double
        exact = copy.deepcopy(net).double()
        tangent_of_it = vars(exact).pop("forward")
        live = {name: each.clone() for name, each in exact.named_parameters()}
        ends = []
        for sign in (-1, 1):
            for name, each in exact.named_parameters():
                start = tangent_of_it.start[name].double()
                each.copy_(start + sign * step * (live[name] - start))
            ends.append(exact(x.double())["logits"])
    expected = (ends[0] + ends[1]) / 2 + (ends[1] - ends[0]) / (2 * step)
    torch.testing.assert_close(changed.double(), expected, rtol=1e-3, atol=1e-3)
    tangent.remove()
    assert "forward" not in vars(net)


def test_running_statistics_follow_the_start_and_serve_in_eval_mode() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)
        )

    x, linear, plain = torch.randn(4, 2, 4, 4), net(), net()
    linearize(linear)
    moved(linear)
    linear(x)
    plain(x)
    torch.testing.assert_close(dict(linear.named_buffers()), dict(plain.named_buffers()))
    before = {name: each.clone() for name, each in linear.named_buffers()}
    linear.eval()
    linear(x)
    torch.testing.assert_close(dict(linear.named_buffers()), before, rtol=0, atol=0)


def test_only_named_submodules_are_linear_each_as_a_whole() -> None:
    net = nn.Sequential(perceptron(), nn.Linear(2, 3).double(), perceptron())
    x = torch.randn(5, 3, dtype=torch.float64)
    tangent = linearize(net, only=["0*", "2"])
    assert tangent.parts == ("0", "2")
    assert set(tangent.start) == {name for name, _ in net.named_parameters() if not name.startswith("1.")}
    moved(net)
    expected = copy.deepcopy(net)
    torch.testing.assert_close(net(x), expected[2](expected[1](expected[0](x))))
    tangent.remove()
    assert (net(x) - expected(x)).abs().max() > 1e-6


def test_hooks_run_once_and_a_forward_of_its_own_comes_back() -> None:
    net, calls = perceptron(), []
    net.register_forward_hook(lambda *_: calls.append("hook"))
    original = net.forward
    net.forward = lambda x: original(x) + 1  # type: ignore[method-assign]
    own, x = net.forward, torch.randn(2, 3, dtype=torch.float64)
    expected = net(x)
    tangent = linearize(net)
    torch.testing.assert_close(net(x), expected)
    assert calls == ["hook", "hook"]
    tangent.remove()
    assert net.forward is own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_linear_on_their_own(copied: Any) -> None:
    net, x = perceptron(), torch.randn(5, 3, dtype=torch.float64)
    tangent = linearize(net)
    moved(net)
    other, expected = copied(net), net(x)
    tangent.remove()
    moved(net, 1.0)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_it_goes_on_from_a_start_that_is_given_in_another_type() -> None:
    net, x = perceptron(), torch.randn(5, 3, dtype=torch.float64)
    tangent = linearize(net)
    moved(net)
    expected, start = net(x), dict(tangent.start)
    tangent.remove()
    linearize(net, start=start)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    net.float()
    assert net(x.float()).dtype == torch.float32


def compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(2, 2)))


def linear() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2))
    linearize(net, only="0")
    return net


@pytest.mark.parametrize(
    ("module", "only", "start", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "1", None, r"`only` must match .* '1' matches none; there are: `0`"),
        (lambda: nn.Sequential(nn.ReLU()), None, None, "`module` must have parameters"),
        (lambda: nn.Linear(2, 2), None, {"weight": torch.zeros(2, 2)}, "`start` must be weights .*`bias`"),
        (compiled, None, None, "`module` is compiled"),
        (compiled, "0", None, "`0` is compiled"),
        (linear, None, None, "`module` is linear already"),
        (linear, "0", None, "`0` is linear already"),
    ],
)
def test_what_is_refused(module: Any, only: Any, start: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linearize(module(), only, start)


def test_a_layer_without_a_rule_is_named() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.LSTM(2, 2)))
    linearize(net)
    with pytest.raises(NotImplementedError, match=r"Sequential cannot be linearised: `1\.1: LSTM` has no forward-mode"):
        net(torch.zeros(3, 1, 2))


def test_layers_replaced_afterwards_are_named() -> None:
    net = perceptron()
    linearize(net)
    net[2] = nn.Linear(4, 5).double()
    with pytest.raises(ValueError, match=r"Sequential is not what was linearised: `2\.weight` has shape \(5, 4\)"):
        net(torch.zeros(1, 3, dtype=torch.float64))
