"""One stream of tokens out of pieces of arrays, none of which is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

__all__ = ["TokenStream", "tokens_digest"]

HASHED_AT_ONCE = 1 << 22
HASHED_TOKENS = 1 << 30
"""A stream longer than this is hashed in evenly spaced samples: reading it all would hold up the start."""


class TokenStream:
    """Pieces of one-dimensional integer arrays, one after the other, read in windows.

    Memory-mapped arrays stay on disk; what a window needs is read when it is asked for.

    Parameters
    ----------
    pieces : array, first token, token after the last; pieces that continue one another become one
    """

    def __init__(self, pieces: Sequence[tuple[np.ndarray, int, int]]) -> None:
        merged: list[list] = []
        for array, start, stop in pieces:
            if merged and merged[-1][0] is array and merged[-1][2] == start:
                merged[-1][2] = stop
            elif stop > start:
                merged.append([array, start, stop])
        self._arrays: list[np.ndarray] = []
        numbers: dict[int, int] = {}
        for array, _, _ in merged:
            if id(array) not in numbers:
                numbers[id(array)] = len(self._arrays)
                self._arrays.append(array)
        self._array_of = np.asarray([numbers[id(array)] for array, _, _ in merged], dtype=np.int64)
        self._starts = np.asarray([start for _, start, _ in merged], dtype=np.int64)
        lengths = np.asarray([stop - start for _, start, stop in merged], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def windows(
        self, starts: Int64[np.ndarray, " sequence"], length: int, *, padding: int = 0
    ) -> Int64[np.ndarray, "sequence length"]:
        """``length`` tokens from each of ``starts`` on; ``padding`` beyond the stream's end."""
        result = np.empty((len(starts), length), dtype=np.int64)
        piece = np.searchsorted(self._offsets, starts, side="right") - 1
        inside = starts + length <= self._offsets[piece + 1]
        # Where each window begins in its piece's own array.
        local = starts - self._offsets[piece] + self._starts[piece]
        for number, array in enumerate(self._arrays):
            rows = np.flatnonzero(inside & (self._array_of[piece] == number))
            if len(rows):
                views = np.lib.stride_tricks.sliding_window_view(array, length)
                result[rows] = views[local[rows]]
        for row in np.flatnonzero(~inside):
            tokens = self.slice(int(starts[row]), int(starts[row]) + length)
            result[row, : len(tokens)] = tokens
            result[row, len(tokens) :] = padding
        return result

    def slice(self, start: int, stop: int) -> Int64[np.ndarray, " token"]:
        """The tokens from ``start`` up to ``stop``, fewer at the end of the stream."""
        parts = []
        piece = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < min(stop, len(self)):
            end = min(stop, int(self._offsets[piece + 1]))
            local = int(self._starts[piece] - self._offsets[piece])
            parts.append(self._arrays[self._array_of[piece]][local + start : local + end])
            start, piece = end, piece + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)


def tokens_digest(streams: Sequence[TokenStream]) -> str:
    """32 hexadecimal digits of the SHA-256 of the tokens, whatever type they are kept in.

    Of a stream of more than 2³⁰ tokens, its length and 256 evenly spaced blocks of 2²² are read.
    """
    digest = hashlib.sha256()
    for stream in streams:
        digest.update(f"{len(stream)}|".encode())
        starts = np.arange(0, len(stream), HASHED_AT_ONCE)
        if len(stream) > HASHED_TOKENS:
            starts = np.linspace(0, len(stream) - HASHED_AT_ONCE, HASHED_TOKENS // HASHED_AT_ONCE).astype(int)
        for start in starts:
            digest.update(stream.slice(int(start), int(start) + HASHED_AT_ONCE).astype("<u4").tobytes())
    return digest.hexdigest()[:32]
