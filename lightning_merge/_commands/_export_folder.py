"""``lightning-merge export --hf``: one set of a checkpoint in a folder that ``from_pretrained`` reads."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lightning_merge._commands._target import literal
from lightning_merge.files._folders import class_of, config_of
from lightning_merge.files._layouts import open_file
from lightning_merge.files._sets import bytes_of, contiguous, tensors
from lightning_merge.files._write import is_remote
from lightning_merge.files._write_safetensors import write_safetensors
from lightning_merge.weights import Weights, first_mismatch

_WITH = (".json", ".txt", ".model", ".jinja", ".py")
_WITHOUT = (".index.json", "trainer_state.json")
_PEFT = "base_model.model."
"""What peft's names begin with."""


def export_folder(
    source: str, target: str | os.PathLike[str], name: str | None, strip: str, like: str, force: bool
) -> str:
    """Writes a set under the names that a saved model has, beside that model's settings and tokenizer.

    Args:
        source: The checkpoint.
        target: A folder; made if it is not there.
        name: The set; by default the one that the file's score belongs to.
        strip: Prefix to remove from names, with its dot.
        like: The folder of the model or of the adapter, as ``save_pretrained`` writes it.
        force: Write into a folder that holds something.

    Raises:
        ValueError: If something does not fit; nothing is written then.
        OSError: If the system refuses to read or write.
    """
    folder, config = Path(target), config_of(like)
    if is_remote(target) or folder.is_file():
        raise ValueError(f"with --hf the output must be a folder, got {target}.")
    if folder.is_dir() and any(folder.iterdir()) and (not force or folder.samefile(like)):
        raise ValueError(f"{target} is a folder that holds something already; --force writes into one, but not {like}.")
    file = open_file(source)
    chosen = file.default if name is None else name
    state = {key.removeprefix(strip): tensor for key, tensor in tensors(file.choose(name).state_dict).items()}
    model = open_file(like)
    expected = tensors(model.choose(None).as_saved)
    found, others = _under_names_of(expected, state, config.is_adapter)
    if difference := first_mismatch(expected, found):
        cure = _cure(expected, state, config.is_adapter)
        raise ValueError(f"{chosen} of {source} does not fit the model in {like}: {difference}.{cure}")
    folder.mkdir(parents=True, exist_ok=True)
    stem = "adapter_model" if config.is_adapter else "model"
    write_safetensors(folder / f"{stem}.safetensors", contiguous(found), {"set": chosen, "source": file.name})
    kept = [path for path in sorted(Path(like).iterdir()) if path.suffix in _WITH and not path.name.endswith(_WITHOUT)]
    for path in kept:
        shutil.copyfile(path, folder / path.name)
    lines = [
        f"{target}: {chosen} of {file.path}, {len(found)} tensors, {bytes_of(found) / 2**20:.1f} MiB",
        f"  from {like}: {', '.join(path.name for path in kept)}",
    ]
    if others:
        lines.append(f"  left out, not saved in {like}: {', '.join(others[:4])} ({len(others)} in all)")
    return "\n".join([*lines, f"  load: {class_of(config, literal(target))}"])


def _under_names_of(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], is_adapter: bool
) -> tuple[Weights, list[str]]:
    """The tensors under the names of a saved model, and the names of those that it has not."""
    names = {key: next((each for each in _names_in_file(key, is_adapter) if each in expected), None) for key in state}
    found = {name: state[key] for key, name in names.items() if name is not None}
    return {name: found[name] for name in expected if name in found}, [key for key in names if names[key] is None]


def _names_in_file(key: str, is_adapter: bool) -> Iterator[str]:
    """What a tensor may be called in the file: peft leaves the name of the adapter out, and begins with its own."""
    yield key
    if is_adapter:
        plain = re.sub(r"\.modules_to_save\.[^.]+(?=\.)|(?<=lora_[AB])\.[^.]+(?=\.)", "", key)
        plain = re.sub(r"(lora_embedding_[AB]|lora_magnitude_vector)\..+$", r"\1", plain)
        yield plain
        yield f"{_PEFT}{plain}"


def _cure(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], is_adapter: bool) -> str:
    """The prefix to remove, if every name has the same one before those of the model."""
    first = next(iter(expected), "").removeprefix(_PEFT)
    names = [name for key in state for name in _names_in_file(key, is_adapter) if not name.startswith(_PEFT)]
    prefixes = {name.removesuffix(first).removesuffix(_PEFT) for name in names if name.endswith(f".{first}")}
    return f" Names have a prefix, remove it: --strip {prefixes.pop()}" if len(prefixes) == 1 else ""
