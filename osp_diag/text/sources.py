"""Where text comes from: a string, a file, the built-in text, or a data set read as a stream."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from osp_diag.errors import TokenError
from osp_diag.text import builtin_text

__all__ = [
    "STRING_TEXT",
    "DatasetText",
    "PlainText",
    "Text",
    "dataset_errors",
    "open_dataset",
    "text_column",
    "text_source",
]

STRING_TEXT = "text given as a string"
"""How a text is described that is no file's."""

BETWEEN_DOCUMENTS = "\n\n"
"""What joins the documents of a data set: a blank line, as in the released OSP script."""

PREFERRED_COLUMNS = ("text", "content", "document", "article", "body", "sentence")
PREFERRED_SPLITS = ("validation", "test", "train")
"""Held-out text first: activations are measured on what was not trained on."""

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class Text(Protocol):
    """A text that is read from its start, as far as it is needed."""

    description: str

    def prefix(self, characters: int) -> tuple[str, bool]:
        """At least that many characters from the start (fewer at its end), and whether that was all."""
        ...


class PlainText:
    """A text in memory."""

    def __init__(self, text: str, description: str) -> None:
        self.description = description
        self._text = text

    def prefix(self, characters: int) -> tuple[str, bool]:
        # Cut between words, so that the tokens before the cut are those of the whole text.
        space = re.compile(r"\s").search(self._text, characters)
        if space is None:
            return self._text, True
        return self._text[: space.start()], False


class DatasetText:
    """The text column of a Hugging Face data set, its documents joined by blank lines.

    Parameters
    ----------
    dataset
        A hub id, ``id:configuration``, or a local path (a directory, or a file .jsonl, .json, .parquet,
        .csv or .txt).
    split
        None takes the first there is of validation, test and train.
    column
        None takes ``text`` or its like, or the only column of strings.

    Raises
    ------
    TokenError
        It cannot be reached or read, or which column holds the text is not clear.
    """

    def __init__(self, dataset: str, *, split: str | None = None, column: str | None = None) -> None:
        documents, split_name = open_dataset(dataset, split)
        rows = iter(documents)
        with dataset_errors(dataset):
            first = next(rows, None)
        if first is None:
            raise TokenError(f"the data set {dataset} has no rows in its split {split_name!r}")
        self.column = text_column(first, column, dataset)
        name = Path(dataset).name if Path(dataset).expanduser().exists() else dataset
        self.description = f"dataset {name}, split {split_name}, column {self.column}"
        self._dataset = dataset
        self._rows = chain([first], rows)
        self._text = ""
        self._exhausted = False

    def prefix(self, characters: int) -> tuple[str, bool]:
        pieces, length = [self._text] if self._text else [], len(self._text)
        with dataset_errors(self._dataset):
            while length < characters and not self._exhausted:
                row = next(self._rows, None)
                if row is None:
                    self._exhausted = True
                elif row[self.column]:
                    pieces.append(row[self.column])
                    length += len(row[self.column]) + len(BETWEEN_DOCUMENTS)
        self._text = BETWEEN_DOCUMENTS.join(pieces)
        return self._text, self._exhausted


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
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}. Convert it "
            "(iconv -t UTF-8), or give another file"
        ) from None
    except OSError as error:
        raise TokenError(f"{path} cannot be read: {error.strerror}") from error


def _spelling_advice(path: Path) -> str:
    matches = path.parent.is_dir() and difflib.get_close_matches(
        path.name, [entry.name for entry in path.parent.iterdir()], n=1
    )
    return f"; did you mean {matches[0]}?" if matches else "; check the path"


def open_dataset(dataset: str, split: str | None) -> tuple[Any, str]:
    """A data set of the library ``datasets``, streamed unless it was saved to disk, and the split it is.

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
    looks_local = path.is_absolute() or dataset.startswith((".", "~")) or path.suffix in FILE_FORMATS
    if looks_local and not path.exists():
        raise TokenError(f"there is no data set at {dataset}: the path does not exist")
    with dataset_errors(dataset):
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                formats = ", ".join(FILE_FORMATS)
                raise TokenError(f"{dataset} is not a data set: its type must be one of {formats}")
            splits = datasets.load_dataset(
                FILE_FORMATS[path.suffix], data_files={"train": str(path)}, streaming=True
            )
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


def text_column(row: Mapping[str, Any], column: str | None, dataset: str) -> str:
    """The name of the column that holds the text, judged by one row: ``column`` if it is one of text.

    Raises
    ------
    TokenError
        There is no such column of text, or several could be meant.
    """
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if column is not None:
        if column not in strings:
            raise TokenError(
                f"the data set {dataset} has no text column {column!r}; its text columns are "
                f"{', '.join(strings) or 'none'}"
            )
        return column
    for name in PREFERRED_COLUMNS:
        if name in strings:
            return name
    if len(strings) == 1:
        return strings[0]
    raise TokenError(
        f"which column of the data set {dataset} holds the text is not clear: its text columns are "
        f"{', '.join(strings) or 'none'}; name one with text_column"
    )
