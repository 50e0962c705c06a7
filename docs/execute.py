"""Executes the notebooks and keeps their figures and what they print: ``python docs/execute.py``."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent / "notebooks"


def cleaned(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without warnings, progress and paths of the machine."""
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                each for each in cell.outputs if each.get("name") == "stdout" or "image/png" in each.get("data", {})
            ]
    return book


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            book = nbformat.read(path, as_version=4)
            NotebookClient(book, timeout=600, resources={"metadata": {"path": folder}}).execute()
        nbformat.write(cleaned(book), path)
        print(path)
