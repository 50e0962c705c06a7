"""The file a search writes its evaluations to, and continues from."""

import json
import os
from pathlib import Path
from typing import Any

from lightning_merge._checks import number as checked
from lightning_merge._checks import numbers
from lightning_merge.search._measured import Measured
from lightning_merge.search._spaces import Coefficients


class Log:
    """One JSON object a line: what is searched first, then every evaluation as soon as it is made.

    Args:
        path: Made if it does not exist. What is there is read; a last line that was cut off is removed.
        header: What is searched. A file of another search is refused.

    Raises:
        ValueError: If the file is the log of another search, or no log.
    """

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any]) -> None:
        self.path = Path(path)
        self.known: dict[Coefficients, list[Measured | None]] = {}
        lines = self._whole_lines()
        if lines:
            self._check(lines[0], header)
            for number, line in enumerate(lines[1:], 2):
                self._take(number, line)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"search": header})

    def write(self, coefficients: Coefficients, measured: Measured | None) -> None:
        """Adds an evaluation; it is on disk when this returns. ``None``: rejected."""
        row: dict[str, Any] = {"coefficients": coefficients, "score": None if measured is None else measured.value}
        if measured is not None and measured.gradient is not None:
            row["gradient"] = list(measured.gradient)
        if measured is not None and measured.parts is not None:
            row["parts"] = list(measured.parts)
        self._append(row)

    def _whole_lines(self) -> list[str]:
        if self.path.is_dir():
            raise ValueError(f"`log` must be a file, got the folder {self.path}.")
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # stopped in the middle of a write
            os.truncate(self.path, whole)
        lines = content[:whole].split(b"\n")[:-1]
        return [self._text(number, line) for number, line in enumerate(lines, 1)]

    def _text(self, number: int, line: bytes) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise ValueError(self._wrong(number, line)) from None

    def _wrong(self, number: int, line: str | bytes) -> str:
        return f"{self.path}, line {number}, holds what no search wrote: {line[:80]!r}. Remove the line, or the file."

    def _check(self, line: str, header: dict[str, Any]) -> None:
        try:
            found = dict(json.loads(line)["search"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{self.path} is not the log of a search. Give `log` another file.") from None
        expected = json.loads(json.dumps(header))
        for key in expected:
            if found.get(key) != expected[key]:
                raise ValueError(
                    f"{self.path} is the log of another search: `{key}` is {found.get(key)} there and {expected[key]}"
                    " here. Give `log` another file, or search as before."
                )

    def _take(self, number: int, line: str) -> None:
        try:
            row = json.loads(line)
            gradient, parts, score = row.get("gradient"), row.get("parts"), row["score"]
            coefficients = numbers("coefficients", row["coefficients"])
            if score is not None:
                score = None if score != score else checked("score", score, "[-inf, inf]")  # NaN: it lost
            measured = None if score is None else Measured(score, gradient, parts)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(self._wrong(number, line)) from None
        self.known.setdefault(coefficients, []).append(measured)

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
