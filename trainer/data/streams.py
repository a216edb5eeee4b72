"""Training data that stream by: text that is tokenised while training goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from osp_diag.errors import TokenError
from osp_diag.probing.identity import tokenizer_fingerprint
from osp_diag.text.sources import name_without_path
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data.batch import Batch, SequenceForm
from osp_diag.trainer.data.corpus import held_out_share
from osp_diag.trainer.data.text_stream import StreamedTexts, TextMixture
from osp_diag.trainer.data.tokenizing import Encoder
from osp_diag.trainer.data.training_data import Dealing, TrainingData

__all__ = ["StreamData"]


class StreamData(TrainingData):
    """Sequences of Hugging Face data sets, one or a mixture, tokenised as they are needed.

    A data set begins again when it has ended. Documents are held out by a hash of their text, so the same
    ones on every reading. Every rank reads and tokenises the whole stream and keeps its sequences, which
    makes the state one that any number of ranks goes on from. Where that cannot keep up (a core makes some
    hundred thousand tokens a second), tokenise beforehand and use ``data.source=tokens``.

    Raises
    ------
    TokenError : a data set cannot be read, or has no text
    """

    def __init__(self, config: DataConfig, form: SequenceForm, tokenizer: Any, dealing: Dealing) -> None:
        super().__init__(config, form, tokenizer, dealing)
        self._encoder = Encoder(tokenizer)
        self._weights = dict(config.mixture) if config.source == "mixture" else {str(config.dataset): 1.0}
        self._documents = self._texts(held_out=False)
        self._waiting = np.empty(0, dtype=np.int64)
        self._state_before = self._documents.state()  # the state before the document that is waiting
        self._offset = 0  # how many of its tokens lie before those that wait
        self._validation_notes: dict[int, tuple[str, ...]] = {}
        self._sequences: int | None = 0  # handed out so far; None after a state that does not say
        names = {name_without_path(name): weight for name, weight in self._weights.items()}
        self.description = f"{', '.join(names)} (split {config.split}), streamed"
        identity = {
            "data sets": names,
            "split": config.split,
            "text_column": config.text_column,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "held out": name_without_path(config.validation_path)
            if config.validation_path
            else config.validation_fraction,
        }
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def next_batch(self) -> Batch:
        rows, length = self.dealing.batch_size, self.form.body + 1
        self._sequences = None if self._sequences is None else self._sequences + rows
        if self.config.packing == "documents":
            windows = np.stack([self._from_document(length) for _ in range(rows)])
        else:
            tokens = self._take(rows * self.form.body)
            windows = tokens[np.arange(rows)[:, None] * self.form.body + np.arange(length)]
        self._take_notes()
        return self.form.batch(windows[self.dealing.of_rank])

    def _position(self) -> dict[str, Any]:
        return {"documents": self._state_before, "offset": self._offset, "sequences": self._sequences}

    def _go_to(self, position: Mapping[str, Any]) -> None:
        self._documents.load(position["documents"])
        self._sequences = position.get("sequences")
        self._waiting = np.empty(0, dtype=np.int64)
        self._state_before, self._offset = self._documents.state(), 0
        if position["offset"]:
            self._waiting = self._pull()[int(position["offset"]) :]
            self._offset = int(position["offset"])
        self._take_notes()

    def _held_out_tokens(self, tokens: int) -> Int64[np.ndarray, " token"]:
        documents = self._texts(held_out=True)
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < tokens and (document := documents.next()) is not None:
            parts.append(document)
        if self.config.validation_path is not None:  # or else they are rows of the training's
            self._validation_notes[tokens] = documents.notes
            self._take_notes()
        return np.concatenate(parts)[:tokens].astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def _take_notes(self) -> None:
        """Of the training's rows, and of those of the longest reading of other held-out text."""
        further = self._validation_notes.get(max(self._validation_notes, default=0), ())
        self.notes = (*self._documents.notes, *further)

    def _take(self, count: int) -> Int64[np.ndarray, " token"]:
        """The next ``count`` tokens, and one more, with which the next call begins."""
        parts = [self._waiting]
        available = len(self._waiting)
        while available <= count:
            parts.append(self._pull())
            available += len(parts[-1])
        tokens = np.concatenate(parts)
        # More was read only while it was needed, so what is left is of the last document alone.
        self._waiting = tokens[count:]
        self._offset = len(parts[-1]) - len(self._waiting) + (self._offset if len(parts) == 1 else 0)
        return tokens[: count + 1]

    def _from_document(self, length: int) -> Int64[np.ndarray, " token"]:
        """``length`` tokens from the beginning of a document on; what is cut off is left out."""
        parts = [self._waiting] if len(self._waiting) else []
        while sum(map(len, parts)) < length:
            parts.append(self._pull())
        tokens = np.concatenate(parts)
        # The last token is a label alone. The document that it begins has its turn in the next sequence.
        untouched = len(tokens) - len(parts[-1]) == length - 1
        self._waiting = parts[-1] if untouched else np.empty(0, dtype=np.int64)
        if not untouched:
            self._state_before = self._documents.state()
        self._offset = 0
        return tokens[:length]

    def _pull(self) -> Int64[np.ndarray, " token"]:
        self._state_before = self._documents.state()
        document = self._documents.next()
        assert document is not None, "training streams are endless"
        return document.astype(np.int64)

    def _texts(self, *, held_out: bool) -> TextMixture:
        config = self.config
        names, key = self._weights, "data.mixture" if config.source == "mixture" else "data.dataset"
        if held_out and config.validation_path is not None:
            names, key = {config.validation_path: 1.0}, "data.validation_path"

        def keep(text: str) -> bool:
            if config.validation_path is not None:
                return True
            return (held_out_share(text) < config.validation_fraction) is held_out

        members = []
        for name in names:
            try:
                members.append(
                    StreamedTexts(
                        name,
                        config.split,
                        config.text_column,
                        encoder=self._encoder,
                        form=self.form,
                        keep=keep,
                        seed=config.seed if config.shuffle and not held_out else None,
                        buffer=config.shuffle_buffer,
                        endless=not held_out,
                    )
                )
            except TokenError as error:
                raise TokenError(f"{key}={name}: {error}") from error
        return TextMixture(members, list(names.values()))
