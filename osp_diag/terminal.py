"""Text of others on a terminal: names in files, runs and tokenizers may hold escape sequences.

Written to a terminal these move the cursor, change its title or hide what was said. Nothing of them gets
there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["filtered_streams", "one_line", "printable", "unfiltered"]

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, what turns text round, halves of surrogate pairs."""
_MOVES = re.compile("(?:[\r\n]|\x1b\\[A)*")
_REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    """The text with a replacement character for everything that a terminal would act on."""
    return _UNPRINTABLE.sub(_REPLACEMENT, text)


def one_line(text: str) -> str:
    """A name as it stands within a line: the same, and no line of its own."""
    return "".join(char if char.isprintable() else _REPLACEMENT for char in text)


class _Filtered:
    """A text stream through which nothing unprintable goes."""

    def __init__(self, stream: TextIO) -> None:
        self.unfiltered = stream

    def write(self, text: str) -> int:
        # Progress bars go back to the start of their line, and up a line by a text of its own.
        moves = _MOVES.fullmatch(text) is not None
        self.unfiltered.write(text if moves else "\r".join(map(printable, text.split("\r"))))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


@contextmanager
def filtered_streams() -> Iterator[None]:
    """Let whatever is written to standard output and error inside the block be printable."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Filtered(sys.stdout), _Filtered(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unfiltered(stream: TextIO) -> TextIO:
    """The stream itself, for a library that draws on the terminal and is given printable text."""
    return getattr(stream, "unfiltered", stream)
