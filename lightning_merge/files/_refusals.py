"""What is said of files that are not read."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge.files._other_formats import in_quotes, other_format


def runs_code(path: str | os.PathLike[str], which: str) -> str:
    """What is said of a file with more than tensors and plain data in it, and the line that converts it."""
    plain = f"{os.path.splitext(os.fspath(path))[0]}.weights.pt"
    code = (
        f"import torch; x = torch.load({os.fspath(path)!r}, map_location='cpu', weights_only=False);"
        " torch.save(x.state_dict() if hasattr(x, 'state_dict') else {k: v.state_dict() if hasattr(v, 'state_dict')"
        f" else v for k, v in x.items() if 'hyper_parameters' not in str(k)}}, {plain!r})"
    )
    return (
        f"{path} holds Python objects{which} besides tensors and plain data, so reading it would run code."
        f" If you trust whoever wrote it, convert it once:\n  python -c {in_quotes(code)}"
    )


def unreadable(path: str | os.PathLike[str]) -> str:
    """What is said of a file that is no checkpoint, or a part of one."""
    if (kind := other_format(path)) is not None:
        end = "" if "\n" in kind or "tar -xf" in kind else "."  # not behind what is to be copied
        return f"{path} cannot be read: it is {kind}{end}"
    return (
        f"{path} cannot be read: it was cut short (an interrupted save or copy), or torch did not write it."
        " Use an earlier checkpoint of the run."
    )


def refuse_no_plain(path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Checks that tensors can be compared and merged.

    Raises:
        ValueError: If one is quantised, nested or sparse, or has no numbers.
    """
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise ValueError(
                f'{path}: `{name}` has a shape and no numbers: it was saved from the device "meta". Save it once it is'
                " loaded, or leave it out."
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else "sparse"
            raise ValueError(
                f"{path}: `{name}` is a {kind} tensor, which is not read in parts and has no mean."
                " Save it as a plain one (`dequantize()`, `to_dense()`), or leave it out."
            )
