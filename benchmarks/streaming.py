"""What Streaming DiLoCo sends and what it costs in loss, beside DiLoCo and beside gradients that are synchronised.

    python benchmarks/streaming.py tinyshakespeare.txt.gz --output benchmarks/results/streaming-diloco.json

- sent: bytes that a process sends per step, and in the step that sends most, by formula and counted in two processes
  that train the model by ``BranchStrategy`` or by DDP.
- loss: of a small language model of characters on held-out text after as many steps, three seeds. Branches take turns
  in one process, which is the same training. ``synchronous`` takes the batches of all branches at every step.
"""

import gzip
import json
import math
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _costs import FLOAT, Sent, all_gather, all_reduce, mean
from _shared import QUIET, header, parser, progress, silence, write
from anneal_quality import Characters, batch, interval, loss
from torch import Tensor

ROUND: dict[str, Any] = {"every_n_steps": 24}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "diloco": {},
    "4 fragments": {"fragments": 4},
    "4 fragments, 5 steps later": {"fragments": 4, "delay": 5, "mix": 0.5},
    "4 fragments, 5 steps later, 8 bits": {"fragments": 4, "delay": 5, "mix": 0.5, "bits": 8},
    "4 fragments, 5 steps later, 4 bits": {"fragments": 4, "delay": 5, "mix": 0.5, "bits": 4},
    "4 fragments, 20 steps later, 8 bits": {"fragments": 4, "delay": 20, "mix": 0.5, "bits": 8},
    "4 fragments, 5 steps later, 8 bits, mix 1": {"fragments": 4, "delay": 5, "mix": 1.0, "bits": 8},
}


@dataclass(frozen=True)
class Setting:
    """One comparison; lengths in steps of each branch."""

    steps: int = 400
    branches: int = 2
    lr: float = 2e-3
    warmup: int = 40
    width: int = 64
    layers: int = 2
    context: int = 32
    batch: int = 8
    held_out: int = 128  # batches


class Language(pl.LightningModule):
    """The model of characters with AdamW, a warm-up and a cosine."""

    def __init__(self, setting: Setting, vocabulary: int) -> None:
        super().__init__()
        self.setting = setting
        self.net = Characters(setting, vocabulary)  # type: ignore[arg-type]

    def training_step(self, taken: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss(self.net, taken)

    def configure_optimizers(self) -> Any:
        setting = self.setting
        optimizer = torch.optim.AdamW(self.parameters(), setting.lr)

        def rate(step: int) -> float:
            return min((step + 1) / setting.warmup, 0.55 + 0.45 * math.cos(math.pi * step / setting.steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Text(torch.utils.data.IterableDataset[Any]):
    """Batch after batch, or one of several joined at a time."""

    def __init__(self, text: Tensor, setting: Setting, seed: int, joined: int = 1) -> None:
        self.text, self.setting, self.seed, self.joined = text, setting, seed, joined

    def __iter__(self) -> Any:
        for step in range(self.setting.steps * self.setting.branches // self.joined):
            numbers = (self.seed * 10**6 + step * self.joined + part for part in range(self.joined))
            parts = [batch(self.text, self.setting, number) for number in numbers]  # type: ignore[arg-type]
            yield tuple(torch.cat(each) for each in zip(*parts, strict=True))


def trained(setting: Setting, text: Tensor, vocabulary: int, seed: int, name: str, **settings: Any) -> Language:
    from lightning_merge.callbacks import DiLoCo

    pl.seed_everything(seed, verbose=False)
    module = Language(setting, vocabulary)
    synchronous = name == "synchronous"
    data = Text(text, setting, seed, setting.branches if synchronous else 1)
    diloco = [] if synchronous else [DiLoCo(setting.branches, **ROUND, **CONTESTANTS[name], final_validation=False)]
    trainer = pl.Trainer(**QUIET, max_epochs=1, gradient_clip_val=1.0, callbacks=list(diloco), **settings)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return module


@torch.no_grad()
def held_out(module: Language, text: Tensor, setting: Setting) -> float:
    module.eval()
    batches = (batch(text, setting, -1 - number) for number in range(setting.held_out))  # type: ignore[arg-type]
    return statistics.fmean(loss(module.net, each).item() for each in batches)


# ---- bytes


class Steps(pl.Callback):
    """Notes where each step ends among what was sent."""

    def __init__(self, sent: Sent) -> None:
        self.sent = sent
        self.ends: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(len(self.sent.bytes))


def counted(root: Path, setting: Setting, vocabulary: int) -> dict[str, Any]:
    """In each of two processes: bytes that it sends in each step of a round and more."""
    from lightning_merge.callbacks import BranchStrategy, DiLoCo

    silence()
    found: dict[str, Any] = {}
    text = torch.arange(4096) % vocabulary
    for name in ("synchronous", *CONTESTANTS):
        pl.seed_everything(0, verbose=False)
        sent = Sent(2)
        steps = Steps(sent)
        synchronous = name == "synchronous"
        diloco = [] if synchronous else [DiLoCo(2, **ROUND, **CONTESTANTS[name], final_validation=False)]
        strategy = "ddp" if synchronous else BranchStrategy(process_group_backend="gloo")
        settings = {**QUIET, "use_distributed_sampler": False, "gradient_clip_val": 1.0}
        trainer = pl.Trainer(**settings, max_steps=56, callbacks=[*diloco, steps], strategy=strategy, devices=2)
        with sent:
            trainer.fit(Language(setting, vocabulary), torch.utils.data.DataLoader(Text(text, setting, 0), None))
        spans = zip(steps.ends[:-1], steps.ends[1:], strict=True)
        found[name] = [sum(sent.bytes[start:end]) for start, end in spans]
    return found


def by_formula(setting: Setting, vocabulary: int, name: str, processes: int = 2) -> dict[str, float]:
    """Bytes of the step that sends most, and of a step on average."""
    from lightning_merge.branches._fragments import divided

    live = dict(Characters(setting, vocabulary).named_parameters())  # type: ignore[arg-type]
    if name == "synchronous":
        each = all_reduce(FLOAT * sum(t.numel() for t in live.values()), processes)
        return {"per step": each, "most": each}
    settings = {"fragments": 1, "bits": 32, **CONTESTANTS[name]}
    fragments = divided(live, settings["fragments"])
    sizes = [[live[name].numel() for name in names] for names in fragments]
    check = all_gather(FLOAT, processes)  # whether a branch has diverged, at each merge
    sent = [mean(each, settings["bits"], processes) for each in sizes]
    # Few bits go there in one step and come back in another, if there is a step between.
    ways = 2 if settings["bits"] < 32 and settings.get("delay", 0) > 1 else 1
    total = (sum(sent) + len(sent) * check) / ROUND["every_n_steps"]
    return {"per step": total, "most": max(sent) / ways + check}


def sent_by_all(setting: Setting, vocabulary: int) -> list[dict[str, Any]]:
    """A row for each contestant: the formula, and what two processes counted."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from processes import returned, start  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        started = start(2, counted, Path(folder), setting, vocabulary)
        first, second = returned(started, Path(folder), seconds=3600.0)
    rows = []
    for name, steps in first.items():
        whole = steps[-ROUND["every_n_steps"] :]  # a round, from when all delays are under way
        rows.append(
            {
                "contestant": name,
                "formula": by_formula(setting, vocabulary, name),
                "counted": {"per step": statistics.fmean(whole), "most": max(whole)},
                "alike in both processes": steps == second[name],
            }
        )
        progress(json.dumps(rows[-1]))
    return rows


def read(path: Path) -> tuple[Tensor, Tensor, int]:
    """Nine tenths of the text, the rest, and how many characters there are."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        text = file.read()
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    numbers = torch.tensor([letters[letter] for letter in text])
    cut = int(0.9 * len(numbers))
    return numbers[:cut], numbers[cut:], len(letters)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("text", type=Path, help="a text, also as .gz")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=Setting.steps)
    arguments = options.parse_args()
    silence()
    torch.set_num_threads(1)
    setting = Setting(steps=arguments.steps)
    train, rest, vocabulary = read(arguments.text)
    result: dict[str, Any] = {"setting": asdict(setting) | ROUND, "text": arguments.text.name}
    result["sent"] = sent_by_all(setting, vocabulary)
    losses: dict[str, list[float]] = {name: [] for name in ("synchronous", *CONTESTANTS)}
    for seed in range(arguments.seeds):
        for name, own in losses.items():
            own.append(round(held_out(trained(setting, train, vocabulary, seed, name), rest, setting), 5))
            progress(f"seed {seed}: {name}: {own[-1]}")
        write({**header("lightning"), **result, "loss": losses}, arguments.output)
    more = {name: [a - b for a, b in zip(own, losses["diloco"], strict=True)] for name, own in losses.items()}
    result["more than diloco"] = {name: interval(own) for name, own in more.items() if name != "diloco"}
    write({**header("lightning"), **result, "loss": losses}, arguments.output)
    print(json.dumps({"loss": losses, "more": result["more than diloco"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
