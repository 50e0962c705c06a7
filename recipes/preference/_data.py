"""The data of preference tuning: pairs of answers, and plain text."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_merge.recipes.preference._causal_lm import tokenizer
from lightning_merge.recipes.preference._files import Pair, read_pairs, read_text
from lightning_merge.recipes.preference._tokens import PairTokens, Stretches, collate


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
        self.val_text = Stretches(held_out, self.tokenizer, self.length)
        self.val_pairs = PairTokens(val, self.tokenizer, self.length, self.answer) if val else None
        if self.train_on == "pairs":
            self.train: PairTokens | Stretches = PairTokens(train, self.tokenizer, self.length, self.answer)
        else:
            texts = text_train if self.train_on == "text" else [pair.prompt + pair.chosen for pair in train]
            self.train = Stretches(texts, self.tokenizer, self.length)
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
