"""The built-in text: public-domain English prose. ``README.md`` beside this file says where it comes from."""

from __future__ import annotations

import lzma
from importlib.resources import files

__all__ = ["builtin_text"]


def builtin_text() -> str:
    """The whole text, about one million characters: a novel's chapters between addresses to Congress."""
    packed = files(__name__).joinpath("english.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")
