"""What is said of files that are not read."""

import os

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
