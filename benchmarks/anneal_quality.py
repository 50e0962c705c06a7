"""What Anneal gives beside a real decay of the learning rate, over the same steps of the same run, and beside raw.

    python benchmarks/anneal_quality.py tinyshakespeare.txt.gz --processes 3 \\
        --output benchmarks/results/anneal-quality.json

A small language model of characters trains with AdamW at a constant rate, after a warm-up. At five points, 200 steps
apart, the held-out loss of the raw weights, of the annealed mean of the last 200, and of the weights of a run that left
200 steps before, with the same optimizer state and the same batches, and has brought its rate to 0 by now.
"""

import copy
import gzip
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from _shared import header, parser, progress, write
from scipy.stats import t as student
from torch import Tensor, nn

from lightning_merge.rules import AnnealedMean
from lightning_merge.schedules._decay import Decay, decay

SHAPES = get_args(Decay)
DECAYED: tuple[Decay, ...] = ("linear", "1-sqrt")
"""Shapes of which a real decay is trained too."""


@dataclass(frozen=True)
class Setting:
    """One comparison; lengths in steps."""

    points: int = 5
    window: int = 200
    warmup: int = 100
    lr: float = 2e-3
    width: int = 64
    layers: int = 2
    context: int = 64
    batch: int = 16
    held_out: int = 32  # batches


class Characters(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, setting: Setting, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, setting.width)
        self.position = nn.Parameter(0.02 * torch.randn(setting.context, setting.width))
        layer = nn.TransformerEncoderLayer(
            setting.width, 4, 4 * setting.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, setting.layers, nn.LayerNorm(setting.width), False)
        self.head = nn.Linear(setting.width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(setting.context))

    def forward(self, characters: Tensor) -> Tensor:
        hidden = self.embedding(characters) + self.position
        found: Tensor = self.head(self.blocks(hidden, mask=self.mask, is_causal=True))
        return found


def batch(text: Tensor, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same for every run that takes this step."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - setting.context - 1, (setting.batch,), generator=generator)
    taken = text[starts[:, None] + torch.arange(setting.context + 1)]
    return taken[:, :-1], taken[:, 1:]


def loss(model: nn.Module, taken: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(taken[0]).flatten(0, 1), taken[1].flatten())


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor, setting: Setting) -> float:
    return statistics.fmean(loss(model, batch(text, setting, -1 - i)).item() for i in range(setting.held_out))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, taken: tuple[Tensor, Tensor], lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss(model, taken).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def decayed(
    model: nn.Module, optimizer: Any, text: Tensor, setting: Setting, seed: int, start: int, shape: Decay
) -> Any:
    """The run that leaves here and brings its rate to 0 over the window."""
    model = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), setting.lr)
    optimizer.load_state_dict(state)
    for i in range(setting.window):
        rate = setting.lr * decay(shape, i / setting.window)
        step(model, optimizer, batch(text, setting, seed * 10**6 + start + i), rate)
    return model


def one_run(setting: Setting, texts: tuple[Tensor, Tensor], vocabulary: int, seed: int) -> list[dict[str, float]]:
    """The held-out losses at each point."""
    torch.set_num_threads(1)  # two threads take other sums
    torch.manual_seed(seed)
    model = Characters(setting, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), setting.lr)
    rules = {shape: AnnealedMean(shape, setting.window) for shape in SHAPES}
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows, done = [], 0
    for point in range(setting.points + 1):
        row: dict[str, float] = {"step": float(done + setting.window)}
        for shape in DECAYED if point else ():
            run = decayed(model, optimizer, texts[0], setting, seed, done, shape)
            row[f"decay {shape}"] = held_out(run, texts[1], setting)
        states = {shape: rule.init(named) for shape, rule in rules.items()}
        for _ in range(setting.window):
            rate = setting.lr * min(1.0, (done + 1) / setting.warmup)
            step(model, optimizer, batch(texts[0], setting, seed * 10**6 + done), rate)
            done += 1
            for shape, rule in rules.items() if point else ():
                rule.update(states[shape], named)
        row["raw"] = held_out(model, texts[1], setting)
        merged = copy.deepcopy(model)
        for shape, rule in rules.items() if point else ():
            merged.load_state_dict({**model.state_dict(), **(rule.result(states[shape]) or {})})
            row[f"anneal {shape}"] = held_out(merged, texts[1], setting)
        if point:
            rows.append({name: round(value, 5) for name, value in row.items()})
            progress(f"seed {seed}: {json.dumps(rows[-1])}")
    return rows


def interval(values: list[float]) -> list[float]:
    """Mean and half the width of its 95 % interval over seeds."""
    half = 0.0
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [round(statistics.fmean(values), 4), round(half, 4)]


def summary(runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Means over the points of each seed, then over seeds; the correlation over the points of each seed."""

    def over_seeds(first: str, second: str) -> list[float]:
        return interval([statistics.fmean(row[first] - row[second] for row in run) for run in runs])

    found: dict[str, Any] = {}
    for shape in SHAPES:
        found[f"raw - anneal {shape}"] = over_seeds("raw", f"anneal {shape}")
    for shape in DECAYED:
        names = f"anneal {shape}", f"decay {shape}"
        found[f"raw - decay {shape}"] = over_seeds("raw", names[1])
        found[f"anneal - decay {shape}"] = over_seeds(*names)
        found[f"correlation {shape}"] = interval(
            [statistics.correlation(*([row[name] for row in run] for name in names)) for run in runs]
        )
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("text", type=Path, help="a text, also as .gz")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--window", type=int, default=Setting.window)
    options.add_argument("--processes", type=int, default=1, help="seeds that run side by side (default 1)")
    arguments = options.parse_args()
    setting = Setting(window=arguments.window)
    opened = gzip.open if arguments.text.suffix == ".gz" else open
    with opened(arguments.text, "rt") as file:
        text = file.read()
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    numbers = torch.tensor([letters[letter] for letter in text])
    texts = numbers[: int(0.9 * len(numbers))], numbers[int(0.9 * len(numbers)) :]
    runs: list[list[dict[str, float]]] = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for run in pool.map(partial(one_run, setting, texts, len(letters)), range(arguments.seeds)):
            runs.append(run)
            result = {"setting": setting.__dict__, "text": arguments.text.name, "runs": runs, **summary(runs)}
            write({**header(), **result}, arguments.output)
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
