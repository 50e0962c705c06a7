"""``soup`` of folders that peft wrote: their products are merged, and the result is such a folder again."""

import argparse
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from lightning_merge._commands._target import folder_of, literal, refuse_input

_RULES = ("uniform", "model-stock", "iso-c", "tsv-m", "tall", "metagpt")
_OF_OTHERS = ("base", "statistics", "base_statistics", "config", "data", "per", "masks")


def peft_soup(folders: Sequence[Path], options: argparse.Namespace) -> str:
    """Merges, writes the folder, and says what is in it.

    Raises:
        ValueError: If something does not fit; nothing is written then.
    """
    from lightning_merge._commands._from_base import combiner_of
    from lightning_merge.adapters import Adapter, combine_adapters
    from lightning_merge.combiners import Average
    from lightning_merge.files import replacing_folder
    from lightning_merge.files._folders import class_of, config_of

    target = _target(folders, options)
    combiner = Average() if options.rule == "uniform" else combiner_of(options)
    adapters = [Adapter.read(folder) for folder in folders]
    merged, lost = combine_adapters(combiner, adapters, options.rank)
    files = [str(folder) for folder in folders]
    hashes = [sha256(path.read_bytes()).hexdigest() for folder in folders for path in _weights(folder)]
    provenance = {"rule": repr(combiner), "files": files, "sha256": hashes, "lost": lost}
    with replacing_folder(target) as unfinished:
        merged.write(unfinished, json.dumps(provenance))
    layers = len(merged.vector())
    if merged.kind == "LORA":
        ranks = ", ".join(str(each.rank) for each in adapters)
        how = f"products of rank {ranks}, written with rank {merged.rank}: {lost:.2%} from the exact merge (relative)"
    else:
        how = "what the scalings of (IA)3 add to 1"
    return "\n".join(
        [
            f"{options.out}: {options.rule} of {len(folders)} adapters, {layers} layers",
            f"  {how}",
            f"  load: {class_of(config_of(target), literal(target))}",
        ]
    )


def _target(folders: Sequence[Path], options: argparse.Namespace) -> Path:
    """The folder to write, if everything asked for makes sense for adapters."""
    if options.rule not in _RULES:
        raise ValueError(f"`--rule` must be one of {', '.join(_RULES)}, or lorahub, for adapters, got {options.rule}.")
    given = [name for name in _OF_OTHERS if getattr(options, name)] + ["align"] * options.align
    if options.rule in ("uniform", "model-stock", "metagpt") and options.scale is not None:
        given.append("scale")
    if given:
        name = given[0].replace("_", "-")
        raise ValueError(f"`--{name}` must be left out for `--rule {options.rule}` of adapters, which has none.")
    target = folder_of(options.out)
    if target is None or target.is_file():
        raise ValueError(f"`--out` must be a folder for adapters (a name without an ending), got {options.out}.")
    refuse_input(target, folders)
    if target.exists() and not (options.force and (target / "adapter_config.json").is_file()):
        raise ValueError(f"{target} exists already; --force replaces it if it is the folder of an adapter.")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} to.")
    return target


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("adapter_model*") if path.is_file())
