"""Where text comes from: a string, a file, the built-in text, or a data set read as a stream."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from osp_diag.errors import TokenError
from osp_diag.text import builtin_text
from osp_diag.text.documents import (
    SAMPLED_ROWS,
    SUFFIXES,
    Documents,
    column_of,
    kind_of,
    read_text,
    texts_by_column,
    without_text_note,
)

__all__ = [
    "STRING_TEXT",
    "DatasetText",
    "PlainText",
    "Text",
    "chosen_column",
    "dataset_errors",
    "name_without_path",
    "open_dataset",
    "text_source",
]

STRING_TEXT = "text given as a string"
"""How a text is described that is no file's."""

BETWEEN_DOCUMENTS = "\n\n"
"""What joins the documents of a data set: a blank line, as in the released OSP script."""

PREFERRED_SPLITS = ("validation", "test", "train")
"""Held-out text first: activations are measured on what was not trained on."""

LONGEST_WORD = 1000
"""Characters within which a blank is looked for where a text is cut; Chinese, DNA and base64 have none."""
BUILDERS = {"text": "text", "jsonl": "json", "parquet": "parquet", "table": "csv"}
"""What the library datasets calls readers of files."""
FILE_SPLIT = "train"
"""What the library datasets calls the rows of a single file."""


class Text(Protocol):
    """A text that is read from its start, as far as it is needed."""

    description: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of what has been read."""
        ...

    def prefix(self, characters: int) -> tuple[str, bool]:
        """About that many characters from the start (fewer at its end), and whether that was all."""
        ...


class PlainText:
    """A text in memory."""

    notes: tuple[str, ...] = ()

    def __init__(self, text: str, description: str) -> None:
        self.description = description
        self._text = text

    def prefix(self, characters: int) -> tuple[str, bool]:
        return _cut(self._text, characters)


class DatasetText:
    """The text column of a data set, its documents joined by blank lines.

    Parameters
    ----------
    dataset
        A hub id, ``id:configuration``, or a local path (a directory, or a file .jsonl, .json, .parquet,
        .csv, .tsv or .txt, also compressed).
    split
        None takes the first there is of validation, test and train.
    column
        None takes ``text``, or the only column of text.

    Raises
    ------
    TokenError
        It cannot be reached or read, or which column holds the text is not clear.
    """

    def __init__(self, dataset: str, *, split: str | None = None, column: str | None = None) -> None:
        path = Path(dataset).expanduser()
        self._dataset = dataset
        self._documents: _File | _Rows
        if path.is_file():
            self._documents = _File(path, split, column)
        else:
            self._documents = _Rows(dataset, split, column)
        self._texts = iter(self._documents)
        # The first document settles which column is read.
        first = self._next()
        if first is None:
            raise TokenError(
                f"the data set {dataset} has no text in its split {self._documents.split!r}; it is empty, or "
                "its rows are"
            )
        of_column = f", column {self._documents.column}" if self._documents.column else ""
        name = name_without_path(dataset)
        self.description = f"dataset {name}, split {self._documents.split}{of_column}"
        self._text = first
        self._exhausted = False

    @property
    def notes(self) -> tuple[str, ...]:
        return self._documents.notes

    def prefix(self, characters: int) -> tuple[str, bool]:
        pieces, length = [self._text], len(self._text)
        while length <= characters and not self._exhausted:
            text = self._next()
            if text is None:
                self._exhausted = True
            else:
                pieces.append(text)
                length += len(text) + len(BETWEEN_DOCUMENTS)
        self._text = BETWEEN_DOCUMENTS.join(pieces)
        cut, is_whole = _cut(self._text, characters)
        return cut, is_whole and self._exhausted

    def _next(self) -> str | None:
        with dataset_errors(self._dataset):
            return next(self._texts, None)


class _File:
    """The documents of one local file."""

    split = FILE_SPLIT

    def __init__(self, path: Path, split: str | None, column: str | None) -> None:
        kind = kind_of(path)
        if kind is None:
            formats = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
            raise TokenError(
                f"{path} is not a data set: its type must be one of {formats}, also with .gz, .xz or .bz2"
            )
        if split not in (None, FILE_SPLIT):
            raise TokenError(f"the data set {path} has no split {split!r}; a single file is {FILE_SPLIT}")
        if kind == "text" and column is not None:
            raise TokenError(f"{path} is a text file, which has no columns; leave text_column out")
        self._documents = Documents([path], kind, column)

    def __iter__(self) -> Iterator[str]:
        return (text for text, _ in self._documents)

    @property
    def column(self) -> str | None:
        return self._documents.column

    @property
    def notes(self) -> tuple[str, ...]:
        return self._documents.notes


class _Rows:
    """The documents of a data set that the library datasets reads."""

    def __init__(self, dataset: str, split: str | None, column: str | None) -> None:
        self._name = name_without_path(dataset)
        self._rows, self.split = open_dataset(dataset, split)
        with dataset_errors(dataset):
            self.column, self._rows = chosen_column(self._rows, column, dataset)
        self._without = 0

    def __iter__(self) -> Iterator[str]:
        for row in self._rows:
            text = row[self.column]
            if text is None:
                self._without += 1
            elif text and not text.isspace():
                yield text

    @property
    def notes(self) -> tuple[str, ...]:
        return (without_text_note(self._name, self._without),) if self._without else ()


def name_without_path(dataset: str) -> str:
    """A hub id as it is, of a local path the last part."""
    path = Path(dataset).expanduser()
    return path.name if path.exists() else dataset


def chosen_column(rows: Any, column: str | None, dataset: str) -> tuple[str, Any]:
    """The column that holds the text, by the schema or else by the first rows; and all the rows.

    Raises
    ------
    TokenError
        There is none, or several could be meant.
    """
    features = getattr(rows, "features", None)
    if features:
        types = {name: getattr(feature, "dtype", None) for name, feature in features.items()}
        columns = {name: dtype in ("string", "large_string") for name, dtype in types.items()}
        return column_of(columns, column, dataset), rows
    remaining = iter(rows)
    sample = list(islice(remaining, SAMPLED_ROWS))
    if not sample:
        raise TokenError(f"the data set {dataset} has no rows")
    return column_of(texts_by_column(sample), column, dataset), chain(sample, remaining)


def _cut(text: str, characters: int) -> tuple[str, bool]:
    """A text up to a blank near that place, and whether that is all of it."""
    if len(text) <= characters:
        return text, True
    # Between words, so that the tokens before the cut are those of the whole text.
    space = re.compile(r"\s").search(text, characters, characters + LONGEST_WORD)
    return text[: characters if space is None else space.start()], False


def text_source(
    text: str | Path | None,
    dataset: str | None,
    *,
    split: str | None = None,
    column: str | None = None,
) -> Text:
    """The text meant by ``text`` (a file's path, or the text itself) or ``dataset``; built in if neither.

    A string names a file if that file exists, or if it has no blank in it and looks like a path; one that is
    too long to be a file's name is a text.

    Raises
    ------
    TokenError
        The file or data set cannot be read, or the text is empty.
    """
    if dataset is not None:
        return DatasetText(str(dataset), split=split, column=column)
    if text is None:
        return PlainText(builtin_text(), "built-in English text")
    if isinstance(text, Path) or _names_a_file(text):
        path = Path(text).expanduser()
        content, description = _read(path), f"file {path.name}"
    else:
        content, description = text, STRING_TEXT
    if not content.strip():
        raise TokenError(f"{description} is empty: there is no text to run the model on")
    return PlainText(content, description)


def _names_a_file(text: str) -> bool:
    if not text or len(text) > 1024 or "\n" in text:
        return False
    try:
        os.stat(Path(text).expanduser())
    except (ValueError, RuntimeError):  # a null character; "~" before what is no user's name
        return False
    except OSError as problem:
        if problem.errno == errno.ENAMETOOLONG:
            return False
    else:
        return True
    return not re.search(r"\s", text) and (
        "/" in text or Path(text).suffix.lower() in {".txt", ".md", ".text"}
    )


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise TokenError(f"{path} is a directory; give one text file, or a data set's path as dataset")
        if not path.is_file():
            raise TokenError(f"there is no text file {path}{_spelling_advice(path)}")
        if kind_of(path) in ("jsonl", "parquet"):
            raise TokenError(f"{path} holds rows, not a text; give it as dataset (--dataset {path})")
        return read_text(path)
    except OSError as error:
        raise TokenError(f"{path} cannot be read: {error.strerror}") from error


def _spelling_advice(path: Path) -> str:
    matches = path.parent.is_dir() and difflib.get_close_matches(
        path.name, [entry.name for entry in path.parent.iterdir()], n=1
    )
    return f"; did you mean {matches[0]}?" if matches else "; check the path"


def open_dataset(dataset: str, split: str | None) -> tuple[Any, str]:
    """A data set of the library ``datasets``, streamed unless it was saved to disk, and the split it is.

    Of a file, its only split. Where no place in it has to be found again, :mod:`osp_diag.text.documents`
    reads files without the library.

    Raises
    ------
    TokenError
        It cannot be reached or read, has no such split, or the library is missing.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise TokenError(
            f'reading the data set {dataset} needs the package datasets: pip install "osp-diag[datasets]"'
        ) from error
    path = Path(dataset).expanduser()
    looks_local = path.is_absolute() or dataset.startswith((".", "~")) or kind_of(path) is not None
    if looks_local and not path.exists():
        raise TokenError(f"there is no data set at {dataset}: the path does not exist")
    with dataset_errors(dataset):
        if path.is_file():
            splits = _file_rows(path)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
        else:
            name, _, configuration = (str(path), "", "") if path.is_dir() else dataset.partition(":")
            splits = datasets.load_dataset(name, configuration or None, streaming=True)
    if not isinstance(splits, dict):
        return splits, split or "all"
    name_of_split = split or next((name for name in PREFERRED_SPLITS if name in splits), next(iter(splits)))
    if name_of_split not in splits:
        raise TokenError(f"the data set {dataset} has no split {name_of_split!r}; it has {', '.join(splits)}")
    return splits[name_of_split], name_of_split


def _file_rows(path: Path) -> Any:
    """A file as a streamed data set of the split :data:`FILE_SPLIT`."""
    import datasets

    kind = kind_of(path)
    if kind not in BUILDERS:
        kinds = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise TokenError(f"{path} is not a data set: its type must be one of {kinds}")
    # A text is one document, not one a line.
    options = {"sample_by": "document"} if kind == "text" else {}
    return datasets.load_dataset(
        BUILDERS[kind], data_files={FILE_SPLIT: str(path)}, streaming=True, **options
    )


@contextmanager
def dataset_errors(dataset: str, *, quiet: bool = True) -> Iterator[None]:
    """Quiet reading; whatever goes wrong becomes one message.

    Quiet means a change of the process's standard error: not for threads beside others.
    """
    from osp_diag.quiet import quietly

    try:
        with quietly() if quiet else nullcontext():
            yield
    except TokenError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TokenError(
            f"the data set {dataset} cannot be read: {type(error).__name__}: "
            f"{lines[0] if lines else 'no reason given'}. "
            "Check its name (id:configuration where it has several) and the connection, or give a local "
            ".jsonl or .parquet file, or a text file"
        ) from error
