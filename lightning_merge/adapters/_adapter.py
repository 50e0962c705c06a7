"""An adapter in a folder, as peft writes it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

from torch import Tensor

from lightning_merge._checks import instance, path, text
from lightning_merge._mergeable import named
from lightning_merge.adapters._factored import factored
from lightning_merge.adapters._negated import is_ia3
from lightning_merge.adapters._products import layers_of, products
from lightning_merge.files._layouts import open_file
from lightning_merge.files._sets import contiguous, tensors
from lightning_merge.files._write_safetensors import write_safetensors
from lightning_merge.weights import Weights

CONFIG = "adapter_config.json"
_OTHER_BASE = ("pissa", "olora", "corda")


@final
@dataclass(frozen=True)
class Adapter:
    """A LoRA or (IA)3 adapter: its tensors by name, and its settings as ``adapter_config.json`` has them.

    Args:
        weights: Under the names of the file.
        config: Of peft.
        name: What errors call it: its folder.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If it is of another kind, or what its layers add to the weights is no vector on the same base: DoRA,
            ranks or scales of their own for some layers, a start that changes the base (PiSSA).

    Example:
        >>> import tempfile, torch
        >>> weights = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> Adapter(weights, {"peft_type": "LORA", "r": 1, "lora_alpha": 3}).write(folder)
        >>> Adapter.read(folder).vector()
        {'q.weight': tensor([[3., 3.],
                [3., 3.]])}
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    name: str = "adapter"

    def __post_init__(self) -> None:
        named("weights", self.weights)
        instance("config", self.config, Mapping, "the settings of an adapter, by name")
        text("name", self.name)
        if self.kind not in ("LORA", "IA3"):
            raise ValueError(f"{self.name} is an adapter of kind {self.kind}; LORA and IA3 have a vector.")
        refused = [name for name in ("use_dora", "rank_pattern", "alpha_pattern") if self.config.get(name)]
        start = str(self.config.get("init_lora_weights", "")).lower()
        if refused or start.startswith(_OTHER_BASE):
            what = f"`{refused[0]}`" if refused else f"`init_lora_weights` {start}"
            raise ValueError(
                f"{self.name} has {what}, with which its products are not all that it adds to one base: merge it into"
                " the weights first (peft: `merge_and_unload()`)."
            )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """What ``save_pretrained`` of peft wrote.

        Args:
            folder: With ``adapter_config.json`` and the weights.

        Raises:
            ValueError: If it cannot be read, or is of another kind.
        """
        place = Path(path("folder", folder))
        try:
            config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{place} is no folder of an adapter: it has no {CONFIG}.") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{place / CONFIG} cannot be read as settings of an adapter: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{place / CONFIG} cannot be read as settings of an adapter: it is no table of names.")
        return cls(tensors(open_file(place).choose(None).as_saved), config, os.fspath(place))

    def write(self, folder: str | os.PathLike[str], provenance: str = "") -> None:
        """Writes what ``PeftModel.from_pretrained`` reads.

        Args:
            folder: Made if it is not there; files of the same names are replaced.
            provenance: Kept among the metadata of the weights' file.
        """
        place = Path(path("folder", folder))
        place.mkdir(parents=True, exist_ok=True)
        about = {"format": "pt", **({"provenance": provenance} if provenance else {})}
        write_safetensors(place / "adapter_model.safetensors", contiguous(dict(self.weights)), about)
        text = json.dumps(dict(self.config), indent=2, sort_keys=True)
        (place / CONFIG).write_text(text + "\n", encoding="utf-8")

    @property
    def kind(self) -> str:
        """``"LORA"``, ``"IA3"``, or another name of peft."""
        return str(self.config.get("peft_type") or "none")

    @property
    def base(self) -> str:
        """The model that it is of; empty if it is not said."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        """Of LoRA; 0 of (IA)3."""
        return int(self.config.get("r") or 8) if self.kind == "LORA" else 0

    @property
    def scale(self) -> float:
        """What the products of LoRA are multiplied with."""
        alpha, rank = float(self.config.get("lora_alpha") or 8), self.rank
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def vector(self) -> Weights:
        """What it adds: ``scale * B A`` under the name of each layer's weight, or of (IA)3 ``v - 1``.

        Raises:
            ValueError: If it holds no factor, or no scaling, one holds a NaN or an infinity, or has another rank than
                the settings say.
        """
        if self.kind == "LORA":
            for first, _ in layers_of(self.weights).values():
                if (rank := len(self.weights[first])) != self.rank:
                    raise ValueError(f"`{first}` of {self.name} has rank {rank}, and its settings say {self.rank}.")
            return products(self.weights, self.scale)
        found = {name: tensor.float() - 1 for name, tensor in self.weights.items() if is_ia3(name)}
        if not found:
            raise ValueError(f"{self.name} holds no scaling of (IA)3.")
        return found

    def beside(self) -> Weights:
        """All of it that is not in its vector: biases and heads that were trained too."""
        own = {name for pair in layers_of(self.weights).values() for name in pair} if self.kind == "LORA" else set()
        return {name: each for name, each in self.weights.items() if name not in own and not is_ia3(name)}

    def with_vector(self, vector: Mapping[str, Tensor], rank: int | None = None) -> tuple[Self, float]:
        """An adapter like this one that adds another vector, and what its rank leaves out (``factored``); 0 of (IA)3.

        Args:
            vector: As ``vector`` gives it.
            rank: Of LoRA; by default as before.

        Raises:
            ValueError: If the vector does not fit, or ``rank`` is out of range or given for (IA)3.
        """
        if self.kind == "LORA":
            rank = self.rank if rank is None else rank
            weights, lost = factored(vector, self.weights, rank)
            plain = {"r": rank, "lora_alpha": rank, "use_rslora": False}  # a scale of 1: the vector has it
            return type(self)(weights, {**self.config, **plain}, self.name), lost
        if rank is not None or vector.keys() != self.vector().keys():
            raise ValueError("(IA)3 has no `rank`, and `vector` must have the names of its scalings.")
        scalings = {name: (1 + each).to(self.weights[name]) for name, each in vector.items()}
        return type(self)({**self.weights, **scalings}, self.config, self.name), 0.0
