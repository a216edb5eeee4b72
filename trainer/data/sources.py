"""Documents of text, one after the other: the built-in ones, and those of text, JSONL and Parquet files."""

from __future__ import annotations

import glob
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from osp_diag.errors import TokenError
from osp_diag.text import builtin_text
from osp_diag.text.sources import text_column
from osp_diag.trainer.data.tokenizing import END_OF_TEXT
from osp_diag.trainer.data.unpacking import PACKED, unpacked

__all__ = ["Document", "builtin_documents", "documents_in", "files_at", "open_file"]

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "text": (".txt", ".md", ".text"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
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
        matches = sorted(
            file for file in root.rglob("*") if file.is_file() and _bare_suffix(file) in suffixes
        )
        if not matches:
            raise TokenError(f"{key}={path}: the folder has no {source} files ({', '.join(suffixes)})")
        return matches
    matches = sorted(Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file())
    if not matches:
        kind = "no file matches the pattern" if glob.has_magic(path) else "there is no such file or folder"
        raise TokenError(
            f"{key}={path}: {kind}; data.source={source} reads {', '.join(suffixes)} (also .gz, .xz)"
        )
    return matches


def _bare_suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix.lower()


def open_file(file: Path) -> IO[bytes]:
    """A file's bytes, unpacked where it is compressed."""
    return unpacked(file) if file.suffix in PACKED else file.open("rb")


def documents_in(files: Sequence[Path], source: str, column: str | None, key: str) -> Iterator[Document]:
    """The documents of files of one kind, in order; empty ones are left out.

    A text file is one document, or several between lines of ``<|endoftext|>``.

    Raises
    ------
    TokenError : a file cannot be read, or which column holds its text is not clear
    """
    reader = {"text": _text_documents, "jsonl": _jsonl_documents, "parquet": _parquet_documents}[source]
    for file in files:
        try:
            for text in reader(file, column):
                if text and not text.isspace():
                    yield Document(text, file.name)
        except TokenError as error:
            raise TokenError(f"{key}={file}: {error}") from None
        except UnicodeDecodeError as error:
            raise TokenError(f"{key}={file} is not UTF-8 text, at byte {error.start}; convert it") from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise TokenError(f"{key}={file} cannot be read: {error}") from error


def _text_documents(file: Path, column: str | None) -> Iterator[str]:
    with open_file(file) as stream:
        lines: list[str] = []
        for line in stream:
            text = line.decode("utf-8")
            if text.strip() == END_OF_TEXT:
                yield "".join(lines)
                lines = []
            else:
                lines.append(text)
        yield "".join(lines)


def _jsonl_documents(file: Path, column: str | None) -> Iterator[str]:
    name = None
    with open_file(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise
            except (ValueError, RecursionError) as error:  # also of a number of thousands of digits
                raise TokenError(
                    f"line {number} is no JSON: {error}; data.source=jsonl reads one object a line"
                ) from None
            if not isinstance(row, dict):
                raise TokenError(f"line {number} is no JSON object with columns")
            if name is None:
                name = _column(row, column, file)
            yield _string(row.get(name), name, f"line {number}")


def _parquet_documents(file: Path, column: str | None) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise TokenError(
            "reading Parquet needs the package pyarrow, which datasets brings: "
            'pip install "osp-diag[datasets]"'
        ) from error
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise TokenError(f"it is no Parquet file: {error}") from None
    strings = (pyarrow.types.is_string, pyarrow.types.is_large_string)
    row = {
        field.name: "" if any(is_string(field.type) for is_string in strings) else None
        for field in parquet.schema_arrow
    }
    name = _column(row, column, file)
    for batch in parquet.iter_batches(columns=[name]):
        for value in batch.column(0):
            yield value.as_py() or ""


def _column(row: Mapping[str, Any], column: str | None, file: Path) -> str:
    try:
        return text_column(row, column, file.name)
    except TokenError as error:
        raise TokenError(f"{error} (data.text_column; all columns are {', '.join(row) or 'none'})") from None


def _string(value: Any, column: str, place: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise TokenError(
        f"{place} has {type(value).__name__} in the column {column!r} (data.text_column), not text"
    )
