"""What a fit cannot go on from, said before anything is restored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_merge.files._label import KEY
from lightning_merge.files._read import read
from lightning_merge.files._sharded import is_sharded_checkpoint


def description(path: Path) -> Mapping[str, Any]:
    """What a file, or a folder of parts, says beside its tensors; nothing where that cannot be read."""
    try:
        content = read(path / "meta.pt" if is_sharded_checkpoint(path) else path, "meta", check=False)
    except (ValueError, NotImplementedError):
        return {}
    return content if isinstance(content, Mapping) else {}


def refuse_unresumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """For what has no optimizer states, or has them where Lightning does not look.

    Raises:
        ValueError: With what to take instead.
    """
    if path.is_dir():
        if KEY in checkpoint:
            refuse_weights_only(checkpoint[KEY])
        elif checkpoint and "lr_schedulers" not in checkpoint:
            raise ValueError(_weights_only("the set 'raw'"))
    elif "optimizer_0" in checkpoint and "optimizer_states" not in checkpoint:
        raise ValueError(
            f"{path} was put together from a sharded checkpoint, and a fit cannot be resumed from it: its optimizer"
            " states are not where Lightning looks for them. Go on from the folder that it was made of. Its weights"
            f" load with `load_from_checkpoint`; `lightning-merge inspect {path}` says which there are."
        )
    elif KEY in checkpoint and "optimizer_states" not in checkpoint:
        refuse_weights_only(checkpoint[KEY])


def refuse_weights_only(section: Mapping[str, Any]) -> None:
    """For a file or folder with our section.

    Raises:
        ValueError: If it holds weights only.
    """
    if "states" not in section:
        raise ValueError(_weights_only(f"the set {section.get('holds')!r}"))


def _weights_only(what: str) -> str:
    return (
        f"this checkpoint holds weights only ({what}), and a fit cannot be resumed from it: raw weights, averages and"
        " optimizer states are in files written without `save_weights_only=True`."
    )
