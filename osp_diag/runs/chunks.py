"""The bytes of a chunk held against what its array declares, before memory is taken for them."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

from numcodecs.zstd import Zstd

from osp_diag.errors import StoreError

__all__ = ["MOST_TEXT_BYTES", "check_presence", "check_texts", "decompressed", "is_lost"]

MOST_TEXT_BYTES = 64 * 2**20
"""Of a chunk of texts, whose length in memory nothing declares."""
_MOST_MADE_UP = 256 * 2**20
_MOST_RATIO = 1000
"""Arrays of more than so many bytes may be at most so many times larger than their chunks on disk."""
_MAGIC = 0xFD2FB528


def decompressed(data: bytes, expected: int | None, where: str) -> bytes:
    """The bytes of a zstd frame, of which there have to be ``expected`` (None: texts, of any length).

    Raises
    ------
    StoreError : the frame is damaged, or declares another size, for which no memory is taken
    """
    size = _frame_size(data)
    most = MOST_TEXT_BYTES if expected is None else expected
    if size is None or size > most or (expected is not None and size != expected):
        declares = "is no zstd frame that says its size" if size is None else f"declares {size:,} bytes"
        wanted = f"at most {most:,}" if expected is None else f"{expected:,}"
        raise StoreError(
            f"chunk {where} is damaged (it {declares}, not {wanted}); restore the run from a copy"
        )
    try:
        raw = Zstd().decode(data)
    except (RuntimeError, ValueError) as error:
        raise StoreError(f"chunk {where} is damaged ({error}); restore the run from a copy") from error
    return bytes(raw)


def _frame_size(data: bytes) -> int | None:
    """The size that the header of a zstd frame declares (RFC 8878, 3.1.1.1); None if it declares none."""
    if len(data) < 6 or struct.unpack_from("<I", data)[0] != _MAGIC:
        return None
    descriptor = data[4]
    single, flag = bool(descriptor & 0x20), descriptor >> 6
    width = (1 if single else 0, 2, 4, 8)[flag]
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    field = data[start : start + width]
    if not width or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


def check_texts(raw: bytes, count: int, where: str) -> None:
    """Refuse texts whose number or lengths are not what the bytes hold.

    The form is numcodecs' ``vlen-utf8``: how many there are, then the length and the bytes of each.
    """
    position, number = 4, int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or number != count:
        raise StoreError(
            f"chunk {where} is damaged (it declares {number:,} texts, not {count:,}); restore the run from "
            "a copy"
        )
    for _ in range(count):
        length = int.from_bytes(raw[position : position + 4], "little")
        position += 4 + length
        if position > len(raw):
            raise StoreError(
                f"chunk {where} is damaged (a text goes beyond its end); restore the run from a copy"
            )


def check_presence(declared: int, present: Callable[[], int], where: object) -> None:
    """Refuse an array far larger than its chunks could hold, of which reading would only make up elements.

    Parameters
    ----------
    declared : bytes of the array in memory
    present : tells the bytes of its chunks on disk; asked for large arrays only
    """
    if declared > _MOST_MADE_UP and declared > _MOST_RATIO * (size := present()):
        raise StoreError(
            f"array {where} declares {declared:,} bytes, and its chunks on disk have {size:,}; restore the "
            "run from a copy"
        )


def is_lost(
    index: Sequence[int], counts: Sequence[int], growing: bool, exists: Callable[[int], bool]
) -> bool:
    """Whether a chunk that is not there was there once.

    An array that does not grow has all of its chunks. One that grows may have begun later than its axis: then
    its first chunks are not there, but every one after the first that is.

    Parameters
    ----------
    index, counts : of the chunk, and how many there are along each dimension
    growing : whether the first dimension grows
    exists : whether the chunk at a place along the first dimension is there
    """
    if not growing or math.prod(counts) == 1:
        return True
    return any(exists(place) for place in range(index[0])) or not any(
        exists(place) for place in range(index[0] + 1, counts[0])
    )
