"""``lightning-merge average``: one run's checkpoints merged into one; see ``_combine``."""

from lightning_merge._commands._combine import run
from lightning_merge._commands._combine_arguments import add_average as add_arguments

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = "Merge the checkpoints of one run into one file."
