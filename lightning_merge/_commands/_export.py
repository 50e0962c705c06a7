"""``lightning-merge export``: one set of weights of a checkpoint as a file that needs no lightning-merge."""

import os
from difflib import get_close_matches
from typing import Any

import torch

from lightning_merge._commands._target import literal, loading, refuse_input, refuse_target, save
from lightning_merge.files._layouts import open_file
from lightning_merge.files._refusals import refuse_no_plain
from lightning_merge.files._sets import bytes_of, contiguous, tensors
from lightning_merge.files._write_safetensors import write_safetensors
from lightning_merge.weights import first_mismatch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def export(
    source: str, target: str | os.PathLike[str], name: str | None, strip: str, arch: str | None, force: bool
) -> str:
    """Writes a set and says which, under what names, and how to load it.

    Args:
        source: The checkpoint.
        target: ``.safetensors``, or ``.pt``, ``.pth`` or ``.bin`` for torch's format.
        name: The set; by default the one that the file's score belongs to.
        strip: Prefix to remove from names, with its dot; tensors without it are left out and listed.
        arch: A model of timm that the weights must fit.
        force: Replace an existing file, once the new one is whole.

    Raises:
        ValueError: If something does not fit; nothing is written then.
        OSError: If the system refuses to read or write.
    """
    refuse_target(target, "the output", SUFFIXES, force)
    refuse_input(target, [source])
    file = open_file(source)
    chosen = file.default if name is None else name
    found = file.choose(name)
    strip = strip.removeprefix(found.stripped) if strip.startswith(found.stripped) else strip
    everything = found.state_dict
    state = {key.removeprefix(strip): value for key, value in everything.items() if key.startswith(strip)}
    found_tensors = tensors(state)
    as_safetensors = os.fspath(target).endswith(".safetensors")
    # torch's own format keeps all but what has no numbers.
    refuse_no_plain(source, {key: t for key, t in found_tensors.items() if as_safetensors or t.is_meta})
    weights = contiguous(found_tensors)
    if not weights:
        some = ", ".join(list(everything)[:3])
        raise ValueError(f"no tensor of {source} has a name that begins with {strip!r}; the first are: {some}.")
    extra = {key: value for key, value in state.items() if key not in weights}
    classes = None if arch is None else _refuse_other_architecture(arch, {**weights, **extra}, list(everything))
    about = {"arch": arch, "set": chosen, "source": file.name}
    if as_safetensors:
        write_safetensors(target, weights, about)
    else:
        whole = {**weights, **extra}
        save({"arch": arch, "state_dict": whole} if arch else whole, target)
    lines = [f"{target}: {chosen} of {file.path}, {len(weights)} tensors, {bytes_of(weights) / 2**20:.1f} MiB"]
    if found.stripped:
        lines.append(f"  without {found.stripped!r}, which every name of the file begins with (as under DDP)")
    if left_out := [key for key in everything if not key.startswith(strip)]:
        lines.append(f"  left out, without the prefix {strip!r}: {', '.join(left_out[:8])} ({len(left_out)} in all)")
    lost = [*found.left_out, *(extra if as_safetensors else ())]
    if lost:
        why = "no plain data" if found.left_out else "which safetensors cannot hold; .pt can"
        lines.append(f"  left out, {why}: {', '.join(lost[:8])} ({len(lost)} in all)")
    if arch is None:
        plainly = "safetensors.torch.load_file({path})" if as_safetensors else "torch.load({path}, weights_only=True)"
        how = loading(target, plainly, ", strict=False)" if lost else ")")
    else:
        how = f'timm.create_model("{arch}", num_classes={classes}, checkpoint_path={literal(target)})'
    return "\n".join([*lines, f"  load: {how}"])


def _refuse_other_architecture(arch: str, state: dict[str, Any], names: list[str]) -> int:
    """The number of classes that a model of timm must have for these weights to fit."""
    import timm

    if not timm.is_model(arch):
        near = ", ".join(get_close_matches(arch, timm.list_models(), n=5))
        raise ValueError(f"timm has no model called {arch!r}.{f' Near it: {near}.' if near else ''}")
    with torch.device("meta"):
        model: Any = timm.create_model(arch)
        head = state.get(f"{model.pretrained_cfg['classifier']}.weight")
        classes = model.num_classes if head is None else len(head)
        model = timm.create_model(arch, num_classes=classes)
        problem = first_mismatch(model.state_dict(), tensors(state))
        if problem is None:
            model.load_state_dict(state, assign=True)  # as the line that is printed does
    if problem is not None:
        raise ValueError(
            f"the weights do not fit timm's {arch}: {problem}. If their names begin with the name of the model inside a"
            f" LightningModule, remove it: --strip {names[0].partition('.')[0]}."
        )
    return int(classes)
