"""Wrapped optimizers of parameters that are loaded, unfrozen, added or assigned after the wrapper was made."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_merge.optim import Lookaround, OnDARE, OnTIES, Subspace
from lightning_merge.selections import Selection

DATA = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    numbers = torch.Generator().manual_seed(1)
    made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=numbers) / 2
    return made


def load(model: nn.Sequential, optimizer: Any) -> None:
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


def add(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.add_param_group({"params": list(model[0].parameters())})


def assign(model: nn.Sequential, optimizer: Any) -> None:
    first = optimizer.param_groups[0]
    rest = {key: value for key, value in first.items() if key != "params"}
    optimizer.param_groups = [first, {**rest, "params": list(model[0].parameters())}]


def unfreeze(model: nn.Sequential, optimizer: Any) -> None:
    model[0].requires_grad_(True)


LATE: dict[str, tuple[int, Callable[[nn.Sequential, Any], None]]] = {
    "loaded": (0, load),
    "added": (4, add),
    "assigned": (4, assign),
    "unfrozen": (4, unfreeze),
}


def train(how: str, wrap: Callable[[nn.Sequential, torch.optim.Optimizer], Any], repeat: int = 1) -> dict[str, Tensor]:
    """Eight batches, each of them ``repeat`` times; something happens on the way."""
    model = net()
    when, happens = LATE[how]
    model[0].requires_grad_(how != "unfrozen")
    parameters = model[1].parameters() if how in ("added", "assigned") else model.parameters()
    optimizer = wrap(model, torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    for number, batch in enumerate(DATA):
        if number == when:
            happens(model, optimizer)
        for _ in range(repeat):
            model.zero_grad()
            (model(batch) - 1).square().mean().backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("how", LATE)
def test_branches_on_the_same_batches_are_the_wrapped_optimizer(how: str) -> None:
    plain = train(how, lambda model, base: base)
    branched = train(how, lambda model, base: Lookaround(base, branches=2, every_n_steps=2), repeat=2)
    for name, tensor in plain.items():
        torch.testing.assert_close(branched[name], tensor)


@pytest.mark.parametrize("kind", [OnDARE, OnTIES])
@pytest.mark.parametrize("how", ["added", "assigned", "unfrozen"])
def test_what_comes_late_gets_its_task_vector(how: str, kind: Any) -> None:
    pretrained = {name: tensor - 0.5 for name, tensor in net().state_dict().items()}

    def wrap(model: nn.Sequential, base: torch.optim.Optimizer) -> Any:
        made = kind(base, reference=net(), pretrained=pretrained, module=model, alpha=0.2)
        wrapped.append(made)
        return made

    wrapped: list[Any] = []
    merged, plain = train(how, wrap), train(how, lambda model, base: base)
    assert sorted(wrapped[0].tau) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert not torch.allclose(merged["0.weight"], plain["0.weight"], atol=1e-3)


def test_several_evaluations_in_a_step_are_refused_by_name() -> None:
    class WantsAClosure(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    class InTwo(torch.optim.SGD):
        def first_step(self) -> None: ...

        def second_step(self) -> None: ...

    for kind in (torch.optim.LBFGS, WantsAClosure, InTwo):
        with pytest.raises(ValueError, match=kind.__name__):
            Lookaround(kind(net().parameters(), lr=0.1))


def test_a_subspace_takes_sparse_gradients_and_refuses_what_has_no_basis() -> None:
    weights = {"w": torch.zeros(3, 2)}
    found = []
    for sparse in (False, True):
        subspace = Subspace(weights, 2)
        for number in (1.0, 2.0):
            subspace.collect({"w": torch.full((3, 2), number)})
        subspace.begin(weights)
        gradient = torch.ones(3, 2)
        subspace.step(weights, {"w": gradient.to_sparse() if sparse else gradient}, 0.1)
        found.append(weights["w"].clone())
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="`w` holds a NaN"):
        Subspace(weights, 2).collect({"w": torch.full((3, 2), float("nan"))})
    with pytest.raises(ValueError, match="`c` holds complex numbers"):
        Subspace({"c": torch.zeros(2, dtype=torch.complex64)}, 2)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_without_a_match_lists_near_names(argument: str) -> None:
    model = nn.ModuleDict({"net": nn.ModuleDict({"head": nn.Linear(2, 1), "body": nn.Linear(2, 2)})})
    patterns = ("*", "head.*") if argument == "include" else ("head.*",)
    with pytest.raises(ValueError, match=rf"`{argument}` has the pattern 'head.\*'.*near ones are: net.head.weight"):
        Selection(**{argument: patterns}).parameters(model)
