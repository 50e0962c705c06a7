"""Preference pairs and plain text for language models, from files."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_merge.recipes.preference._causal_lm import Tokenizer, tokenizer

Batch = dict[str, Tensor]
IGNORED = -100  # the label of tokens that no loss counts, as in transformers

_ANSWER = "\n\nAssistant:"  # what precedes an answer in the dialogues of Anthropic's data


@final
@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which people chose one."""

    prompt: str
    chosen: str
    rejected: str


def read_pairs(path: Path) -> list[Pair]:
    """Reads JSON lines with ``chosen`` and ``rejected``, and ``prompt`` if the two do not begin with it.

    Without ``prompt``, what both texts begin with is the prompt, up to the last ``Assistant:`` in it. Pairs with an
    empty answer or with two equal ones say nothing; they are left out, and counted in one line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object or lacks a field, with the line's number; or if no pair is left.
    """
    pairs, empty, equal = [], 0, 0
    for number, line in enumerate(_lines(path, "pairs"), 1):
        if not line.strip():
            continue
        pair = _pair(line, f"{path}, line {number}")
        if not (pair.chosen.strip() and pair.rejected.strip()):
            empty += 1
        elif pair.chosen == pair.rejected:
            equal += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path} holds no pair of two different answers ({empty} with an empty one, {equal} equal).")
    if empty or equal:
        rank_zero_info(f"{path}: left out {empty} pairs with an empty answer and {equal} with two equal answers.")
    return pairs


def _pair(line: str, where: str) -> Pair:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object with `chosen` and `rejected`, got {type(record).__name__}.")
    for field in ("chosen", "rejected"):
        if field not in record:
            raise ValueError(f"{where} lacks `{field}`; it has: {', '.join(record) or 'nothing'}.")
    for field in ("prompt", "chosen", "rejected"):
        if not isinstance(record.get(field, ""), str):
            raise ValueError(f"`{field}` in {where} must be text, got {type(record[field]).__name__}.")
    chosen, rejected = record["chosen"], record["rejected"]
    if "prompt" in record:
        return Pair(record["prompt"], chosen, rejected)
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    prompt = chosen[: min(len(chosen), len(rejected)) if common is None else common]
    if _ANSWER in prompt:
        prompt = prompt[: prompt.rindex(_ANSWER) + len(_ANSWER)]
    return Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def read_text(path: Path) -> str:
    """The text of a file, plain or compressed by gzip.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return "".join(_lines(path, "text"))


def _lines(path: Path, argument: str) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"`{argument}`: there is no file {path}. Give one: --data.{argument} FILE.")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from file


class Preferences(LightningDataModule):
    """Preference pairs, and the text on which forgetting is measured.

    Validation has two parts: held-out pairs, and held-out text (``text``, or the dialogues with the chosen answers of
    the held-out pairs if ``text`` is not given).

    Args:
        pairs: JSON lines, plain or gzip, with ``chosen`` and ``rejected`` and, if they do not hold it, ``prompt``; as
            in Anthropic's hh-rlhf.
        text: Plain text, or gzip of it. Needed for ``train_on="text"``.
        train_on: ``"text"``: language modelling on ``text``. ``"chosen"``: on dialogues with chosen answers.
            ``"pairs"``: on pairs.
        vocabulary: ``"bytes"``, or the name of a model whose tokenizer is used.
        batch_size: Pairs or stretches of text per batch; at least 1.
        length: Tokens of a stretch of text, and of a pair's prompt and answer together; at least 8.
        answer: Tokens of an answer at most; at least 1 and less than ``length``. Longer ones are cut.
        val_share: Share of pairs and of text held out, in (0, 1).
        split_seed: Chooses which pairs are held out, and nothing else.

    Raises:
        ValueError: If an argument is out of range, or in ``setup`` if a file is not as described.
        FileNotFoundError: In ``setup`` if a file is not there.
    """

    def __init__(
        self,
        pairs: str | None = None,
        text: str | None = None,
        train_on: Literal["text", "chosen", "pairs"] = "pairs",
        vocabulary: str = "bytes",
        batch_size: int = 16,
        length: int = 192,
        answer: int = 128,
        val_share: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if train_on not in ("text", "chosen", "pairs"):
            raise ValueError(f"`train_on` must be 'text', 'chosen' or 'pairs', got {train_on!r}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if length < 8:
            raise ValueError(f"`length` must be at least 8, got {length}.")
        if not 1 <= answer < length:
            raise ValueError(f"`answer` must be at least 1 and less than `length` ({length}), got {answer}.")
        if not 0 < val_share < 1:
            raise ValueError(f"`val_share` must be in (0, 1), got {val_share}.")
        if train_on == "text" and text is None:
            raise ValueError("`text` must be the path of a file for train_on='text': --data.text FILE.")
        if train_on != "text" and pairs is None:
            raise ValueError(f"`pairs` must be the path of a file for train_on={train_on!r}: --data.pairs FILE.")
        self.pairs = pairs
        self.text = text
        self.train_on = train_on
        self.vocabulary = vocabulary
        self.batch_size = batch_size
        self.length = length
        self.answer = answer
        self.val_share = val_share
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        self.tokenizer = tokenizer(self.vocabulary)
        train, val = self._split_pairs()
        text_train, text_val = self._split_text()
        held_out = text_val or [pair.prompt + pair.chosen for pair in val]
        self.val_text = _Stretches(held_out, self.tokenizer, self.length)
        self.val_pairs = PairTokens(val, self.tokenizer, self.length, self.answer) if val else None
        if self.train_on == "pairs":
            self.train: PairTokens | _Stretches = PairTokens(train, self.tokenizer, self.length, self.answer)
        else:
            texts = text_train if self.train_on == "text" else [pair.prompt + pair.chosen for pair in train]
            self.train = _Stretches(texts, self.tokenizer, self.length)
        available = len(self.train)
        if available < self.batch_size:
            raise ValueError(
                f"`batch_size` must be at most what there is to train on, {available}, got {self.batch_size}."
            )

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Text first, then pairs if there are any."""
        parts: list[Dataset[Any]] = [self.val_text, *([] if self.val_pairs is None else [self.val_pairs])]
        return [DataLoader(part, 64, collate_fn=collate) for part in parts]

    def _split_pairs(self) -> tuple[list[Pair], list[Pair]]:
        if self.pairs is None:
            return [], []
        pairs = read_pairs(Path(self.pairs).expanduser())
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        cut = max(1, round(len(pairs) * self.val_share))
        return [pairs[i] for i in order[cut:]], [pairs[i] for i in order[:cut]]

    def _split_text(self) -> tuple[list[str], list[str]]:
        if self.text is None:
            return [], []
        text = read_text(Path(self.text).expanduser())
        cut = round(len(text) * (1 - self.val_share))
        return [text[:cut]], [text[cut:]]


class PairTokens(Dataset[Batch]):
    """Each pair as two rows of tokens, chosen first, with the answers' tokens as labels.

    Args:
        pairs: The pairs.
        vocabulary: How text becomes tokens.
        length: Tokens of a row; the prompt loses its beginning to fit.
        answer: Tokens of an answer at most, its end token included.
    """

    def __init__(self, pairs: list[Pair], vocabulary: Tokenizer, length: int, answer: int) -> None:
        tokens = torch.full((len(pairs), 2, length), vocabulary.end)
        labels = torch.full((len(pairs), 2, length), IGNORED)
        self.prompts: list[list[int]] = []
        for i, pair in enumerate(pairs):
            for j, text in enumerate((pair.chosen, pair.rejected)):
                reply = [*vocabulary.encode(text), vocabulary.end][:answer]
                prompt = [vocabulary.end, *vocabulary.encode(pair.prompt)][-(length - len(reply)) :]
                row = torch.tensor([*prompt, *reply])
                tokens[i, j, : len(row)] = row
                labels[i, j, len(prompt) : len(row)] = row[len(prompt) :]
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        return {"tokens": self.tokens[index], "labels": self.labels[index], "index": torch.tensor(index)}


class _Stretches(Dataset[Batch]):
    """Texts, joined by end tokens and cut into stretches of equal length."""

    def __init__(self, texts: list[str], vocabulary: Tokenizer, length: int) -> None:
        tokens = torch.tensor([token for text in texts for token in (*vocabulary.encode(text), vocabulary.end)])
        count = len(tokens) // length
        if count == 0:
            raise ValueError(f"the text must have at least `length` ({length}) tokens, got {len(tokens)}.")
        self.tokens = tokens[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        return {"tokens": self.tokens[index], "labels": self.tokens[index]}


def collate(rows: list[Batch]) -> Batch:
    """Stacks rows, without the columns at the end in which no row has a label."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    used = int((batch["labels"] != IGNORED).flatten(0, -2).any(0).nonzero().max()) + 1
    return {key: value[..., :used] if value.ndim > 1 else value for key, value in batch.items()}
