"""Sequences as a model trains on them: inputs, next tokens, and the documents they are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["IGNORED", "Batch", "SequenceForm"]

IGNORED = -100
"""The label of a position whose prediction does not count (PyTorch's ``ignore_index``)."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one step, or of a part of it.

    Attributes
    ----------
    input_ids : what the model reads, int64 of shape (sequence, position)
    labels : the next token at every position, −100 where none is to be predicted; same shape
    document_ids : number of the document within its sequence, from 0; None where documents are not kept
        apart
    """

    input_ids: Int64[Tensor, "sequence position"]
    labels: Int64[Tensor, "sequence position"]
    document_ids: Int64[Tensor, "sequence position"] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, sequences: slice) -> Batch:
        """Some of the sequences."""
        return self._each(lambda ids: ids[sequences])

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """A copy on a device; from pinned memory it does not hold up the host."""
        return self._each(lambda ids: ids.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in pinned memory."""
        return self._each(lambda ids: ids.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents = None if self.document_ids is None else change(self.document_ids)
        return Batch(change(self.input_ids), change(self.labels), documents)


@dataclass(frozen=True)
class SequenceForm:
    """How documents lie in a stream of tokens, and how a window of the stream becomes a sequence.

    A document is followed by ``end``, and with ``bos="document"`` preceded by ``begin``. Where both are
    the same token it stands once between two documents: it ends the one and begins the next.

    Attributes
    ----------
    length : positions T of a sequence
    bos : ``document``, ``sequence`` or ``none``, as in :class:`osp_diag.trainer.config.DataConfig`
    begin, end : ids of BOS and of what ends a document
    separate : whether documents are kept apart: then no label is of another document than its input, and
        batches bear document ids
    """

    length: int
    bos: str
    begin: int
    end: int
    separate: bool

    @property
    def body(self) -> int:
        """Tokens of the stream that a sequence reads: T, or T − 1 beside a BOS of its own."""
        return self.length - (self.bos == "sequence")

    @property
    def shares_delimiter(self) -> bool:
        """One token ends a document and begins the next."""
        return self.bos == "document" and self.begin == self.end

    def document(self, ids: np.ndarray) -> np.ndarray:
        """A document as it lies in the stream; where the delimiter is shared, the one before it."""
        if self.shares_delimiter:
            return np.concatenate([[self.begin], ids])
        before = [self.begin] if self.bos == "document" else []
        return np.concatenate([np.asarray(before, dtype=ids.dtype), ids, np.asarray([self.end], ids.dtype)])

    def batch(
        self,
        windows: Int64[np.ndarray, "sequence body_plus_1"],
        present: Int64[np.ndarray, " sequence"] | None = None,
    ) -> Batch:
        """Sequences from windows of ``body`` + 1 tokens, the last of which is a label alone.

        ``present`` counts the tokens of a window that are not padding; None: all.
        """
        read, labels = windows[:, :-1], windows
        padding = None if present is None else np.arange(windows.shape[1]) >= present[:, None]
        if padding is not None:
            labels = np.where(padding, IGNORED, labels)
        if self.separate and not self.shares_delimiter:
            labels = labels.copy()
            labels[:, 1:][read == self.end] = IGNORED
        documents = self._document_ids(windows, padding) if self.separate else None
        if self.bos == "sequence":
            begin = np.full((len(windows), 1), self.begin, dtype=np.int64)
            inputs = np.concatenate([begin, read], axis=1)
            documents = None if documents is None else np.concatenate([documents[:, :1], documents], axis=1)
        else:
            inputs, labels = np.ascontiguousarray(read), np.ascontiguousarray(labels[:, 1:])
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            None if documents is None else torch.from_numpy(documents),
        )

    def _document_ids(self, windows: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
        """Of every token that is read: how many documents began in the sequence after its first token."""
        begins = np.zeros((len(windows), windows.shape[1] - 1), dtype=bool)
        # A shared delimiter is the first token of its document; another one the last.
        begins[:, 1:] = (windows[:, 1:-1] if self.shares_delimiter else windows[:, :-2]) == self.end
        if padding is not None:
            begins[padding[:, :-1]] = False
            padding_starts = padding[:, 1:-1] & ~padding[:, :-2]
            begins[:, 1:] |= padding_starts  # padding is a document of its own
        return np.cumsum(begins, axis=1, dtype=np.int64)
