"""Token batches: text made into sequences under a stated protocol, with an identity of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Int64

from osp_diag.errors import TokenError, UsageError
from osp_diag.schema import PROTOCOLS
from osp_diag.text.sources import STRING_TEXT, Text, text_source
from osp_diag.text.tokenizer import DELIMITERS, decode, delimiter_ids_of, encode, opening_tokens
from osp_diag.token_ids import integers, random_ids, read_ids

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DELIMITERS", "TokenBatches", "delimiter_ids_of", "make_batches"]

BeginningOfSequence = Literal["auto", "yes", "no"]
BOS_CHOICES: tuple[str, ...] = get_args(BeginningOfSequence)

DEFAULT_TOKENS = 8192
DEFAULT_LENGTH = 512
CHARACTERS_PER_TOKEN = 6
"""More than English text has, so that one reading usually suffices."""

MARGIN = 16
"""Tokens at the end of a text that was cut short are left out: the cut may have changed them."""


@dataclass(frozen=True)
class TokenBatches:
    """Sequences of token ids, and all that identifies them.

    Attributes
    ----------
    tokens
        Ids, int64 of shape (sequence, position).
    attention_mask
        1 where there is a token, 0 on padding; same shape.
    protocol
        ``sequence`` or ``osp-published``.
    bos
        Whether sequences begin with the tokenizer's opening tokens: ``yes``, ``no``, ``as given``, or
        ``once, before the text`` under ``osp-published``.
    bos_ids
        Those opening tokens: none, or BOS (BERT's [CLS]), or all of what the tokenizer puts first.
    sequence_length
        Positions of a sequence.
    source
        Where the tokens come from, in words without a path.
    fingerprint
        32 hexadecimal digits of the SHA-256 of ids, mask and protocol.
    delimiter_ids
        Ids of the ``delimiter`` stratum: see :func:`delimiter_ids_of`.
    notes
        What the user should know, one sentence each.
    """

    tokens: Int64[np.ndarray, "sequence position"] = field(repr=False)
    attention_mask: Int64[np.ndarray, "sequence position"] = field(repr=False)
    protocol: str
    bos: str
    bos_ids: tuple[int, ...]
    sequence_length: int
    source: str
    fingerprint: str
    delimiter_ids: tuple[int, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    tokenizer: Any | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, batch_size: int, *, rank: int = 0, ranks: int = 1) -> Iterator[dict[str, Tensor]]:
        """``input_ids`` and ``attention_mask`` of up to ``batch_size`` sequences at a time, as CPU tensors.

        With several ranks, rank r gets every ``ranks``-th sequence from the r-th on.
        """
        import torch

        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size}: a batch needs 1 or more sequences")
        ids, mask = self.tokens[rank::ranks], self.attention_mask[rank::ranks]
        for start in range(0, len(ids), batch_size):
            rows = slice(start, start + batch_size)
            yield {
                "input_ids": torch.from_numpy(ids[rows].copy()),
                "attention_mask": torch.from_numpy(mask[rows].copy()),
            }

    def text_of(self, token_id: int) -> str:
        """What one token reads as; its number where there is no tokenizer."""
        return str(token_id) if self.tokenizer is None else decode(self.tokenizer, token_id)


def make_batches(
    tokenizer: Any | None = None,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    ids: Any | None = None,
    random_tokens: bool = False,
    attention_mask: Any | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    protocol: str = "sequence",
    bos: str = "auto",
    max_length: int | None = None,
    vocabulary_size: int | None = None,
    split: str | None = None,
    text_column: str | None = None,
) -> TokenBatches:
    """Make the sequences that a model is run on.

    The text is tokenised as one stream without special tokens and cut into sequences of ``seq_len``
    positions, the opening tokens included where there are any. A remainder is left out.

    Parameters
    ----------
    tokenizer
        The model's; not needed with ``ids``.
    text, dataset, ids, random_tokens
        At most one of: a text file or the text itself; a Hugging Face data set (hub id,
        ``id:configuration`` or local path); ids of shape (token,), cut like a text, or (sequence,
        position), taken as they are, or the path of a ``.npy`` of them; ids drawn evenly from the model's
        vocabulary. None of them: the built-in English text.
    attention_mask
        Of ``ids`` of shape (sequence, position).
    tokens
        How many tokens to take in all; None: 8192, or all of ``ids``.
    seq_len
        Positions of a sequence; None: 512, or less where the model or ``tokens`` allow less.
    protocol
        ``sequence``, or ``osp-published``: the same stream, every token fed as a sequence of its own, as
        the released OSP script does (evaluate_kurtosis.py). Sequences have no BOS there; the stream begins
        with one where the tokenizer puts it before a text.
    bos
        ``auto`` follows the tokenizer: where ``tokenizer("x")`` puts something before "x", so does every
        sequence. ``yes`` insists; ``no`` leaves it out.
    max_length, vocabulary_size
        Of the model: longer sequences and larger ids are refused.
    split, text_column
        Of the data set; None chooses.

    Raises
    ------
    TokenError
        The tokens do not fit: empty text, too few of them, too long sequences, foreign ids.
    UsageError
        An option has no meaning.
    """
    _check_choices(protocol, bos, tokens, seq_len, max_length)
    if sum(choice is not None for choice in (text, dataset, ids)) + random_tokens > 1:
        raise UsageError("text, dataset, ids and random_tokens are four sources; give one of them")
    if dataset is None and (split is not None or text_column is not None):
        raise UsageError("split and text_column are of a dataset; give dataset too (--dataset)")
    source = "token ids given as an array"
    if random_tokens:
        ids = random_ids(tokens or DEFAULT_TOKENS, vocabulary_size)
        source = f"random token ids, each of {vocabulary_size:,} equally likely"
    elif isinstance(ids, (str, os.PathLike)):
        source = f"token ids of {Path(ids).name}"
        ids = read_ids(Path(ids))
    is_published = protocol == "osp-published"
    if ids is not None and np.ndim(ids) == 2:
        sequences = _whole_sequences(ids, attention_mask, tokens, seq_len, bos, max_length, source)
    else:
        # Ids of the user's own are taken as they are.
        opening = () if ids is not None and bos == "auto" else opening_tokens(tokenizer, bos)
        stream = _Stream(tokenizer, text, dataset, ids, split, text_column, source)
        if is_published:  # the released script tokenises all documents at once
            sequences = _opened_stream(stream, tokens, seq_len, max_length, opening)
        else:
            sequences = _cut_stream(stream, tokens, seq_len, max_length, opening)
    if is_published:
        # As the released script does it: every token that is no padding becomes a sequence at position 0.
        present = sequences.tokens[sequences.mask == 1][:, None]
        sequences = replace(sequences, tokens=present, mask=np.ones_like(present))
    if vocabulary_size is not None:
        _check_vocabulary(sequences.tokens, vocabulary_size, tokenizer)
    is_as_given = ids is not None and not sequences.opening and protocol == "sequence"
    return TokenBatches(
        tokens=sequences.tokens,
        attention_mask=sequences.mask,
        protocol=protocol,
        bos=_bos_words(sequences.opening, is_published, is_as_given),
        bos_ids=sequences.opening,
        sequence_length=sequences.tokens.shape[1],
        source=sequences.source,
        fingerprint=_fingerprint(sequences.tokens, sequences.mask, protocol),
        delimiter_ids=() if tokenizer is None else delimiter_ids_of(tokenizer),
        notes=sequences.notes,
        tokenizer=tokenizer,
    )


def _bos_words(opening: tuple[int, ...], is_published: bool, is_as_given: bool) -> str:
    if opening:
        return "once, before the text" if is_published else "yes"
    return "as given" if is_as_given else "no"


@dataclass(frozen=True)
class _Sequences:
    """Sequences on their way to :class:`TokenBatches`."""

    tokens: np.ndarray
    mask: np.ndarray
    opening: tuple[int, ...]
    source: str
    notes: tuple[str, ...] = ()


class _Stream:
    """Token ids from the start of a source, as many as are asked for."""

    def __init__(
        self,
        tokenizer: Any,
        text: Any,
        dataset: Any,
        ids: Any,
        split: str | None,
        column: str | None,
        source: str,
    ) -> None:
        self._ids = None if ids is None else integers(ids)
        self._text: Text | None = None
        if self._ids is not None:
            self.description = source
            return
        if tokenizer is None:
            raise TokenError(
                "the checkpoint has no tokenizer, so text cannot be made into tokens; pass a tokenizer "
                "(--tokenizer), token ids (--ids FILE.npy), or --random-tokens"
            )
        self._tokenizer = tokenizer
        self._text = text_source(text, dataset, split=split, column=column)
        self.description = self._text.description

    @property
    def length(self) -> int | None:
        return None if self._ids is None else len(self._ids)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the text that has been read."""
        return () if self._text is None else self._text.notes

    def take(self, count: int) -> np.ndarray:
        """The first ``count`` ids, or all there are."""
        if self._ids is not None:
            return self._ids[:count]
        assert self._text is not None
        # A text is read from its start, twice as far each time, until it gives enough tokens and a margin,
        # since the last tokens of a text that was cut may not be those of the whole text.
        characters = CHARACTERS_PER_TOKEN * (count + MARGIN)
        while True:
            text, exhausted = self._text.prefix(characters)
            ids = encode(self._tokenizer, text, special=False)
            if exhausted or len(ids) >= count + MARGIN:
                return np.asarray(ids[:count], dtype=np.int64)
            characters *= 2


def _cut_stream(
    stream: _Stream, tokens: int | None, seq_len: int | None, max_length: int | None, opening: tuple[int, ...]
) -> _Sequences:
    total = tokens or stream.length or DEFAULT_TOKENS
    length = seq_len or min(DEFAULT_LENGTH, total, max_length or DEFAULT_LENGTH)
    if tokens is not None and tokens < length:
        raise UsageError(
            f"tokens={tokens} is less than one sequence of seq_len={length}; pass --tokens {length} or more, "
            f"or --seq-len {tokens}"
        )
    # Each sequence is the opening tokens and `body` tokens of the stream; what is left over is dropped.
    body = length - len(opening)
    if body < 1:
        raise UsageError(
            f"seq_len={length} leaves no room beside the opening tokens; pass {len(opening) + 1} or more"
        )
    rows = max(1, total // length)
    stream_ids = stream.take(rows * body)
    if len(stream_ids) == 0:
        raise TokenError(f"{stream.description} is empty: it has no tokens")
    if len(stream_ids) < body:
        mistaken = ", or the path of a file: none is named so" if stream.description == STRING_TEXT else ""
        raise TokenError(
            f"{stream.description} has {len(stream_ids)} tokens, fewer than one sequence of {length}; give a "
            f"longer text, or --seq-len {len(stream_ids) + len(opening)}{mistaken}"
        )
    count = len(stream_ids) // body
    notes = stream.notes
    if count < rows:
        notes += (f"{stream.description} gives {count} sequences of {length}; {rows} were asked for.",)
    bodies = stream_ids[: count * body].reshape(count, body)
    prefix = np.tile(np.asarray(opening, dtype=np.int64), (count, 1))
    ids = np.concatenate([prefix, bodies], axis=1)
    return _Sequences(ids, np.ones_like(ids), opening, stream.description, notes)


def _opened_stream(
    stream: _Stream, tokens: int | None, seq_len: int | None, max_length: int | None, opening: tuple[int, ...]
) -> _Sequences:
    """The stream without openings of sequences, and the opening tokens once before it, within its length."""
    sequences = _cut_stream(stream, tokens, seq_len, max_length, ())
    if not opening:
        return sequences
    ids = sequences.tokens.reshape(-1)
    opened = np.concatenate([np.asarray(opening, dtype=np.int64), ids])[: len(ids)]
    return replace(sequences, tokens=opened.reshape(sequences.tokens.shape), opening=opening)


def _whole_sequences(
    ids: Any,
    mask: Any | None,
    tokens: int | None,
    seq_len: int | None,
    bos: str,
    max_length: int | None,
    source: str,
) -> _Sequences:
    values = integers(ids)
    if values.size == 0:
        raise TokenError(f"the token ids are empty: their shape is {values.shape}")
    if bos == "yes":
        raise UsageError(
            "ids of shape (sequence, position) are taken as they are; put BOS into them, or bos='auto'"
        )
    count, length = values.shape
    if seq_len is not None and seq_len != length:
        raise UsageError(
            f"seq_len={seq_len}, but the token ids given have {length} positions; leave seq_len out"
        )
    if max_length is not None and length > max_length:
        raise _too_long(length, max_length)
    # Masks may come as booleans or as numbers other than 1.
    present = np.ones_like(values) if mask is None else (integers(mask) != 0).astype(np.int64)
    if present.shape != values.shape:
        raise TokenError(f"the attention mask has shape {present.shape}, the token ids {values.shape}")
    if not present.any():
        raise TokenError("the attention mask marks every token as padding")
    rows = count if tokens is None else max(1, min(count, tokens // length))
    return _Sequences(values[:rows], present[:rows], (), source)


def _check_choices(
    protocol: str, bos: str, tokens: int | None, seq_len: int | None, max_length: int | None
) -> None:
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if bos not in BOS_CHOICES:
        raise UsageError(f"bos {bos!r} is not one of {', '.join(BOS_CHOICES)}")
    if protocol == "osp-published" and bos == "yes":
        raise UsageError(
            "osp-published feeds every token as its own sequence, and a BOS only where the tokenizer puts "
            "one before a text; leave bos at auto"
        )
    for name, value in (("tokens", tokens), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: give 1 or more")
    if seq_len is not None and max_length is not None and seq_len > max_length:
        raise _too_long(seq_len, max_length)


def _too_long(length: int, max_length: int) -> TokenError:
    return TokenError(
        f"sequences of {length} tokens are longer than the {max_length} that the model was made for; "
        f"pass --seq-len {max_length} or less"
    )


def _check_vocabulary(tokens: np.ndarray, vocabulary_size: int, tokenizer: Any | None) -> None:
    foreign = np.argwhere((tokens < 0) | (tokens >= vocabulary_size))
    if len(foreign) == 0:
        return
    sequence, position = map(int, foreign[0])
    advice = (
        "the ids come from another tokenizer"
        if tokenizer is None
        else "the tokenizer is not this model's, or has tokens added that the embedding has no rows for"
    )
    raise TokenError(
        f"token id {tokens[sequence, position]} at position {position} of sequence {sequence} is outside the "
        f"model's vocabulary of {vocabulary_size} ({len(foreign)} such tokens): {advice}"
    )


def _fingerprint(tokens: np.ndarray, mask: np.ndarray, protocol: str) -> str:
    # Little-endian int64 on every machine, and the shape, since other sequences can have the same bytes.
    digest = hashlib.sha256(f"{protocol}|{tokens.shape}|".encode())
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(mask, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]
