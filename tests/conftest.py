"""Set before anything imports torch."""

import os

# The networks of the tests are no faster with several threads, and on busy cores these wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
