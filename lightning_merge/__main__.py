"""``python -m lightning_merge``: as the ``lightning-merge`` command."""

import sys

from lightning_merge.cli import main

if __name__ == "__main__":
    sys.exit(main())
