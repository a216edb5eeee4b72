"""What every source of training data offers, and what they share: ranks, held-out batches, states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from osp_diag.errors import TokenError, TrainingError, UsageError
from osp_diag.probing.identity import tokenizer_fingerprint
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data.batch import Batch, SequenceForm

__all__ = ["Dealing", "TrainingData"]

ORDER_KEYS = ("sequence_length", "bos", "packing", "shuffle", "shuffle_buffer", "seed", "separate_documents")
"""The values of ``data`` that a position in the data means nothing without."""


@dataclass(frozen=True)
class Dealing:
    """Which sequences of a batch a rank gets: every ``ranks``-th from its own number on.

    Attributes
    ----------
    batch_size : sequences of the batch over all ranks
    rank, ranks : this one, and how many there are
    """

    batch_size: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size}: give 1 or more")
        if not 0 <= self.rank < self.ranks:
            raise UsageError(f"rank {self.rank} is none of {self.ranks} ranks")
        if self.batch_size % self.ranks:
            raise UsageError(
                f"batch_size={self.batch_size} cannot be shared out evenly to {self.ranks} ranks; give a "
                f"multiple of {self.ranks}"
            )

    @property
    def of_rank(self) -> slice:
        """This rank's sequences of a batch."""
        return slice(self.rank, None, self.ranks)


class TrainingData(ABC):
    """Batches without end, in an order that the seed alone decides.

    The sequences of a batch are dealt to the ranks, so that all ranks together see the same whatever
    their number is (docs/decisions.md, Training).

    Attributes
    ----------
    tokenizer : a Hugging Face tokenizer, or None where the tokens came without
    form : how documents become sequences
    description : the source in words, without local paths
    fingerprint : 32 hexadecimal digits that identify the tokens (of streams: the source and the tokenizer)
    tokens : of an epoch of training; None where nobody knows
    documents : that training reads; None where nobody knows
    notes : what the user should know, one sentence each; of streams, of what has been read so far
    """

    tokenizer: Any | None
    form: SequenceForm
    description: str
    fingerprint: str
    tokens: int | None = None
    documents: int | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self, config: DataConfig, form: SequenceForm, tokenizer: Any | None, dealing: Dealing
    ) -> None:
        self.config = config
        self.form = form
        self.tokenizer = tokenizer
        self.dealing = dealing

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of all that decides how text becomes ids; ``none`` without a tokenizer."""
        return "none" if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)

    @abstractmethod
    def next_batch(self) -> Batch:
        """This rank's sequences of the next batch: batch_size / ranks of them, on the CPU."""

    @abstractmethod
    def _position(self) -> dict[str, Any]:
        """Where in the data the next batch begins: plain data."""

    @abstractmethod
    def _go_to(self, position: Mapping[str, Any]) -> None:
        """Continue from what :meth:`_position` returned."""

    @abstractmethod
    def _held_out_tokens(self, tokens: int) -> Int64[np.ndarray, " token"]:
        """The first so many tokens of the held-out stream, or all there are."""

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on with the very next token, as data for JSON.

        It is the same on every rank, and of use to any number of ranks.
        """
        order = {key: getattr(self.config, key) for key in ORDER_KEYS}
        return {"fingerprint": self.fingerprint, "order": order, "position": self._position()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was asked for.

        Raises
        ------
        TrainingError : the state is of other data, or of another order of them
        """
        changed = [
            f"data.{key} was {state['order'].get(key)!r} and is {getattr(self.config, key)!r}"
            for key in ORDER_KEYS
            if state["order"].get(key) != getattr(self.config, key)
        ]
        if changed:
            raise TrainingError(
                f"the data cannot go on from the saved position: {'; '.join(changed)}. Resume with the same "
                "values, or start a new run"
            )
        if state["fingerprint"] != self.fingerprint:
            raise TrainingError(
                f"the data are not those of the saved run: their fingerprint is {self.fingerprint}, the "
                f"saved one {state['fingerprint']}. Give the same files and tokenizer, or start a new run; "
                f"here they are {self.description}"
            )
        self._go_to(state["position"])

    def held_out(self, tokens: int) -> Int64[np.ndarray, "sequence position"]:
        """The probe's batch, always the same: held-out text in full sequences, up to ``tokens`` in all.

        Sequences begin with BOS as the configuration says. Held-out text is cut as one stream, whatever
        the packing is.

        Raises
        ------
        TokenError : there are too few held-out tokens
        """
        sequences = max(1, tokens // self.form.length)
        return self._held_out_batch(sequences, exactly=f"probe.tokens={tokens}").input_ids.numpy()

    def validation_batches(self, sequences: int) -> Iterator[Batch]:
        """The first ``sequences`` held-out sequences, or all if there are fewer, with their labels.

        They are dealt to the ranks as training's are, in batches of batch_size / ranks at most; every rank
        gets equally many, so up to ranks − 1 are left out.

        Raises
        ------
        TokenError : there is not one held-out sequence a rank
        """
        batch = self._held_out_batch(max(sequences, self.dealing.ranks))
        count = len(batch) - len(batch) % self.dealing.ranks
        if count == 0:
            raise TokenError(
                f"{len(batch)} held-out sequences are too few for {self.dealing.ranks} ranks; raise "
                "data.validation_fraction, or give data.validation_path"
            )
        of_rank = batch[:count][self.dealing.of_rank]
        size = self.dealing.batch_size // self.dealing.ranks
        for start in range(0, len(of_rank), size):
            yield of_rank[start : start + size]

    def _held_out_batch(self, sequences: int, *, exactly: str | None = None) -> Batch:
        body = self.form.body
        tokens = self._held_out_tokens(sequences * body + 1)
        count = min(sequences, (len(tokens) - 1) // body)
        if count < (sequences if exactly else 1):
            requirement = (
                f"{exactly} needs {sequences * body + 1:,}" if exactly else f"a sequence needs {body + 1:,}"
            )
            raise TokenError(
                f"the held-out text has {len(tokens):,} tokens, and {requirement}; raise "
                f"data.validation_fraction={self.config.validation_fraction}, or give more text in "
                "data.validation_path" + (", or lower probe.tokens" if exactly else "")
            )
        rows = np.arange(count)[:, None] * body + np.arange(body + 1)
        return self.form.batch(tokens[rows])
