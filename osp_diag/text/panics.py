"""Panics of libraries in Rust, such as tokenizers: no :class:`Exception`, and so nobody expects them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from osp_diag.errors import OspDiagError, TokenError

__all__ = ["is_panic", "no_panic", "tokenizer_errors"]

Function = TypeVar("Function", bound=Callable[..., Any])


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up, by an exception that is made anew in each of them."""
    return type(error).__name__ == "PanicException"


@contextmanager
def no_panic() -> Iterator[None]:
    """Raise a panic as a :class:`RuntimeError`."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise RuntimeError(f"its library gave up: {error}") from error


def tokenizer_errors(function: Function) -> Function:
    """Let whatever a tokenizer, the first argument, raises while it is used become a :class:`TokenError`."""

    @functools.wraps(function)
    def called(tokenizer: Any, *arguments: Any, **options: Any) -> Any:
        try:
            with no_panic():
                return function(tokenizer, *arguments, **options)
        except OspDiagError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise TokenError(
                f"the tokenizer ({type(tokenizer).__name__}) fails when it is used: {type(error).__name__}: "
                f"{lines[0]}. Its files are damaged; copy or download them again, or pass another tokenizer"
            ) from error

    return called  # type: ignore[return-value]
