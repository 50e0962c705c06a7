"""Part: one update and one exchange, by the optimizer's own hooks, beside the limit and beside others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from _device._averages import DECAY, ema_pytorch_update, lightning_update, timm_update, torch_update
from _device._models import Batches, InFit, OneSum, net, stack, trainer
from _device._session import Session
from _device._waits import waits_of
from lightning_merge import callbacks as ours
from lightning_merge.rules import ExponentialMean
from lightning_merge.weights import clone, exchange, named_parameters, put_back


def updates(session: Session) -> None:
    """Models of four sizes; the last one in bf16."""
    wide, deep = (16, 2) if session.tiny else (1864, 24)
    cases: dict[str, Callable[[], nn.Module]] = {
        "ResNet-50": lambda: net(session, "resnet50"),
        "ViT-B": lambda: net(session, "vit_base_patch16_224"),
        "ViT-B, bf16": lambda: net(session, "vit_base_patch16_224").to(torch.bfloat16),
        "1 B parameters": lambda: stack(session, wide, deep),
    }
    for what, make in cases.items():
        with session.guarded(what):
            _fit(session, what, make(), {"hook of EMA": ours.EMA(decay=DECAY)})
    with session.guarded("ResNet-50, average on the host"):
        average = ours.EMA(decay=DECAY, device="cpu")
        _fit(session, "ResNet-50, average on the host", net(session, "resnet50"), {"hook of EMA": average})


def _fit(session: Session, what: str, model: nn.Module, average: dict[str, Any]) -> None:
    measure = InFit(session, what, lambda run, module: _measure(session, what, run, module.net))
    one = Batches(torch.zeros(1, device=session.device), 2)
    trainer(session, [measure, *average.values()], max_epochs=1).fit(OneSum(model), one)


@torch.no_grad()
def _measure(session: Session, what: str, run: Any, model: nn.Module) -> None:
    (optimizer,) = run.optimizers
    live = dict(named_parameters(model))
    rule, numbers = ExponentialMean(DECAY), sum(tensor.numel() for tensor in live.values())
    state, other = rule.init(live), clone(live)
    flat = torch.randn(2, numbers, device=session.device)

    def hooks() -> None:
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            hook(optimizer, (), {})

    def swap() -> None:
        put_back(live, exchange(live, {name: other[name].to(t) for name, t in live.items()}))

    work: dict[str, Callable[[], Any]] = {
        "limit: a flat lerp_": lambda: flat[0].lerp_(flat[1], 1 - DECAY),
        "a flat read": lambda: torch.linalg.vector_norm(flat[1]),
        "rule alone": lambda: rule.update(state, live),
        "hooks of the step": hooks,
        "timm": timm_update(model),
        "torch swa_utils": torch_update(model),
        "Lightning": lightning_update(model),
    }
    if (theirs := ema_pytorch_update(model)) is not None:
        work["ema-pytorch"] = theirs
    waits = {name: waits_of(function, session.cuda) for name, function in work.items()}
    found = session.timed(work, 20, 4.0)
    limit = found["limit: a flat lerp_"]
    table = {
        name: {"device ms": v["device"], "x limit": v["device"] / limit["device"], "host ms": v["host"]}
        | {"waits": waits[name]}
        for name, v in found.items()
    }
    session.say(what, numbers=numbers, tensors=len(live), table=table)
    moved = session.timed({"exchange": swap}, 20, 2.0)["exchange"]
    session.say(f"{what}, exchange and back", us_per_tensor=1e3 * moved["wall"] / len(live))
