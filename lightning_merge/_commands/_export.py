"""``lightning-merge export``: one set of weights of a checkpoint as a file that needs no lightning-merge."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lightning_merge.files._layouts import bytes_of, contiguous, open_file
from lightning_merge.weights import Weights, canonical, first_mismatch

SUFFIXES = {".safetensors": "safetensors", ".pt": "a state dict", ".pth": "a state dict", ".bin": "a state dict"}


def export(source: str, target: Path, name: str | None, strip: str, arch: str | None, force: bool) -> str:
    """Writes a set and says which, under what names, and how to load it.

    Args:
        source: The checkpoint.
        target: ``.safetensors``, or ``.pt``, ``.pth`` or ``.bin`` for torch's format.
        name: The set; by default the one that the file's score belongs to.
        strip: Prefix to remove from names, with its dot; tensors without it are left out and listed.
        arch: A model of timm that the weights must fit.
        force: Replace an existing file.

    Raises:
        ValueError: If something does not fit; nothing is written then.
    """
    if target.suffix not in SUFFIXES:
        raise ValueError(f"the output must end in {', '.join(SUFFIXES)}, got {target}.")
    if target.exists() and not force:
        raise ValueError(f"{target} exists already; --force replaces it.")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} to.")
    file = open_file(source)
    chosen = file.default if name is None else name
    everything = file.choose(name).weights
    weights = {
        canonical(key).removeprefix(strip): t for key, t in everything.items() if canonical(key).startswith(strip)
    }
    left_out = [key for key in everything if not canonical(key).startswith(strip)]
    if not weights:
        some = ", ".join(list(everything)[:3])
        raise ValueError(f"no tensor of {source} has a name that begins with {strip!r}; the first are: {some}.")
    weights = contiguous(weights)
    classes = None if arch is None else _refuse_other_architecture(arch, weights, list(everything))
    how = _write(target, weights, {"arch": arch, "set": chosen, "source": str(file.path.name)})
    lines = [f"{target}: {chosen} of {file.path}, {len(weights)} tensors, {bytes_of(weights) / 2**20:.1f} MiB"]
    if left_out:
        lines.append(f"  left out, without the prefix {strip!r}: {', '.join(left_out[:8])} ({len(left_out)} in all)")
    return "\n".join([*lines, f"  load: {how.format(target=target, arch=arch, classes=classes)}"])


def _write(target: Path, weights: Weights, about: dict[str, Any]) -> str:
    """How to load what it wrote."""
    if target.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise ImportError('writing it needs safetensors: pip install "lightning-merge[export]"') from error
        save_file(weights, target, {"format": "pt"} | {key: str(value) for key, value in about.items() if value})
    else:
        torch.save({"arch": about["arch"], "state_dict": weights} if about["arch"] else weights, target)
    if about["arch"]:
        return 'timm.create_model("{arch}", num_classes={classes}, checkpoint_path="{target}")'
    if target.suffix == ".safetensors":
        return 'model.load_state_dict(safetensors.torch.load_file("{target}"))'
    return 'model.load_state_dict(torch.load("{target}", weights_only=True))'


def _refuse_other_architecture(arch: str, weights: Weights, names: list[str]) -> int:
    """The number of classes that a model of timm must have for these weights to fit."""
    import timm

    if not timm.is_model(arch):
        near = ", ".join(get_close_matches(arch, timm.list_models(), n=5))
        raise ValueError(f"timm has no model called {arch!r}.{f' Near it: {near}.' if near else ''}")
    with torch.device("meta"):
        model: Any = timm.create_model(arch)
        head = weights.get(f"{model.pretrained_cfg['classifier']}.weight")
        classes = model.num_classes if head is None else len(head)
        expected = timm.create_model(arch, num_classes=classes).state_dict()
    if problem := first_mismatch(expected, weights):
        raise ValueError(
            f"the weights do not fit timm's {arch}: {problem}. If their names begin with the name of the model inside a"
            f" LightningModule, remove it: --strip {names[0].partition('.')[0]}."
        )
    return int(classes)
