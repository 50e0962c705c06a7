"""``lightning-merge soup``: checkpoints of several runs merged into one; see ``_combine``."""

from lightning_merge._commands._combine import run
from lightning_merge._commands._combine_arguments import add_soup as add_arguments

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = "Merge checkpoints of several runs into one file."
