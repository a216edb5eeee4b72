"""Tokenizers: opening them, which of their tokens delimit documents, and encoding documents fast."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from osp_diag.errors import TokenError
from osp_diag.text.tokenizer import encode
from osp_diag.text.tokenizer_files import END_OF_TEXT, fast_tokenizer
from osp_diag.text.tokenizer_files import open_tokenizer as text_tokenizer

__all__ = [
    "END_OF_TEXT",
    "Encoder",
    "builtin_tokenizer",
    "check_vocabulary",
    "delimiters_of",
    "open_tokenizer",
]

BUILTIN_FILE = "english_bpe.json"


def open_tokenizer(name: str | None) -> Any:
    """The tokenizer that ``data.tokenizer`` means; the one that comes along for None.

    Parameters
    ----------
    name : a directory, a ``tokenizer.json``, or a hub id

    Raises
    ------
    TokenError : there is none, it cannot be read, or the hub cannot be reached
    """
    if name is None:
        return builtin_tokenizer()
    try:
        return text_tokenizer(name)
    except TokenError as error:
        raise TokenError(f"data.tokenizer={name}: {error}") from error


def builtin_tokenizer() -> Any:
    """The byte-level BPE of 4,096 entries that comes along, made by
    :mod:`osp_diag.trainer.data.make_tokenizer`.

    ``<|endoftext|>``, id 0, ends documents and is BOS; the tokenizer puts it before a text by itself.
    """
    return fast_tokenizer(
        files(__package__).joinpath(BUILTIN_FILE).read_text("utf-8"), END_OF_TEXT, END_OF_TEXT
    )


def delimiters_of(tokenizer: Any) -> tuple[int, int]:
    """Ids of BOS and of what ends a document; the one stands for the other where it is missing.

    Raises
    ------
    TokenError : the tokenizer has neither
    """
    ids = [
        next((value for name in names if (value := getattr(tokenizer, name, None)) is not None), None)
        for names in (("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id"))
    ]
    begin, end = (ids[0] if ids[0] is not None else ids[1]), (ids[1] if ids[1] is not None else ids[0])
    if begin is None or end is None:
        raise TokenError(
            "the tokenizer of data.tokenizer has no token that ends a document (eos_token) nor one that "
            "begins it (bos_token); name them in its tokenizer_config.json"
        )
    return int(begin), int(end)


def check_vocabulary(tokenizer: Any, vocabulary_size: int) -> None:
    """Refuse a tokenizer that has more tokens than the model has embeddings.

    Raises
    ------
    TokenError : naming the key to change
    """
    entries = 1 + max(tokenizer.get_vocab().values())
    if entries > vocabulary_size:
        raise TokenError(
            f"the tokenizer has {entries:,} entries and model.vocabulary_size={vocabulary_size}; set "
            f"model.vocabulary_size={entries} or more, or another data.tokenizer"
        )


class Encoder:
    """Text to ids, many documents at a time, with no special tokens.

    A document that contains the characters of a special token gets no special token for it, so that
    documents end where they end.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast: Any = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            self._fast = type(backend).from_str(backend.to_str())  # a copy: the settings below are our own
            self._fast.encode_special_tokens = True
            self._fast.no_truncation()
            self._fast.no_padding()
        entries = 1 + max(tokenizer.get_vocab().values())
        self.dtype: type[np.unsignedinteger] = np.uint16 if entries <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        if self._fast is None:
            id_lists = [encode(self._tokenizer, text, special=False) for text in texts]
        else:
            id_lists = [
                encoding.ids
                for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        return [np.asarray(ids, dtype=self.dtype) for ids in id_lists]
