"""The folder of a stream: its bank of vectors, its base, and what else the tasks so far have left."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lightning_merge.combiners import Combiner, add_vector
from lightning_merge.continual import Bank, InitFrom, StreamState
from lightning_merge.weights import Weights


@final
@dataclass(frozen=True)
class Store:
    """Opens the bank and the stream state of one folder.

    Attributes:
        folder: The stream's folder.
        combiner: Merges its vectors.
        keep_vectors: Whether the bank keeps every vector.
        init_from: Where a task starts: ``"base"``, ``"merged"`` or ``"last"``.
    """

    folder: Path
    combiner: Combiner
    keep_vectors: bool
    init_from: InitFrom

    def bank(self, base: Weights | None = None) -> Bank:
        """The vectors so far.

        Raises:
            ValueError: If they were taken from another base.
        """
        return Bank(self.folder, self.combiner, base=base, keep_vectors=self.keep_vectors)

    @property
    def stream(self) -> StreamState:
        """The base, and what no vector holds."""
        return StreamState(self.folder)

    def start(self, bank: Bank, base: Weights, state: dict[str, Weights]) -> Weights:
        """The merged parameters that a task starts from, and the buffers where they are not the base's."""
        if not bank.added or self.init_from == "base":
            return base
        if self.init_from == "last":
            return state["last"]
        return add_vector(base, bank.result() or {}) | state.get("buffers", {})

    def merged_model(self, live: Weights, without: int | str | None) -> Weights:
        """The merged model for a module with these tensors, one task left out if one is named.

        Raises:
            ValueError: If the bank is empty, or of another model or base, or has no such task or vector.
        """
        bank, stream = self.bank(), self.stream
        if not bank.added:
            raise ValueError(f"the bank {self.folder} holds no task yet.")
        state = stream.load(bank.added)
        every = bank.result() or {}
        vector = every if without is None else _result_without(bank, without) or {}
        base = {name: tensor for name, tensor in stream.base().items() if name in every}
        self.bank(base)  # refuses a file of another base
        merged = add_vector(base, vector)
        merged |= {
            name: tensor for part in ("buffers", "other", "head") for name, tensor in state.get(part, {}).items()
        }
        if name := next((n for n, t in merged.items() if n not in live or live[n].shape != t.shape), None):
            raise ValueError(
                f"the bank {self.folder} is of another model: `{name}` of shape {tuple(merged[name].shape)}."
            )
        return merged

    @staticmethod
    def differs(live: Mapping[str, Tensor], expected: Weights) -> str | None:
        """The first tensor of a model that is not as expected; ``None`` if all are."""
        return next((n for n, t in expected.items() if not torch.equal(live[n], t.to(live[n]))), None)

    def refuse_other_base(self, live: Weights, base: Weights, merged: Weights) -> None:
        """Checks that a model is the base or the merged model, before it is trained.

        Raises:
            ValueError: If it is neither.
        """
        other = self.differs(live, base)
        if other is None or self.differs(live, merged) is None:
            return
        raise ValueError(
            f"the bank {self.folder} is of another base: `{other}` of the model is neither the base's (hash"
            f" {_hash(base)}, the model has {_hash(live, base)}) nor that of the merged model. Build the model as for"
            " the first task, with the same seed or pretrained weights, or name a new folder with `bank`. If it holds"
            " weights of a checkpoint (`load_from_checkpoint`, `test(ckpt_path=...)`), call"
            " `ContinualMerging.load_merged(module)` first."
        )


def refuse_other_model(live: Weights, base: Weights, head: Sequence[str]) -> None:
    """Checks that tensors that are to be merged fit those of the base.

    Raises:
        ValueError: If one does not.
    """
    for name, tensor in live.items():
        if name in base and base[name].shape == tensor.shape:
            continue
        found = f"shape {tuple(tensor.shape)}"
        if name not in base:
            raise ValueError(f"the model is not that of the bank's first task: `{name}` of {found} was not in it.")
        if base[name].shape[1:] == tensor.shape[1:]:
            raise ValueError(
                f"`{name}` has {found} instead of {tuple(base[name].shape)}: if it is a head that grew, it must not be"
                f" merged. Name it with `head='{name.rpartition('.')[0]}.*'` (the head is {list(head) or 'none'})."
            )
        raise ValueError(
            f"the backbone changed between tasks: `{name}` has {found} instead of {tuple(base[name].shape)}. Vectors of"
            " different models cannot be merged; name a new folder with `bank`."
        )


def _result_without(bank: Bank, task: int | str) -> Weights | None:
    bank.vector(task)  # there is one
    others = [other for other in bank.tasks if other != task]
    return bank.rule.combine((bank.vector(other) for other in others), tasks=others) if others else None


def _hash(tensors: Weights, names: Weights | None = None) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors if names is None else names):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
