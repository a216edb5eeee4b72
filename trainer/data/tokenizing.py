"""Tokenizers: opening them, which of their tokens delimit documents, and encoding documents fast."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from osp_diag.errors import TokenError
from osp_diag.quiet import quietly
from osp_diag.text.tokenizer import encode

__all__ = [
    "END_OF_TEXT",
    "Encoder",
    "builtin_tokenizer",
    "check_vocabulary",
    "delimiters_of",
    "open_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"
BUILTIN_FILE = "english_bpe.json"

END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")
BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]")
"""What ends and begins a text in tokenizers that come as a bare ``tokenizer.json``, which does not say."""


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
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path)
    if (
        path.is_dir()
        and not (path / "tokenizer_config.json").is_file()
        and (path / "tokenizer.json").is_file()
    ):
        return _from_file(path / "tokenizer.json")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".json"):
        raise TokenError(f"data.tokenizer={name}: there is no such file or directory")
    import transformers

    try:
        with quietly():
            return transformers.AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except Exception as error:
        advice = (
            "give a directory with tokenizer.json"
            if path.is_dir()
            else "check the hub id and the connection; without a network give a directory or a "
            "tokenizer.json, or none for the tokenizer that comes along"
        )
        raise TokenError(
            f"data.tokenizer={name} cannot be opened: {type(error).__name__}: {_first_line(error)}; {advice}"
        ) from error


def builtin_tokenizer() -> Any:
    """The byte-level BPE of 4,096 entries that comes along, made by
    :mod:`osp_diag.trainer.data.make_tokenizer`.

    ``<|endoftext|>``, id 0, ends documents and is BOS; the tokenizer puts it before a text by itself.
    """
    return _fast(files(__package__).joinpath(BUILTIN_FILE).read_text("utf-8"), END_OF_TEXT, END_OF_TEXT)


def _from_file(path: Path) -> Any:
    try:
        content = path.read_text("utf-8")
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_str(content).get_vocab()
    except Exception as error:
        raise TokenError(
            f"data.tokenizer={path} is not a tokenizer of the library tokenizers: {_first_line(error)}; "
            "give its tokenizer.json"
        ) from error
    end = next((token for token in END_NAMES if token in vocabulary), None)
    begin = next((token for token in BEGIN_NAMES if token in vocabulary), end)
    return _fast(content, begin, end)


def _fast(content: str, begin: str | None, end: str | None) -> Any:
    import transformers
    from tokenizers import Tokenizer

    names = {key: token for key, token in (("bos_token", begin), ("eos_token", end)) if token is not None}
    with quietly():
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(content), clean_up_tokenization_spaces=False, **names
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


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
