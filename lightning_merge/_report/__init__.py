"""The report of a run as a page of its own, and of several runs over each other."""
