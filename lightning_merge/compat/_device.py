"""The argument ``device`` of Lightning's averaging callbacks; ours keep an average beside the model."""

from typing import Any

import torch

from lightning_merge._checks import whole


def checked_device(device: Any) -> Any:
    """The device as it was given.

    Raises:
        TypeError: If it is of the wrong type.
        ValueError: If torch knows no such device.
    """
    if device is None or isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        return whole("device", device, 0, 127)  # more than torch counts
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be None or a device, got {device!r}: {error}") from None
    return device


def refuse_device(owner: str, device: torch.device | str | int | None, of_model: torch.device) -> None:
    """Checks that a device is that of the model.

    Raises:
        ValueError: If it is not.
    """
    asked = (
        torch.device("cuda", device) if isinstance(device, int) else None if device is None else torch.device(device)
    )
    if asked is None or (asked.type == of_model.type and asked.index in (None, of_model.index)):
        return
    raise ValueError(
        f"`device` of {owner} must be None or the device of the model ({of_model}), got {device!r}: the average lives"
        " beside the model. Leave the argument out."
    )
