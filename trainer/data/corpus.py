"""Documents as arrays of tokens, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from osp_diag.errors import TokenError
from osp_diag.probing.checkpoint import progress_bar
from osp_diag.trainer.data.batch import SequenceForm
from osp_diag.trainer.data.sources import Document
from osp_diag.trainer.data.token_files import token_array
from osp_diag.trainer.data.token_stream import TokenStream
from osp_diag.trainer.data.tokenizing import Encoder

__all__ = ["Corpus", "encoded", "held_out_share", "read_token_files", "text_key"]

ENCODED_AT_ONCE = 64
SCANNED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Documents one after the other, over one or several arrays that each end with a document's end.

    Attributes
    ----------
    arrays : one-dimensional, of any integer type; may be memory-mapped
    boundaries : where documents begin, counted over all arrays, and where the last one ends
    keys : of each document, a number that decides alone whether it is held out
    largest : the largest id
    """

    arrays: tuple[np.ndarray, ...]
    boundaries: Int64[np.ndarray, " document_plus_1"]
    keys: UInt64[np.ndarray, " document"]
    largest: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, what ends them included."""
        return int(self.boundaries[-1])

    def held_out(self, fraction: float) -> Bool[np.ndarray, " document"]:
        """Which documents are held out: those with the smallest keys, up to that part of the tokens.

        At least one is, and at least one is not. Documents of the same text have the same key, so none is
        both learned and held out.
        """
        order = np.argsort(self.keys, kind="stable")
        tokens_up_to = np.cumsum(np.diff(self.boundaries)[order])
        count = min(int(np.searchsorted(tokens_up_to, fraction * self.tokens)), len(order) - 1)
        is_held_out = self.keys <= self.keys[order[count]]
        if is_held_out.all():
            is_held_out = np.zeros(len(self), dtype=bool)
            is_held_out[order[0]] = len(self) > 1
        return is_held_out

    def with_end_held_out(self, fraction: float) -> Corpus:
        """The same, cut so that what is held out is the end, that part of the tokens."""
        cut = max(1, self.tokens - max(1, round(fraction * self.tokens)))
        boundaries = np.union1d(self.boundaries, [cut])
        keys = (boundaries[:-1] < cut).astype(np.uint64)
        return Corpus(self.arrays, boundaries, keys, self.largest)

    def stream(self, mask: Bool[np.ndarray, " document"], form: SequenceForm) -> TokenStream:
        """The documents of ``mask`` as a stream, with BOS before the first where documents have it."""
        pieces = list(self._pieces(mask))
        if form.bos == "document" and pieces:
            array, start, _ = pieces[0]
            if form.shares_delimiter or array[start] != form.begin:
                pieces.insert(0, (np.asarray([form.begin], dtype=np.int64), 0, 1))
        return TokenStream(pieces)

    def document_starts(
        self, mask: Bool[np.ndarray, " document"], form: SequenceForm
    ) -> Int64[np.ndarray, " document_of_mask"]:
        """Where the documents of ``mask`` begin in :meth:`stream`, a delimiter they share included."""
        lengths = np.diff(self.boundaries)[mask]
        starts = np.cumsum(lengths) - lengths
        if not form.shares_delimiter and len(self.stream(mask, form)) > lengths.sum():
            starts[1:] += 1  # the first has a BOS that is no part of it
        return starts

    def _pieces(self, mask: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """Runs of documents of ``mask``, cut where an array ends."""
        edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
        firsts, lasts = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        offsets = np.concatenate([[0], np.cumsum([len(array) for array in self.arrays])])
        for first, last in zip(self.boundaries[firsts], self.boundaries[lasts], strict=True):
            number = int(np.searchsorted(offsets, first, side="right")) - 1
            start, stop = int(first), int(last)
            while start < stop:
                end = min(stop, int(offsets[number + 1]))
                shift = int(offsets[number])
                yield self.arrays[number], start - shift, end - shift
                start, number = end, number + 1


# Out of text


def encoded(documents: Iterable[Document], encoder: Encoder, form: SequenceForm, label: str) -> Corpus:
    """Documents of text, tokenised.

    Raises
    ------
    TokenError : there is no text at all
    """
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    keys: list[int] = []
    # Where one delimiter serves both ends, the one before the first document is the stream's.
    end = np.asarray([form.end], dtype=encoder.dtype)
    before = [np.asarray([form.begin], dtype=encoder.dtype)] if _opens_documents(form) else []
    remaining = iter(documents)
    with progress_bar(f"tokenising {label}", "documents") as progress:
        while texts := [document.text for document in islice(remaining, ENCODED_AT_ONCE)]:
            for text, ids in zip(texts, encoder.encode(texts), strict=True):
                if len(ids):
                    parts += [*before, ids, end]
                    lengths.append(len(before) + len(ids) + 1)
                    keys.append(text_key(text))
            if progress is not None:
                progress(len(lengths), None)  # type: ignore[arg-type]  # rich draws a bar without an end
    if not parts:
        raise TokenError(f"{label} is empty: there is no text to train on")
    tokens = np.concatenate(parts)
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus((tokens,), boundaries, np.asarray(keys, dtype=np.uint64), int(tokens.max()))


def _opens_documents(form: SequenceForm) -> bool:
    return form.bos == "document" and not form.shares_delimiter


def text_key(text: str) -> int:
    """64 bits that the text alone decides."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def held_out_share(text: str) -> float:
    """A number from 0 to 1 that the text alone decides; texts below ``validation_fraction`` are held out."""
    return text_key(text) / 2**64


# Out of files of ids


def read_token_files(files: Sequence[Path], form: SequenceForm, key: str, vocabulary_size: int) -> Corpus:
    """Files of ids, as they are: ``form.end`` ends documents, and so does the end of a file.

    Raises
    ------
    TokenError : a file is none of ids, is empty, or its documents lack the BOS that ``form`` expects
    """
    arrays: list[np.ndarray] = []
    boundaries: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    length, largest = 0, 0
    for file in files:
        array = token_array(file, key, vocabulary_size)
        ends, most = _scan(array, form.end, file, key)
        largest = max(largest, most)
        if _opens_documents(form) and array[0] != form.begin:
            raise TokenError(
                f"{key}={file} begins with id {array[0]}, not with BOS ({form.begin}), which "
                "data.bos=document expects before every document; put it there, or set data.bos to none or "
                "sequence"
            )
        arrays.append(array)
        if not len(ends) or ends[-1] != len(array):
            arrays.append(np.asarray([form.end], dtype=np.int64))
            ends = np.append(ends, len(array) + 1)
        boundaries.append(length + ends)
        length += int(ends[-1])
    edges = np.concatenate(boundaries)
    return Corpus(tuple(arrays), edges, _mixed(np.arange(len(edges) - 1, dtype=np.uint64)), largest)


def _scan(array: np.ndarray, end: int, file: Path, key: str) -> tuple[Int64[np.ndarray, " document"], int]:
    """Where documents end (the index after ``end``), and the largest id."""
    ends, largest, smallest = [], 0, 0
    with progress_bar(f"reading {file.name}", "tokens") as progress:
        for start in range(0, len(array), SCANNED_AT_ONCE):
            part = array[start : start + SCANNED_AT_ONCE]
            ends.append(np.flatnonzero(part == end) + start + 1)
            largest, smallest = max(largest, int(part.max())), min(smallest, int(part.min()))
            if progress is not None:
                progress(start + len(part), len(array))
    if smallest < 0:
        raise TokenError(f"{key}={file} has the id {smallest}; token ids are 0 or more")
    return np.concatenate(ends).astype(np.int64), largest


def _mixed(numbers: UInt64[np.ndarray, " document"]) -> UInt64[np.ndarray, " document"]:
    """Numbers as if drawn at random, one to one (SplitMix64; Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
