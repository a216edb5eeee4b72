"""The table of docs/files.md and the tests that hold it: each row is a situation, and each has its test."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["situation"]

Test = TypeVar("Test", bound=Callable[..., object])


def situation(*rows: str) -> Callable[[Test], Test]:
    """Mark a test as that of rows of docs/files.md, which it names by their first cell."""
    assert rows
    return lambda test: test
