"""Which layers make what a loss is taken of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, mse_loss, normalize

from lightning_merge.continual._last_layers import LossGraph


class Parts(nn.Module):
    """What heads are made of, after one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.projection = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 5)
        self.norm, self.conv, self.up = nn.BatchNorm1d(3), nn.Conv2d(8, 3, 1), nn.ConvTranspose2d(8, 3, 1)
        self.rows, self.columns = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
        self.bounded = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8, bias=False))


X, Y = torch.randn(6, 4), torch.arange(6) % 3


def contrast(m: Any, f: Tensor) -> Tensor:
    z = normalize(m.projection(f))
    return cross_entropy(z @ z.T, torch.arange(6))


def pixels(m: Any, f: Tensor) -> Tensor:
    maps = interpolate(m.conv(f[:, :, None, None].expand(-1, -1, 2, 2)), scale_factor=2, mode="bilinear")
    return cross_entropy(maps, Y[:, None, None].expand(-1, 4, 4))


# What the loss is, the layers that are found and which of them make logits, and what comes between.
LOSSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, bool], list[str]]] = {
    "linear": (lambda m, f: cross_entropy(m.head(f), Y), {"head.weight": True}, []),
    "words": (lambda m, f: cross_entropy(m.head(f.view(2, 3, 8)).flatten(0, 1), Y), {"head.weight": True}, []),
    "spectral norm": (
        lambda m, f: cross_entropy(m.bounded(m.inner(f).relu()), Y),
        {"bounded.parametrizations.weight.original": True},
        [],
    ),
    "some classes": (lambda m, f: cross_entropy(m.head(f)[:, [0, 2]], Y % 2), {"head.weight": True}, []),
    "independent classes": (
        lambda m, f: binary_cross_entropy_with_logits(m.head(f), torch.rand(6, 3)),
        {"head.weight": True},
        [],
    ),
    "own cross-entropy": (
        lambda m, f: (torch.logsumexp(m.head(f), 1) - m.head(f)[:, 0]).mean(),
        {"head.weight": True},
        [],
    ),
    "pixels": (pixels, {"conv.weight": True}, []),
    "cosine": (
        lambda m, f: cross_entropy(m.scale.exp() * (normalize(f) @ normalize(m.rows).T), Y),
        {"rows": True},
        ["scale"],
    ),
    "distances": (lambda m, f: cross_entropy(-torch.cdist(f, m.rows), Y), {"rows": True}, []),
    "weight norm": (lambda m, f: cross_entropy(m.scaled(f), Y), {"scaled.parametrizations.weight.original0": True}, []),
    "a norm after": (
        lambda m, f: cross_entropy(m.norm(m.head(f)), Y),
        {"head.weight": True},
        ["norm.weight", "norm.bias"],
    ),
    "a penalty on all": (
        lambda m, f: cross_entropy(m.head(f), Y) + sum(p.square().sum() for p in m.parameters()),
        {"head.weight": True},
        [],
    ),
    "a projection too": (
        lambda m, f: cross_entropy(m.head(f), Y) + m.projection(f).square().mean(),
        {"head.weight": True, "projection.weight": False},
        [],
    ),
    "regression": (lambda m, f: mse_loss(m.head(f), torch.zeros(6, 3)), {"head.weight": False}, []),
    "contrast": (contrast, {"projection.weight": False}, []),
    "no layer": (lambda m, f: sum(p.square().sum() for p in m.parameters()), {}, []),  # type: ignore[misc]
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_the_layers_closest_to_the_loss_are_found(loss: Any) -> None:
    make, layers, after = loss
    module = Parts()
    graph = LossGraph(make(module, module.body(X).relu()), dict(module.named_parameters()))
    assert {layer.names[0]: layer.makes_logits for layer in graph.layers} == layers
    assert graph.after_logits == after
    assert all(layer.has_rows for layer in graph.layers)


def test_classes_that_are_columns_and_a_choice_among_one_are_seen() -> None:
    module = Parts()
    features = module.body(X).relu()
    parameters = dict(module.named_parameters())
    assert not LossGraph(cross_entropy(features @ module.columns, Y), parameters).layers[0].has_rows
    maps = module.up(features[:, :, None, None])[..., 0, 0]
    assert not LossGraph(cross_entropy(maps, Y), parameters).layers[0].has_rows
    assert LossGraph(cross_entropy(module.head(features), Y), parameters).choices == 3
    assert LossGraph(cross_entropy(module.head(features)[:, :1], Y * 0), parameters).choices == 1


def test_what_the_loss_depends_on_is_known_and_a_deep_graph_is_no_matter() -> None:
    module = Parts()
    features = module.body(X)
    for _ in range(5000):
        features = features + 1e-6
    graph = LossGraph(cross_entropy(module.head(features), Y), dict(module.named_parameters()))
    assert graph.used == {"body.weight", "body.bias", "head.weight", "head.bias"}
