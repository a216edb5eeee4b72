"""Compressed files of text, unpacked as they are read and never to more than text compresses to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from osp_diag.errors import TokenError

__all__ = ["PACKED", "unpacked"]

PACKED: Mapping[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
"""Compressed files are read through these; a Parquet file compresses itself."""
MOST_RATIO, FREE = 100, 16 * 2**20
"""A file may unpack to so many times its size and so many bytes more: text to some 3 to 30 times."""


def unpacked(file: Path) -> IO[bytes]:
    """The bytes of a compressed file.

    Raises
    ------
    TokenError : while it is read: it unpacks to far more than text does
    """
    most = MOST_RATIO * file.stat().st_size + FREE
    return io.BufferedReader(_Bounded(file, PACKED[file.suffix](file), most))


class _Bounded(io.RawIOBase):
    """A stream of which at most so many bytes are given."""

    def __init__(self, file: Path, stream: IO[bytes], most: int) -> None:
        self.file, self.stream, self.most, self.given = file, stream, most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        self.given += len(data)
        if self.given > self.most:
            raise TokenError(
                f"{self.file} unpacks to more than {self.most:,} bytes, far more than text compresses to; "
                "unpack it yourself if it is meant so"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()
