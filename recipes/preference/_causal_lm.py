"""Causal language models of Hugging Face transformers, by name or from a configuration, and their tokenizers."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

from torch import nn

_INSTALL = 'preference recipes need transformers: pip install "lightning-merge[preference]"'

_SMALL = {
    "model_type": "gpt2",
    "vocab_size": 258,
    "n_positions": 256,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


class Tokenizer(Protocol):
    """Encodes text as token ids, and decodes them."""

    end: int
    """Closes a text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@final
class Bytes:
    """A byte-level tokenizer: a token per byte, 256 at the end of a text. Needs no file.

    Example:
        >>> Bytes().decode(Bytes().encode("né"))
        'né'
    """

    end = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


@final
class Pretrained:
    """The tokenizer of a model on the hub or in a folder."""

    def __init__(self, name: str) -> None:
        self.tokenizer = _transformers().AutoTokenizer.from_pretrained(name)
        self.end: int = self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def tokenizer(name: str) -> Tokenizer:
    """``"bytes"``, or the tokenizer of a model by name."""
    return Bytes() if name == "bytes" else Pretrained(name)


def causal_lm(name: str | None, config: Mapping[str, Any] | None) -> nn.Module:
    """A pretrained model by its name or folder, or a new one from a configuration with a ``model_type``.

    By default a small GPT-2 (Radford et al., 2019) over bytes: four layers of 128, 0.8 million weights.
    """
    library = _transformers()
    if name is not None:
        model: nn.Module = library.AutoModelForCausalLM.from_pretrained(name)
        return model
    settings = dict(_SMALL if config is None else config)
    made: nn.Module = library.AutoModelForCausalLM.from_config(
        library.AutoConfig.for_model(settings.pop("model_type", "gpt2"), **settings)
    )
    return made


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    return transformers
