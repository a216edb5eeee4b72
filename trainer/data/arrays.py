"""Training data whose documents are known from the start: in memory, or memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from osp_diag.errors import TokenError
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data.batch import Batch, SequenceForm
from osp_diag.trainer.data.corpus import Corpus
from osp_diag.trainer.data.token_stream import tokens_digest
from osp_diag.trainer.data.training_data import Dealing, TrainingData

__all__ = ["ArrayData", "greedy_starts", "sequence_order"]


class ArrayData(TrainingData):
    """Sequences of arrays of tokens, in a new order every epoch.

    An epoch reads every sequence once. With ``packing="stream"`` these are all tokens but a remainder at
    the end shorter than a sequence; with ``"documents"`` all but the ends of documents that did not fit.
    Batches go on from one epoch into the next.

    Parameters
    ----------
    corpus : documents to train on, some of which are held out where ``validation`` is None
    validation : held-out documents
    source : what the tokens are, in words
    """

    def __init__(
        self,
        config: DataConfig,
        form: SequenceForm,
        tokenizer: Any | None,
        dealing: Dealing,
        *,
        corpus: Corpus,
        validation: Corpus | None,
        source: str,
    ) -> None:
        super().__init__(config, form, tokenizer, dealing)
        is_held_out = np.zeros(len(corpus), dtype=bool)
        if validation is None:
            corpus, is_held_out = self._hold_out(corpus)
        is_trained = ~is_held_out
        self._stream = corpus.stream(is_trained, form)
        if validation is None:
            self._held_out = corpus.stream(is_held_out, form)
        else:
            self._held_out = validation.stream(np.ones(len(validation), dtype=bool), form)
        self._starts = self._sequence_starts(corpus, is_trained)
        self._check_size(source)
        self.tokens, self.documents = len(self._stream), int(is_trained.sum())
        self.fingerprint = tokens_digest([self._stream, self._held_out])
        self.description = (
            f"{source}: {self.documents:,} documents, {self.tokens:,} tokens; "
            f"{len(self._held_out):,} tokens held out"
        )
        self._note_cuts()
        self._next_sequence = 0
        self._order = lru_cache(maxsize=2)(self._make_order)  # a batch lies in two epochs at most

    @property
    def sequences(self) -> int:
        """Sequences of an epoch."""
        return len(self._starts)

    @property
    def epoch(self) -> float:
        """Epochs given out so far, with the part of the present one."""
        return self._next_sequence / self.sequences

    def next_batch(self) -> Batch:
        numbers = (self._next_sequence + np.arange(self.dealing.batch_size))[self.dealing.of_rank]
        epochs, places = np.divmod(numbers, self.sequences)
        sequences = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            sequences[rows] = self._order(int(epoch))[places[rows]]
        self._next_sequence += self.dealing.batch_size
        starts, length = self._starts[sequences], self.form.body + 1
        windows = self._stream.windows(starts, length, padding=self.form.end)
        present = None
        if self.config.packing == "documents" and (starts + length > len(self._stream)).any():
            present = np.minimum(length, len(self._stream) - starts)
        return self.form.batch(windows, present)

    def _position(self) -> dict[str, Any]:
        return {"sequences": self._next_sequence}

    def _go_to(self, position: Mapping[str, Any]) -> None:
        self._next_sequence = int(position["sequences"])

    def _held_out_tokens(self, tokens: int) -> Int64[np.ndarray, " token"]:
        return self._held_out.slice(0, tokens)

    def _make_order(self, epoch: int) -> Int64[np.ndarray, " sequence"]:
        if not self.config.shuffle:
            return np.arange(self.sequences)
        return sequence_order(self.config.seed, epoch, self.sequences)

    def _sequence_starts(self, corpus: Corpus, is_trained: np.ndarray) -> Int64[np.ndarray, " sequence"]:
        body, length = self.form.body, len(self._stream)
        if self.config.packing == "stream":
            return np.arange(max(0, (length - 1) // body)) * body
        starts = greedy_starts(corpus.document_starts(is_trained, self.form), body)
        return starts[starts < length - 1]

    def _hold_out(self, corpus: Corpus) -> tuple[Corpus, Bool[np.ndarray, " document"]]:
        """Which documents are held out. Where whole ones would be most of the text, its end is."""
        fraction = self.config.validation_fraction
        is_held_out = corpus.held_out(fraction)
        share = np.diff(corpus.boundaries)[is_held_out].sum() / corpus.tokens
        if is_held_out.any() and share <= max(0.5, 2 * fraction):
            return corpus, is_held_out
        self.notes += (
            "There are too few documents to hold out whole ones; the end of the text is held out.",
        )
        corpus = corpus.with_end_held_out(fraction)
        return corpus, corpus.held_out(fraction)

    def _check_size(self, source: str) -> None:
        if self.sequences == 0:
            raise TokenError(
                f"{source} has {len(self._stream):,} tokens for training, fewer than one sequence of "
                f"data.sequence_length={self.config.sequence_length} with its labels; give more text "
                "or a shorter sequence"
            )
        if self.sequences < self.dealing.batch_size:
            raise TokenError(
                f"{source} makes {self.sequences:,} sequences of data.sequence_length="
                f"{self.config.sequence_length}, fewer than one batch of "
                f"batch_size={self.dealing.batch_size}; give more text, a smaller batch or shorter sequences"
            )

    def _note_cuts(self) -> None:
        if self.config.packing == "documents":
            tokens_read = np.minimum(self.form.body, len(self._stream) - self._starts).sum()
            unread = 1 - tokens_read / len(self._stream)
            if unread > 0:
                self.notes += (
                    f"data.packing=documents leaves out {unread:.1%} of the tokens: the ends of documents "
                    "that did not fit.",
                )


def greedy_starts(documents: Int64[np.ndarray, " document"], length: int) -> Int64[np.ndarray, " sequence"]:
    """Where sequences begin: each with the first document after the ``length`` tokens of the one before."""
    # For each document the first one that begins a whole sequence or more after it.
    following = np.searchsorted(documents, documents + length).tolist()
    firsts, document = [], 0
    while document < len(documents):
        firsts.append(document)
        document = following[document]
    return documents[firsts]


def sequence_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " sequence"]:
    """A permutation that seed and epoch alone decide.

    It sorts the raw output of Philox-4x64 (Salmon et al. 2011), which no release of NumPy may change; what
    ``Generator.permutation`` makes of it may.
    """
    key = np.asarray([seed & (2**64 - 1), epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
