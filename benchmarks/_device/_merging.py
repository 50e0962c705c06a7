"""Parts: combiners of eight vectors, and steps of the online optimizers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _device._models import net
from _device._session import Session
from _device._waits import waits_of
from lightning_merge.combiners import DARE, TIES, Average, Breadcrumbs, MagMax, ModelStock, Sum
from lightning_merge.optim import OnDARE, OnTIES

TASKS = 8


@torch.no_grad()
def combiners(session: Session) -> None:
    """Eight vectors at once, and as a stream."""
    shapes = {name: p.shape for name, p in net(session, "vit_base_patch16_224").named_parameters()}
    tasks = [{n: torch.randn(s, device=session.device) * 1e-3 for n, s in shapes.items()} for _ in range(TASKS)]
    flat = torch.randn(TASKS, sum(t.numel() for t in tasks[0].values()), device=session.device)
    work: dict[str, Callable[[], Any]] = {
        "limit: read 8, write 1": lambda: torch.sum(flat, 0),
        "read 8": lambda: torch.linalg.vector_norm(flat),
    }
    for rule in (Sum(0.3), Average(), MagMax(), TIES(0.2), DARE(Sum(0.3)), Breadcrumbs(), ModelStock()):
        name = type(rule).__name__
        work[name] = lambda rule=rule: rule.combine(tasks)
        work[f"{name}, stream"] = lambda rule=rule: rule.combine(iter(tasks))
    _each(session, "eight vectors of ViT-B", work, "limit: read 8, write 1", "wall")


def online(session: Session) -> None:
    """A step of the size of GPT-2 small around fused AdamW."""
    generator = torch.Generator(device=session.device).manual_seed(0)

    def normal(shape: Any, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=session.device) * scale

    shapes = _gpt2(2, 32, 100) if session.tiny else _gpt2(12, 768, 50257)
    parameters = {name: nn.Parameter(normal(shape, 0.02)) for name, shape in shapes.items()}
    for parameter in parameters.values():
        parameter.grad = normal(parameter.shape, 1e-3)
    fused = torch.optim.AdamW(list(parameters.items()), lr=1e-6, weight_decay=0.0, fused=True)
    fused.step()
    work: dict[str, Callable[[], Any]] = {"AdamW, fused": fused.step}
    reference = {name: p.detach() for name, p in parameters.items()}
    for method in (OnDARE, OnTIES):
        for density in (0.5, 0.01):
            with session.guarded(f"{method.__name__}, density {density}"):
                pretrained = {name: p - normal(p.shape, 1e-3) for name, p in reference.items()}
                wrapped = method(fused, reference, pretrained, density, 5e-7)
                work[f"{method.__name__}, density {density}"] = wrapped.step
    _each(session, f"a step of {sum(p.numel() for p in reference.values())} parameters", work, "AdamW, fused", "device")


def _gpt2(layers: int, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width), "wpe": (1024, width)}
    sizes = {"ln_1": (1,), "attn.qkv": (1, 3), "attn.proj": (1, 1), "ln_2": (1,), "mlp.fc": (1, 4), "mlp.proj": (4, 1)}
    for layer in range(layers):
        for name, size in sizes.items():
            shape = tuple(width * each for each in size)
            found |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[-1:]}
    return found


def _each(session: Session, what: str, work: dict[str, Callable[[], Any]], limit: str, column: str) -> None:
    """One after the other, so that those that come first are measured if time is short."""
    found: dict[str, dict[str, Any]] = {}
    try:
        for name, function in work.items():
            with session.guarded(f"{what}, {name}"):
                waits = waits_of(function, session.cuda)
                beside = {limit: work[limit], name: function}
                times = session.timed(beside, 8, 2.0)
                over = times[name][column] / times[limit][column]
                found[name] = {"ms": times[name][column], "x": over, "waits": waits}
    finally:  # what there is, also when time is over
        session.say(what, beside=limit, table=found)
