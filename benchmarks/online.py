"""Times a step of OnDARE and OnTIES on parameters of the size of GPT-2 small, as ratios to a fused AdamW step.

    python benchmarks/online.py --output benchmarks/results/online.json

All contestants update the same parameters and alternate in one process, so that a drift of the machine meets all alike;
figures are the lowest of all rounds, since others may use the machine: with one thread of the processor's time, else of
that on the wall. The floor is what a merged step has to do, by plain operations of torch: the fused step (7 numbers per
parameter are moved), a copy of the parameters before it (2), and a pass that reads the copy, the task vector and the
parameters and writes those (4); for OnDARE at 0.5 the drawing of 16 random bits per parameter as well. "Published
order" is a plain re-implementation of the order of operations of the published code: a mask and an add per term and
tensor, magnitudes sorted. Bytes are counted over live tensors.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _shared import clock_of, header, parser, progress, seconds, write
from torch import Tensor

from lightning_merge.optim import OnDARE, OnTIES
from lightning_merge.optim._blocks import BLOCK, Draw, blocks, within
from lightning_merge.optim._cut import find_cut
from lightning_merge.weights._held import Part

ALPHA = 5e-7


def shapes(layers: int, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Those of GPT-2; at 12, 768 and 50257 the small one, 124 million."""
    found: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width), "wpe": (1024, width)}
    for i in range(layers):
        for name, shape in {
            "ln_1": (width,),
            "attn.qkv": (width, 3 * width),
            "attn.proj": (width, width),
            "ln_2": (width,),
            "mlp.fc": (width, 4 * width),
            "mlp.proj": (4 * width, width),
        }.items():
            found |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return found | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


class PublishedOrder:
    """Adam, sparsify, add the task vector, add the update: tensor by tensor, as published."""

    def __init__(self, parameters: dict[str, Tensor], tau: dict[str, Tensor], density: float, ties: bool) -> None:
        self.parameters, self.density, self.ties = parameters, density, ties
        self.state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
        self.tau = {name: self.sparsify(t) for name, t in tau.items()}
        self.steps = 0

    def sparsify(self, values: Tensor) -> Tensor:
        if not self.ties:
            return torch.nn.functional.dropout(values, 1 - self.density)
        keep = int(self.density * values.numel())
        if keep < 1:
            return values
        order = values.abs().flatten().argsort(descending=True)
        mask = torch.zeros_like(values).flatten()
        mask[order[:keep]] = 1
        return values * mask.view_as(values)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for name, p in self.parameters.items():
            assert p.grad is not None
            first, second = self.state[name]
            first.mul_(0.9).add_(p.grad, alpha=0.1)
            second.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            rate = 1e-6 * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
            update = self.sparsify(-rate * first / second.sqrt().add_(1e-6))
            tau = self.tau[name]
            if self.ties:
                sign = (tau + update).sign()
                sign = torch.where(sign == 0, 1.0, sign)
                tau = torch.where(tau.sign() == sign, tau, 0.0)
                update = torch.where(update.sign() == sign, update, 0.0)
            p.add_(ALPHA * tau)
            p.add_((1 - ALPHA) * update)


def floors(
    parameters: dict[str, Tensor], tau: dict[str, Tensor], step: Callable[[], Any]
) -> dict[str, Callable[[], Any]]:
    """The passes that a merged step has to make, and its random numbers."""
    kept = torch.empty(max(p.numel() for p in parameters.values()))
    words, generator = torch.empty(BLOCK // 4, dtype=torch.int64), torch.Generator()

    @torch.no_grad()
    def passes() -> None:
        step()
        for name, p in parameters.items():
            before = kept[: p.numel()].view_as(p).copy_(p)
            p.addcmul_(before, tau[name], value=0.0)

    def draws() -> None:
        for p in parameters.values():
            for _, low, high in blocks(0, p.numel()):
                words[: -(-(high - low) // 4)].random_(-(2**63), None, generator=generator)

    return {"passes": passes, "draws": draws}


def renew_gradients(parameters: dict[str, Tensor], noise: Tensor, generator: torch.Generator) -> None:
    """Others at each step: under equal ones Adam moves all numbers alike, and many magnitudes are the same."""
    for parameter in parameters.values():
        start = int(torch.randint(len(noise) - parameter.numel(), (), generator=generator))
        parameter.grad = noise[start : start + parameter.numel()].view(parameter.shape).clone()


def live_bytes() -> int:
    """Bytes of the memory of all tensors that are alive."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if _is_plain(t)}
    return sum(storages.values())


def _is_plain(candidate: Any) -> bool:
    return type(candidate) in (Tensor, torch.nn.Parameter)


def steps(
    size: tuple[int, int, int], rounds: int, densities: list[float], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator) / 50) for name, shape in shapes(*size).items()
    }
    noise = torch.randn(max(p.numel() for p in parameters.values()) + 2**20, generator=generator) * 1e-3
    renew_gradients(parameters, noise, generator)
    model_bytes = sum(p.nbytes for p in parameters.values())
    fused = torch.optim.AdamW(list(parameters.items()), lr=1e-6, weight_decay=0.0, fused=True)
    foreach = torch.optim.AdamW(list(parameters.items()), lr=1e-6, weight_decay=0.0, foreach=True)
    for optimizer in (fused, foreach):
        optimizer.step()
    taking_turns: dict[str, Callable[[], Any]] = {"AdamW, fused": fused.step, "AdamW, foreach": foreach.step}
    memory: dict[str, dict[str, float]] = {}
    for method in (OnDARE, OnTIES):
        for density in densities:
            before = live_bytes()
            # Made on the fly, so that a model that stays alive would be seen.
            pretrained = {
                name: p.detach() - torch.randn(p.shape, generator=generator) / 1e3 for name, p in parameters.items()
            }
            wrapped = method(fused, {n: p.detach() for n, p in parameters.items()}, pretrained, density, ALPHA)
            del pretrained
            gc.collect()
            name = f"{method.__name__}, density {density}"
            memory[name] = {
                "task_vector_over_model": round(wrapped.tau_bytes / model_bytes, 4),
                "all_that_stays_alive_over_model": round((live_bytes() - before) / model_bytes, 4),
            }
            taking_turns[name] = wrapped.step
    tau = {name: torch.randn(p.shape, generator=generator) / 1e3 for name, p in parameters.items()}
    for ties in (False, True):
        published = PublishedOrder(parameters, tau, densities[0], ties)
        taking_turns[f"{'OnTIES' if ties else 'OnDARE'}, published order, density {densities[0]}"] = published.step
    taking_turns |= floors(parameters, tau, fused.step)
    facts = {
        "parameters": sum(p.numel() for p in parameters.values()),
        "largest_tensor_over_model": round(max(p.nbytes for p in parameters.values()) / model_bytes, 4),
        "memory": memory,
    }
    lowest: dict[str, float] = {}
    clock = clock_of(torch.get_num_threads())
    for i in range(rounds + 1):
        for name, step in taking_turns.items():
            renew_gradients(parameters, noise, generator)
            slow = name.startswith("OnTIES, published")
            if not slow or i == rounds:  # half a minute a step
                lowest[name] = min(seconds(step, clock), lowest.get(name, float("inf")))
        progress(f"round {i} of {rounds}")
        keep(facts | summary(lowest))
    return facts | summary(lowest)


def summary(lowest: dict[str, float]) -> dict[str, Any]:
    """Seconds, and ratios to the steps that are not merged and to the floor."""
    floor = {name: lowest["passes"] + lowest["draws"] * (name == "OnDARE, density 0.5") for name in lowest}
    merged = [name for name in lowest if name.startswith("On") and "published" not in name]
    return {
        "seconds": {name: round(value, 4) for name, value in lowest.items()},
        "over_fused": {name: round(value / lowest["AdamW, fused"], 3) for name, value in lowest.items()},
        "over_foreach": {name: round(value / lowest["AdamW, foreach"], 3) for name, value in lowest.items()},
        "over_floor": {name: round(lowest[name] / floor[name], 3) for name in merged},
    }


def threshold(numel: int, rounds: int) -> dict[str, Any]:
    """The sampled threshold against a sort of all magnitudes."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1)) * 1e-6
    whole = Part(numel, 0, numel)
    found: dict[str, Any] = {"numel": numel}
    sort = statistics.median(seconds(lambda: values.abs().argsort(descending=True)) for _ in range(min(rounds, 3)))
    found["argsort_seconds"] = round(sort, 4)
    for density in (0.5, 0.01):
        times, errors = [], []
        for step in range(rounds):
            draw = Draw(0, step, "w", numel, values.device)
            start = time.perf_counter()
            cut = find_cut(values, whole, draw, density)
            times.append(time.perf_counter() - start)
            kept = sum(
                int(cut.keep(values[within(whole.start, *block)], within(whole.start, *block), draw, block).sum())
                for block in blocks(0, numel)
            )
            errors.append(abs(kept / numel / density - 1))
        found[f"density {density}"] = {
            "seconds": round(statistics.median(times), 4),
            "over_argsort": round(statistics.median(times) / sort, 4),
            "largest_relative_density_error": round(max(errors), 4),
        }
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=int, nargs=3, default=(12, 768, 50257), help="layers, width, vocabulary")
    options.add_argument("--numel", type=int, default=2**24, help="elements for the threshold")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {**header(), "threads": arguments.threads, "rounds": arguments.rounds}

    def keep(key: str, found: dict[str, Any]) -> None:
        result[key] = found
        write(result, arguments.output)

    size = tuple(arguments.size)
    keep("steps", steps(size, arguments.rounds, [0.5, 0.01], lambda found: keep("steps", found)))
    keep("threshold", threshold(arguments.numel, arguments.rounds))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
