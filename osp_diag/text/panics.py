"""Panics of libraries in Rust, such as tokenizers: no :class:`Exception`, and so nobody expects them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_panic", "no_panic"]


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
