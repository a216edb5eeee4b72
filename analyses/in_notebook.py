"""How a notebook shows the result of an analysis."""

from __future__ import annotations

from html import escape

__all__ = ["in_notebook"]


def in_notebook(text: str) -> str:
    """The text of a result as HTML, its columns kept and long lines wrapped; the first line is its headline.

    No colours are set, so that it is legible on a light page and on a dark one.
    """
    head, _, body = text.partition("\n")
    return (
        '<pre style="font-family: monospace; white-space: pre-wrap; word-break: normal">'
        f"<b>{escape(head)}</b>" + (f"\n{escape(body)}" if body else "") + "</pre>"
    )
