"""Texts of local files, one document after the other: text, JSON lines, Parquet and tables, also compressed.

Probing and training read through here, so that a file is the same text for both: a byte order mark is left
out, UTF-16 is read as what it is, and every line ends with a line feed whatever it ended with.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from osp_diag.errors import TokenError
from osp_diag.text.tokenizer_files import END_OF_TEXT
from osp_diag.text.unpacking import PACKED, unpacked
from osp_diag.wording import counted, listed

__all__ = [
    "SUFFIXES",
    "Documents",
    "bare_suffix",
    "column_of",
    "kind_of",
    "lines_of",
    "open_file",
    "read_text",
    "texts_by_column",
    "without_text_note",
]

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "text": (".txt", ".md", ".text"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "table": (".csv", ".tsv"),
}
TEXT_COLUMN = "text"
SAMPLED_ROWS = 1000
"""Rows whose values say which columns hold text, where no schema does."""
ENCODINGS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
READING_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


def bare_suffix(file: Path) -> str:
    """A file's suffix, that of compression left out: ``.jsonl`` of ``a.jsonl.gz``."""
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix.lower()


def kind_of(file: Path) -> str | None:
    """``text``, ``jsonl``, ``parquet`` or ``table``, by the name; None for another file."""
    return next((kind for kind, suffixes in SUFFIXES.items() if bare_suffix(file) in suffixes), None)


def open_file(file: Path) -> IO[bytes]:
    """A file's bytes, unpacked where it is compressed."""
    return unpacked(file) if file.suffix in PACKED else file.open("rb")


class Documents:
    """The documents of files of one kind, in order; empty ones are left out, and rows without a text counted.

    A text file is one document, or several between lines of ``<|endoftext|>``.

    Parameters
    ----------
    files
        To read, one after the other.
    kind
        See :func:`kind_of`.
    column
        That holds the text; None takes ``text``, or the only column of text.

    Raises
    ------
    TokenError
        A file cannot be read, or which column holds its text is not clear; names file and line.
    """

    def __init__(self, files: Sequence[Path], kind: str, column: str | None = None) -> None:
        self._files, self._read = files, _READERS[kind]
        self._wanted = column
        self.column: str | None = None
        """The column that is read, once it has begun; None of text files."""
        self._without: dict[str, int] = {}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Each text, and the name of its file."""
        for file in self._files:
            count = 0
            try:
                for text in self._read(file, self):
                    if text is None:
                        count += 1
                        self._without[file.name] = count
                    elif text and not text.isspace():
                        yield text, file.name
            except READING_ERRORS as error:
                raise TokenError(f"{file} cannot be read: {error}") from error

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of what has been read."""
        return tuple(without_text_note(name, count) for name, count in self._without.items())

    def choose(self, columns: Mapping[str, bool | None], file: Path) -> str:
        """The column of one file: see :func:`column_of`."""
        self.column = column_of(columns, self._wanted, file.name)
        return self.column


def without_text_note(name: str, count: int) -> str:
    """What is said of rows without a text, of a file or of a data set."""
    return f"{name}: {counted(count, 'row')} without a text left out."


def read_text(file: Path) -> str:
    """The whole text of a file.

    Raises
    ------
    TokenError
        It cannot be read, or is no text.
    """
    try:
        return "".join(lines_of(file))
    except READING_ERRORS as error:
        raise TokenError(f"{file} cannot be read: {error}") from error


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a text file, each with its ``\\n``.

    Raises
    ------
    TokenError
        It is no text in UTF-8, nor in UTF-16 with a byte order mark.
    """
    with open_file(file) as stream:
        beginning = stream.peek(4096)[:4096]  # type: ignore[attr-defined]  # a buffered reader of either kind
        encoding = next((name for mark, name in ENCODINGS if beginning.startswith(mark)), "utf-8")
        if encoding != "utf-16" and b"\0" in beginning:
            raise TokenError(
                f"{file} is no text: byte {beginning.index(0)} is zero. If it is UTF-16, convert it "
                "(iconv -f UTF-16LE -t UTF-8)"
            )
        if encoding == "utf-16":
            try:
                with io.TextIOWrapper(stream, encoding=encoding) as lines:  # which ends them with a line feed
                    yield from lines
            except UnicodeError as error:
                raise TokenError(f"{file} is not whole UTF-16 text: {error}") from None
            return
        yield from _normalised(_decoded(stream, file))


def _decoded(stream: IO[bytes], file: Path) -> Iterator[str]:
    position = 0
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            value, place = error.object[error.start], position + error.start
            raise TokenError(
                f"{file} is not UTF-8 text: byte {place} is 0x{value:02x}, in line {number}. Convert it "
                "(iconv -t UTF-8), or give another file"
            ) from None
        position += len(line)


def _normalised(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield line.replace("\r\n", "\n").replace("\r", "\n") if "\r" in line else line


# Readers: each yields the texts of a file, None for a row that has none.


def _of_text(file: Path, documents: Documents) -> Iterator[str | None]:
    lines: list[str] = []
    for line in lines_of(file):
        if line.strip() == END_OF_TEXT:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _of_json_lines(file: Path, documents: Documents) -> Iterator[str | None]:
    rows = _json_rows(file)
    sample = list(islice(rows, SAMPLED_ROWS))
    if not sample:
        return
    name = documents.choose(texts_by_column([row for _, row in sample]), file)
    for number, row in chain(sample, rows):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise TokenError(
                f"{file}, line {number}: {type(value).__name__} in the column {name!r}, not text"
            )
        yield value


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield from _json_array(file)
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise TokenError(f"{file}, line {number} is no JSON: {reason}; give one object a line") from None
        if not isinstance(row, dict):
            raise TokenError(
                f"{file}, line {number} is no JSON object with columns, but {type(row).__name__}"
            )
        yield number, row


def _json_array(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A file that is one array of objects; rows are counted in place of lines."""
    try:
        rows = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise TokenError(f"{file}, line {error.lineno} is no JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or very deep
        raise TokenError(f"{file} is no JSON that can be read: {type(error).__name__}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise TokenError(
                f"{file}: entry {number} is no JSON object with columns, but {type(row).__name__}"
            )
        yield number, row


def _of_table(file: Path, documents: Documents) -> Iterator[str | None]:
    try:
        rows = csv.DictReader(lines_of(file), delimiter="\t" if bare_suffix(file) == ".tsv" else ",")
        sample = list(islice(rows, SAMPLED_ROWS))
        if not sample:
            return
        # Everything is text in such a file; a column of numbers is not meant.
        name = documents.choose(
            {
                str(column): not all(_is_number(row[column]) for row in sample)
                for column in rows.fieldnames or ()
            },
            file,
        )
        for row in chain(sample, rows):
            yield row[name] or None
    except csv.Error as error:
        raise TokenError(f"{file}, line {rows.line_num} is no row of a table: {error}") from None


def _is_number(value: str | None) -> bool:
    try:
        float(value or 0)
    except ValueError:
        return False
    return True


def _of_parquet(file: Path, documents: Documents) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise TokenError(
            f"reading {file} needs the package pyarrow, which datasets brings: "
            'pip install "osp-diag[datasets]"'
        ) from error
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        columns = {field.name: _is_text_type(field.type) for field in parquet.schema_arrow}
        name = documents.choose(columns, file)
        for batch in parquet.iter_batches(columns=[name]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise TokenError(f"{file} is no whole Parquet file: {error}") from None


def _is_text_type(kind: Any) -> bool:
    """Whether an Arrow type is text: plain, large or viewed strings, or a dictionary of them."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


_READERS: Mapping[str, Callable[[Path, Documents], Iterator[str | None]]] = {
    "text": _of_text,
    "jsonl": _of_json_lines,
    "parquet": _of_parquet,
    "table": _of_table,
}


# Which column


def texts_by_column(rows: Iterable[Mapping[str, Any]]) -> dict[str, bool | None]:
    """Column → whether it holds text, by the values of rows; None where they are all null."""
    holds: dict[str, bool | None] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                holds[name] = True
            elif value is not None:
                holds[name] = bool(holds.get(name))
            else:
                holds.setdefault(name, None)
    return holds


def column_of(columns: Mapping[str, bool | None], wanted: str | None, source: str) -> str:
    """The name of the column that holds the text: ``wanted``, or ``text``, or the only one that holds text.

    Parameters
    ----------
    columns
        Column → whether it holds text; None: nothing but nulls were seen.
    source
        Name of the file or data set, for the message.

    Raises
    ------
    TokenError
        There is no such column of text, or several could be meant; the message lists the candidates.
    """
    texts = [name for name, holds_text in columns.items() if holds_text]
    candidates = f"its text columns are {listed(texts) if texts else 'none'}"
    if wanted is not None:
        if wanted not in columns or columns[wanted] is False:
            raise TokenError(
                f"the data set {source} has no text column {wanted!r}; {candidates}; name one of them with "
                f"text_column (--text-column, in training data.text_column); all its columns are "
                f"{listed(list(columns)) or 'none'}"
            )
        return wanted
    if columns.get(TEXT_COLUMN):
        return TEXT_COLUMN
    if len(texts) == 1:
        return texts[0]
    raise TokenError(
        f"which column of the data set {source} holds the text is not clear: {candidates}; name one with "
        f"text_column (--text-column, in training data.text_column); all columns are "
        f"{listed(list(columns)) or 'none'}"
    )
