"""Files of weights: what is in them, in whatever library's layout, and how they are written.

``_layouts`` (the sets in a file) is imported by its name: it needs the rules, and a rule may read a file.
"""

from lightning_merge.files._check import check
from lightning_merge.files._label import FORMAT, KEY, Label
from lightning_merge.files._read import read
from lightning_merge.files._write import atomic, exists, is_remote, join, replacing, replacing_folder

__all__ = [
    "FORMAT",
    "KEY",
    "Label",
    "atomic",
    "check",
    "exists",
    "is_remote",
    "join",
    "read",
    "replacing",
    "replacing_folder",
]
