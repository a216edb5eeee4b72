"""What is asked of a tokenizer: ids, texts, what it puts first, and which tokens are delimiters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from osp_diag.errors import TokenError
from osp_diag.text.panics import tokenizer_errors

__all__ = [
    "DELIMITERS",
    "decode",
    "decode_each",
    "delimiter_ids_of",
    "encode",
    "opening_tokens",
    "vocabulary_length",
]

DELIMITERS = frozenset(",.;:!?…、。，．；：！？\n\r")
"""The characters of the ``delimiter`` stratum: marks that end a clause, a sentence or a line, in their
ASCII and East Asian forms. Quotation marks, brackets and dashes are not among them."""


@tokenizer_errors
def delimiter_ids_of(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens whose text, blanks around it removed, consists of :data:`DELIMITERS` alone.

    Blank tokens with a line break in them belong to it ("\\n\\n", "\\n    "); other blanks and special
    tokens do not.

    Raises
    ------
    TokenError
        The tokenizer does not list its tokens, or does not say what one reads as.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return tuple(
        token
        for token in _candidates(tokenizer)
        if token not in special and _is_delimiter(decode(tokenizer, token))
    )


def opening_tokens(tokenizer: Any | None, bos: str) -> tuple[int, ...]:
    """What every sequence begins with.

    ``auto``: what the tokenizer puts before a text by itself (BOS, [CLS], nothing …); ``yes``: the same,
    or its BOS token where it puts nothing; ``no``: nothing.

    Raises
    ------
    TokenError
        ``yes`` without a BOS token.
    """
    if bos == "no" or (tokenizer is None and bos == "auto"):
        return ()
    if tokenizer is None:
        raise TokenError(
            "bos='yes' needs the tokenizer's BOS token, and there is no tokenizer; pass one, or bos='no'"
        )
    plain, full = encode(tokenizer, "x", special=False), encode(tokenizer, "x", special=True)
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    if start:
        return tuple(full[:start])
    if bos == "auto":
        return ()
    bos_id = getattr(tokenizer, "bos_token_id", None)
    bos_id = getattr(tokenizer, "cls_token_id", None) if bos_id is None else bos_id
    if bos_id is None:
        raise TokenError(
            f"bos='yes', but the tokenizer ({type(tokenizer).__name__}) has no BOS token; pass bos='no' or "
            "'auto'"
        )
    return (int(bos_id),)


@tokenizer_errors
def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """The ids of a text, with the tokenizer's special tokens around it or without.

    A tokenizer is one of transformers, one of tokenizers, or anything with ``encode(text)`` and
    ``decode(ids)``, as tiktoken's and a function's own are; those put no special tokens around a text.

    Raises
    ------
    TokenError
        The tokenizer cannot be called so.
    """
    if callable(tokenizer):
        from osp_diag.quiet import quietly

        # It would warn that the stream is longer than the model's maximum.
        with quietly(), _asked(tokenizer, "a call with (text, add_special_tokens=…, verbose=False)"):
            encoded = tokenizer(text, add_special_tokens=special, verbose=False)
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) or hasattr(encoded, "keys") else encoded
    elif _is_bare(tokenizer):
        ids = tokenizer.encode(text, add_special_tokens=special).ids
    else:
        # tiktoken's own refuses a text with a special token's characters.
        plain = getattr(tokenizer, "encode_ordinary", None)
        with _asked(tokenizer, "encode(text), which gives a list of ids"):
            ids = list(tokenizer.encode(text) if plain is None else plain(text))
    return [int(token) for token in ids]


@tokenizer_errors
def decode(tokenizer: Any, token: int) -> str:
    """What one token reads as; nothing where no token has that id.

    Raises
    ------
    TokenError
        The tokenizer cannot be asked so.
    """
    options = {"skip_special_tokens": False} if callable(tokenizer) or _is_bare(tokenizer) else {}
    if callable(tokenizer):
        # Cleaning up would remove the blank of " ." and is warned about.
        options["clean_up_tokenization_spaces"] = False
    call = ", ".join(["[id]", *(f"{name}=False" for name in options)])
    try:
        with _asked(tokenizer, f"decode({call})"):
            return str(tokenizer.decode([token], **options))
    except (KeyError, IndexError, ValueError):
        return ""


@tokenizer_errors
def decode_each(tokenizer: Any, count: int) -> list[str]:
    """What each of the first ``count`` ids reads as by itself; nothing for an id without a token."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if _is_bare(backend):  # a hundred thousand calls from Python take seconds
        return list(backend.decode_batch([[token] for token in range(count)], skip_special_tokens=False))
    known = vocabulary_length(tokenizer)
    if known and not hasattr(tokenizer, "get_vocab"):
        return [decode(tokenizer, token) if token < known else "" for token in range(count)]
    with_token = set(_vocabulary(tokenizer).values())
    return [decode(tokenizer, token) if token in with_token else "" for token in range(count)]


def vocabulary_length(tokenizer: Any) -> int:
    """How many tokens it has; 0 where it does not say."""
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    for name in ("get_vocab_size", "n_vocab", "vocab_size"):
        size = getattr(tokenizer, name, None)
        size = size() if callable(size) else size
        if isinstance(size, int):
            return size
    return 0


def _is_bare(tokenizer: Any) -> bool:
    """Whether it is one of the library tokenizers."""
    return hasattr(tokenizer, "to_str") and hasattr(tokenizer, "encode_batch")


def _candidates(tokenizer: Any) -> list[int]:
    """Ids worth decoding: a token with an ASCII letter or digit is no delimiter, byte tokens <0x0A> aside."""
    known = vocabulary_length(tokenizer)
    if known and not hasattr(tokenizer, "get_vocab"):
        return list(range(known))
    return sorted(
        number
        for token, number in _vocabulary(tokenizer).items()
        if token.startswith("<0x") or not any(c.isascii() and c.isalnum() for c in token)
    )


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    with _asked(tokenizer, "get_vocab(), a dictionary from each token's text to its id"):
        return tokenizer.get_vocab()


@contextmanager
def _asked(tokenizer: Any, for_what: str) -> Iterator[None]:
    """A tokenizer of the user's own may lack what those of transformers and tokenizers have."""
    try:
        yield
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise TokenError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot be used: it was asked for {for_what}, and "
            f"raised {type(error).__name__}: {error}. Give it that method, as tokenizers of transformers "
            "have it, or pass no tokenizer, and token ids instead of text"
        ) from error


def _is_delimiter(text: str) -> bool:
    bare = text.strip()
    return set(bare) <= DELIMITERS if bare else "\n" in text or "\r" in text
