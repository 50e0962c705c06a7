"""Rows of tokens: of preference pairs, and of stretches of text."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_merge.recipes.preference._causal_lm import Tokenizer
from lightning_merge.recipes.preference._files import Pair

Batch = dict[str, Tensor]
IGNORED = -100  # the label of tokens that no loss counts, as in transformers


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


class Stretches(Dataset[Batch]):
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
