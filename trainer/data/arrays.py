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
        held = np.zeros(len(corpus), dtype=bool)
        if validation is None:
            corpus, held = self._hold_out(corpus)
        kept = ~held
        self._stream = corpus.stream(kept, form)
        if validation is None:
            self._held_out = corpus.stream(held, form)
        else:
            self._held_out = validation.stream(np.ones(len(validation), dtype=bool), form)
        self._starts = self._sequence_starts(corpus, kept)
        self._check_size(source)
        self.tokens, self.documents = len(self._stream), int(kept.sum())
        self.fingerprint = tokens_digest([self._stream, self._held_out])
        self.description = (
            f"{source}: {self.documents:,} documents, {self.tokens:,} tokens; "
            f"{len(self._held_out):,} tokens held out"
        )
        self._note_cuts()
        self._given = 0
        self._order = lru_cache(maxsize=2)(self._make_order)  # a batch lies in two epochs at most

    @property
    def sequences(self) -> int:
        """Sequences of an epoch."""
        return len(self._starts)

    @property
    def epoch(self) -> float:
        """Epochs given out so far, with the part of the present one."""
        return self._given / self.sequences

    def next_batch(self) -> Batch:
        numbers = (self._given + np.arange(self.dealing.batch_size))[self.dealing.own]
        epochs, places = np.divmod(numbers, self.sequences)
        chosen = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            chosen[rows] = self._order(int(epoch))[places[rows]]
        self._given += self.dealing.batch_size
        starts, length = self._starts[chosen], self.form.body + 1
        windows = self._stream.windows(starts, length, padding=self.form.end)
        present = None
        if self.config.packing == "documents" and (starts + length > len(self._stream)).any():
            present = np.minimum(length, len(self._stream) - starts)
        return self.form.batch(windows, present)

    def _position(self) -> dict[str, Any]:
        return {"sequences": self._given}

    def _go_to(self, position: Mapping[str, Any]) -> None:
        self._given = int(position["sequences"])

    def _held_out_tokens(self, tokens: int) -> Int64[np.ndarray, " token"]:
        return self._held_out.slice(0, tokens)

    def _make_order(self, epoch: int) -> Int64[np.ndarray, " sequence"]:
        if not self.config.shuffle:
            return np.arange(self.sequences)
        return sequence_order(self.config.seed, epoch, self.sequences)

    def _sequence_starts(self, corpus: Corpus, kept: np.ndarray) -> Int64[np.ndarray, " sequence"]:
        body, length = self.form.body, len(self._stream)
        if self.config.packing == "stream":
            return np.arange(max(0, (length - 1) // body)) * body
        starts = greedy_starts(corpus.document_starts(kept, self.form), body)
        return starts[starts < length - 1]

    def _hold_out(self, corpus: Corpus) -> tuple[Corpus, Bool[np.ndarray, " document"]]:
        """Which documents are held out. Where whole ones would be most of the text, its end is."""
        fraction = self.config.validation_fraction
        held = corpus.held_out(fraction)
        share = np.diff(corpus.boundaries)[held].sum() / corpus.tokens
        if held.any() and share <= max(0.5, 2 * fraction):
            return corpus, held
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
            read = np.minimum(self.form.body, len(self._stream) - self._starts).sum()
            left = 1 - read / len(self._stream)
            if left > 0:
                self.notes += (
                    f"data.packing=documents leaves out {left:.1%} of the tokens: the ends of documents "
                    "that did not fit.",
                )


def greedy_starts(documents: Int64[np.ndarray, " document"], length: int) -> Int64[np.ndarray, " sequence"]:
    """Where sequences begin: each with the first document after the ``length`` tokens of the one before."""
    following = np.searchsorted(documents, documents + length).tolist()
    chosen, document = [], 0
    while document < len(documents):
        chosen.append(document)
        document = following[document]
    return documents[chosen]


def sequence_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " sequence"]:
    """A permutation that seed and epoch alone decide.

    It sorts the raw output of Philox-4x64 (Salmon et al. 2011), which no release of NumPy may change; what
    ``Generator.permutation`` makes of it may.
    """
    key = np.asarray([seed & (2**64 - 1), epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")
