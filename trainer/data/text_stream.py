"""Texts of Hugging Face data sets as they stream by: shuffled in blocks, mixed by weight, resumable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from osp_diag.errors import TokenError
from osp_diag.text.sources import chosen_column, dataset_errors, name_without_path, open_dataset
from osp_diag.trainer.data.arrays import sequence_order
from osp_diag.trainer.data.batch import SequenceForm
from osp_diag.trainer.data.tokenizing import Encoder

__all__ = ["StreamedTexts", "TextMixture"]

ENCODED_AT_ONCE = 32


class StreamedTexts:
    """The documents of one data set, as they lie in the stream.

    Documents are shuffled within blocks of so many as ``buffer``, and the files of the data set by the
    library ``datasets``. A block is read again after a resumption, so that the state is small: where the
    block began, how many of its documents were taken, and how many rows before it had no text.

    Parameters
    ----------
    dataset, split, column : as in :class:`osp_diag.trainer.config.DataConfig`
    encoder, form : make documents of texts
    keep : which texts belong to it
    seed : of the order; None leaves it as it is
    buffer : rows of a block
    endless : begin again at the end, in another order

    Raises
    ------
    TokenError : it cannot be read, or has no column of text
    """

    _texts: list[str] | None
    _documents: list[np.ndarray]
    _rows: Iterator[Mapping[str, Any]]

    def __init__(
        self,
        dataset: str,
        split: str,
        column: str | None,
        *,
        encoder: Encoder,
        form: SequenceForm,
        keep: Callable[[str], bool],
        seed: int | None,
        buffer: int,
        endless: bool,
    ) -> None:
        self._name, self._encoder, self._form, self._keep = dataset, encoder, form, keep
        self._seed, self._buffer, self._endless = seed, buffer, endless
        # Now, since it asks the disk, and notes are asked for after every batch.
        self._label = name_without_path(dataset)
        rows, name = open_dataset(dataset, split)
        rows = rows if hasattr(rows, "load_state_dict") else rows.to_iterable_dataset()
        _silence_refilling()
        # A buffer of one shuffles the files alone: what a larger one holds is lost when a run is resumed.
        self._source = rows if seed is None else rows.shuffle(seed=seed, buffer_size=1)
        self._beginning = self._source.state_dict()
        self._rows_before = self._without_before = self._rows_of_block = self._without_of_block = 0
        with dataset_errors(dataset):
            if next(iter(rows), None) is None:
                raise TokenError(f"the data set {dataset} has no rows in its split {name!r}")
            self._column, _ = chosen_column(rows, column, dataset)
        self._begin(0)

    def next(self) -> np.ndarray | None:
        """The tokens of the next document; None at the end, where there is one."""
        while True:
            if self._texts is None:
                self._read()
            assert self._texts is not None
            if self._position < len(self._texts):
                if self._position == len(self._documents):
                    texts = self._texts[self._position : self._position + ENCODED_AT_ONCE]
                    self._documents += [self._form.document(ids) for ids in self._encoder.encode(texts)]
                self._position += 1
                return self._documents[self._position - 1]
            if not self._last_block:
                self._begin(self._epoch, self._block + 1, self._source.state_dict(), reread=False)
            elif not self._endless:
                return None
            elif self._empty:
                raise TokenError(f"the data set {self._name} has no text in its column {self._column!r}")
            else:
                self._begin(self._epoch + 1)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the rows that were read, those of every epoch counted."""
        rows, without = self._rows_before + self._rows_of_block, self._without_before + self._without_of_block
        if not without:
            return ()
        return (f"{self._label}: {without:,} of {rows:,} rows read without a text left out.",)

    def state(self) -> dict[str, Any]:
        """Where the next document is: plain data."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "start": self._start,
            "taken": self._position,
            "rows_before": self._rows_before,
            "rows_without_text_before": self._without_before,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go where :meth:`state` was asked for."""
        self._begin(int(state["epoch"]), int(state["block"]), state["start"])
        # The state of an older run has not counted; then counting begins with this block.
        self._rows_before = int(state.get("rows_before", 0))
        self._without_before = int(state.get("rows_without_text_before", 0))
        self._empty = self._block == 0
        self._read()
        assert self._texts is not None
        self._position = int(state["taken"])
        documents = self._encoder.encode(self._texts[: self._position])
        self._documents = [self._form.document(ids) for ids in documents]

    def _begin(
        self, epoch: int, block: int = 0, start: dict[str, Any] | None = None, *, reread: bool = True
    ) -> None:
        """Stand before a block; ``start`` is the data set's own state there, None at its beginning."""
        self._epoch, self._block, self._start, self._position = epoch, block, start, 0
        self._texts, self._documents = None, []
        self._rows_before += self._rows_of_block
        self._without_before += self._without_of_block
        self._rows_of_block = self._without_of_block = 0
        if block == 0:
            self._empty = True
        if reread:
            # The library shuffles files by the epoch even where nobody asked for it.
            self._source.set_epoch(0 if self._seed is None else epoch)
            self._source.load_state_dict(self._beginning if start is None else start)
            self._rows = iter(self._source)

    def _read(self) -> None:
        """Read the block, and bring it into its order."""
        rows = without = 0
        texts: list[str] = []
        with dataset_errors(self._name, quiet=False):
            while rows < self._buffer and (row := next(self._rows, None)) is not None:
                rows += 1
                text = row[self._column]
                without += text is None
                if text and not text.isspace() and self._keep(text):
                    texts.append(text)
        self._rows_of_block, self._without_of_block = rows, without
        self._last_block = rows < self._buffer
        self._empty = self._empty and not texts
        if self._seed is not None:
            order = sequence_order(self._seed, (self._epoch << 32) + self._block, len(texts))
            texts = [texts[place] for place in order]
        self._texts = texts


class TextMixture:
    """Documents of several data sets, so that each gives its weight's part of the tokens.

    The next document is always of the data set that is furthest behind its part, min tokens/weight: no
    chance is in it, and no part drifts by more than a document.
    """

    def __init__(self, members: Sequence[StreamedTexts], weights: Sequence[float]) -> None:
        self._members, self._weights = list(members), list(weights)
        self._token_counts = [0] * len(self._members)
        self._exhausted: set[int] = set()

    def next(self) -> np.ndarray | None:
        """The tokens of the next document; None where all data sets have ended."""
        while len(self._exhausted) < len(self._members):
            number = min(
                (number for number in range(len(self._members)) if number not in self._exhausted),
                key=lambda number: self._token_counts[number] / self._weights[number],
            )
            document = self._members[number].next()
            if document is not None:
                self._token_counts[number] += len(document)
                return document
            self._exhausted.add(number)
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the rows that were read."""
        return tuple(note for member in self._members for note in member.notes)

    def state(self) -> dict[str, Any]:
        """Where the next document is: plain data."""
        return {"given": list(self._token_counts), "members": [member.state() for member in self._members]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go where :meth:`state` was asked for."""
        self._token_counts = [int(tokens) for tokens in state["given"]]
        self._exhausted = set()
        for member, member_state in zip(self._members, state["members"], strict=True):
            member.load(member_state)


def _silence_refilling() -> None:
    """Leave out a warning of ``datasets`` that what its shuffle buffer held is lost: ours holds nothing."""
    logger = logging.getLogger("datasets.iterable_dataset")
    if _about_refilling not in logger.filters:
        logger.addFilter(_about_refilling)


def _about_refilling(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Loading a state dict of a shuffle buffer")
