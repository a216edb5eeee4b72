"""Documents of text, one after the other: the built-in ones, and those of text, JSONL and Parquet files."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from osp_diag.errors import TokenError
from osp_diag.text import builtin_text
from osp_diag.text.documents import SUFFIXES as TEXT_SUFFIXES
from osp_diag.text.documents import Documents, bare_suffix

__all__ = ["Document", "FileDocuments", "builtin_documents", "files_at"]

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    **{kind: TEXT_SUFFIXES[kind] for kind in ("text", "jsonl", "parquet")},
    "tokens": (".npy", ".bin"),
}


@dataclass(frozen=True)
class Document:
    """One text, and the file it is of."""

    text: str
    source: str


def builtin_documents() -> Iterator[Document]:
    """The 24 chapters and 24 addresses of the built-in text, in its order: chapter, address, chapter …"""
    for part in re.split(r"\n\n(?=Chapter \d+\n)", builtin_text()):
        chapter, _, address = part.strip().rpartition("\n\n")
        yield Document(chapter, "chapter")
        yield Document(address, "address")


def files_at(path: str, source: str, key: str) -> list[Path]:
    """The files of one kind that a path means: itself, those in a folder (and below), or a pattern's.

    Raises
    ------
    TokenError : there are none; the message names ``key``
    """
    root = Path(path).expanduser()
    suffixes = SUFFIXES[source]
    if root.is_file():
        return [root]
    if root.is_dir():
        matches = sorted(file for file in root.rglob("*") if file.is_file() and bare_suffix(file) in suffixes)
        if not matches:
            raise TokenError(f"{key}={path}: the folder has no {source} files ({', '.join(suffixes)})")
        return matches
    matches = sorted(Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file())
    if not matches:
        kind = "no file matches the pattern" if glob.has_magic(path) else "there is no such file or folder"
        raise TokenError(
            f"{key}={path}: {kind}; data.source={source} reads {', '.join(suffixes)} (also .gz, .xz, .bz2)"
        )
    return matches


class FileDocuments:
    """The documents of files of one kind, in order; empty ones are left out.

    Raises
    ------
    TokenError : a file cannot be read, or which column holds its text is not clear; names ``key``
    """

    def __init__(self, files: Sequence[Path], source: str, column: str | None, key: str) -> None:
        self._documents, self._key = Documents(files, source, column), key

    def __iter__(self) -> Iterator[Document]:
        try:
            for text, name in self._documents:
                yield Document(text, name)
        except TokenError as error:
            raise TokenError(f"{self._key}: {error}") from error

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of what has been read."""
        return self._documents.notes
