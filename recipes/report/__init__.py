"""The report of a run: figures, a page, and the path of its weights."""
