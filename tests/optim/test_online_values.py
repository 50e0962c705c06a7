"""OnDARE and OnTIES against numbers of the published code and of a second derivation, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_merge.optim import OnDARE, OnTIES
from lightning_merge.optim._blocks import Draw
from lightning_merge.optim._online import OnlineMerging

BASE = {"a": [[0.5, -0.4, 0.3], [0.2, -0.1, 0.6]], "b": [0.05, -0.05]}
REFERENCE = {"a": [[0.52, -0.43, 0.30], [0.16, -0.11, 0.65]], "b": [0.06, -0.07]}
GRADIENTS = [
    {"a": [0.1, 0.2, -0.3, 0.4, -0.5, 0.6], "b": [1.0, -1.0]},
    {"a": [-0.2, 0.1, 0.3, 0.0, -0.5, -0.2], "b": [0.5, 0.5]},
    {"a": [0.3, -0.1, 0.2, -0.4, 0.1, 0.1], "b": [-0.2, 0.3]},
]
MASKS = {  # by step, 0 for the task vector
    "a": ["000000", "011110", "110010", "100001"],
    "b": ["11", "11", "10", "00"],
}

CASES: list[tuple[str, type[OnlineMerging], dict[str, Any], str]] = [
    (
        "OM-0",
        OnDARE,
        {"alpha": 0.0},
        "0.5102286538 -0.4532888147 0.3063801397 0.1441581073 -0.0832414335 0.6319435695 0.0347111007 -0.0570052449",
    ),
    (
        "OM-1",
        OnDARE,
        {},
        "0.5172057884 -0.4599599332 0.3057421257 0.1337422966 -0.0889172901 0.6487492126 0.0402399906 -0.0643047204",
    ),
    (
        "OM-2",
        OnDARE,
        {"weight_decay": 0.1},
        "0.5156588314 -0.4586059206 0.3048197835 0.1333250156 -0.0886326707 0.6468090041 0.0401032888 -0.0641150012",
    ),
    (
        "OM-3",
        OnDARE,
        {"density": 0.5, "form": "official"},
        "0.5204115199 -0.4647791813 0.3179999810 0.1420000142 -0.0740000194 0.6427023463 0.0312207769 -0.0640000057",
    ),
    (
        "OM-4",
        OnDARE,
        {"density": 0.5, "form": "official", "rescale": "l1"},
        "0.5157592092 -0.4559886181 0.3134999803 0.1465000161 -0.0831027498 0.6391975390 0.0462133638 -0.0730000051",
    ),
    (
        "OM-5",
        OnDARE,
        {"density": 0.5},
        "0.5202057600 -0.4473895906 0.3089999905 0.1510000071 -0.0920000097 0.6463511732 0.0456103885 -0.0670000028",
    ),
    (
        "OM-6",
        OnTIES,
        {"density": 0.5, "form": "official"},
        "0.52 -0.4509599474 0.3 0.1329694876 -0.0859172901 0.665 0.0372399906 -0.0760000000",
    ),
    (
        "OM-7",
        OnTIES,
        {"density": 0.5},
        "0.52 -0.4509599474 0.3 0.1329694876 -0.0859172901 0.6510000047 0.0372399906 -0.0760000000",
    ),
    (
        "OM-8",
        OnTIES,
        {"density": 0.5, "form": "official", "rescale": "l1"},
        "0.52 -0.4576341371 0.3 0.1190716337 -0.0710457364 0.66875 0.0255447110 -0.0790000000",
    ),
    (
        "OM-9",
        OnTIES,
        {"form": "official"},
        "0.5292949271 -0.4599599332 0.3057421257 0.1329694876 -0.1130000000 0.6650000000 0.0630000000 -0.0760000000",
    ),
    (
        "OM-10",
        OnTIES,
        {"density": 0.5, "alpha": 0.0, "form": "official"},
        "0.52 -0.4432888305 0.3 0.1432994307 -0.0832414335 0.65 0.0347111007 -0.0700000000",
    ),
]


class PublishedAdam(torch.optim.Optimizer):
    """Adam that adds epsilon before correcting the bias, as the published code does; decoupled decay."""

    def __init__(self, params: Any, weight_decay: float) -> None:
        settings = {"lr": 1e-2, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["weight_decay"] == 0, "the wrapper takes decoupled decay out of the update"
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
                state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                rate = group["lr"] * (1 - 0.999 ** state["step"]) ** 0.5 / (1 - 0.9 ** state["step"])
                p.addcdiv_(state["m"], state["v"].sqrt() + 1e-8, value=-rate)


def weights(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def recorded(self: Draw, density: float, block: int, start: int, stop: int, dtype: torch.dtype = torch.bool) -> Tensor:
    _, step, name = self.key.split("/")
    return torch.tensor([bit == "1" for bit in MASKS[name][int(step)]])[start:stop].to(dtype)


def run(method: type[OnlineMerging], base: Any, settings: dict[str, Any]) -> Tensor:
    parameters = {name: torch.nn.Parameter(value) for name, value in weights(REFERENCE).items()}
    optimizer = method(base(parameters.items()), weights(REFERENCE), weights(BASE), **settings)
    for gradients in GRADIENTS:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name], dtype=torch.float64).view_as(parameter)
        optimizer.step()
    return torch.cat([p.detach().view(-1) for p in parameters.values()])


@pytest.mark.parametrize(("method", "settings", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_three_steps_give_the_published_numbers(
    method: type[OnlineMerging], settings: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method is OnDARE:
        monkeypatch.setattr(Draw, "keep", recorded)
    settings = {"density": 1.0, "alpha": 0.1, **settings}
    decay = settings.pop("weight_decay", 0.0)
    found = run(method, lambda named: PublishedAdam(named, decay), settings)
    assert torch.allclose(
        found, torch.tensor([float(x) for x in expected.split()], dtype=torch.float64), rtol=0, atol=6e-11
    ), found.tolist()
