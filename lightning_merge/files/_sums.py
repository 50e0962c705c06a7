"""Checksums of the parts of a zip file, looked at as parts are read."""

import bisect
import os
import zipfile
import zlib
from pathlib import Path

from lightning_merge.files._check import opened

_PIECE = 2**20
_HEADER = 30  # bytes of a header before the name


class Sums:
    """What the index of a zip file says about the bytes of each part.

    Args:
        path: A file that torch wrote.
    """

    def __init__(self, path: Path) -> None:
        with opened(path) as file, zipfile.ZipFile(file) as parts:
            entries = sorted((e.header_offset, e.file_size, e.CRC) for e in parts.infolist())
        # Without sums: `torch.serialization.set_crc32_options(False)`.
        self._entries = entries if any(crc for _, _, crc in entries) else []
        self._sound: set[int] = set()

    def problem(self, handle: int, start: int, size: int) -> str | None:
        """What is wrong with the part that these bytes are in, in words; reads it at the first call."""
        index = bisect.bisect_right(self._entries, (start, 0, 0)) - 1
        if not size or not self._entries or index in self._sound:
            return None
        if index < 0:
            return "is in none of its parts"
        header, length, expected = self._entries[index]
        begins = header + _HEADER + sum(_lengths(handle, header))
        if start < begins or start + size > begins + length:
            return "reaches beyond its part"
        found, done = 0, 0
        piece = bytearray(min(_PIECE, length))
        while done < length:
            count = os.preadv(handle, [memoryview(piece)[: length - done]], begins + done)
            if not count:
                return "ends too early"
            found = zlib.crc32(memoryview(piece)[:count], found)
            done += count
        if found != expected:
            return "is not as it was written (its checksum differs)"
        self._sound.add(index)
        return None


def _lengths(handle: int, header: int) -> tuple[int, int]:
    """Bytes of the name and of what is between it and the content."""
    fixed = os.pread(handle, _HEADER, header)
    return int.from_bytes(fixed[26:28], "little"), int.from_bytes(fixed[28:30], "little")
