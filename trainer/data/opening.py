"""Opening what a configuration names; whatever is wrong with it is said here, before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osp_diag.errors import TokenError, UsageError
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data.arrays import ArrayData
from osp_diag.trainer.data.batch import SequenceForm
from osp_diag.trainer.data.corpus import Corpus, encoded, read_token_files
from osp_diag.trainer.data.sources import FileDocuments, builtin_documents, files_at
from osp_diag.trainer.data.streams import StreamData
from osp_diag.trainer.data.tokenizing import Encoder, check_vocabulary, delimiters_of, open_tokenizer
from osp_diag.trainer.data.training_data import Dealing, TrainingData

__all__ = ["open_data"]


def open_data(
    config: DataConfig, *, batch_size: int, vocabulary_size: int, rank: int = 0, ranks: int = 1
) -> TrainingData:
    """The training data of a configuration.

    Texts in files are tokenised once, here; data sets are streamed.

    Parameters
    ----------
    config : source, tokenizer, packing and order
    batch_size : sequences of a batch over all ranks
    vocabulary_size : of the model, which every id must be below
    rank, ranks : this process, of so many

    Raises
    ------
    TokenError : the data are missing, unreadable, too small, or foreign to the vocabulary
    UsageError : a value does not fit the others
    """
    dealing = Dealing(batch_size, rank, ranks)
    _check_mixture(config)
    # Files of ids may come without a tokenizer.
    bare = config.source == "tokens" and config.tokenizer is None
    tokenizer = None if bare else open_tokenizer(config.tokenizer)
    begin, end = (0, 0) if tokenizer is None else delimiters_of(tokenizer)
    if tokenizer is not None:
        check_vocabulary(tokenizer, vocabulary_size)
    form = SequenceForm(config.sequence_length, config.bos, begin, end, config.separate_documents)
    if config.source in ("huggingface", "mixture"):
        return StreamData(config, form, tokenizer, dealing)
    corpus, source, notes = _corpus(config, config.path, "data.path", form, tokenizer, vocabulary_size)
    validation = None
    if config.validation_path is not None:
        validation, _, further = _corpus(
            config, config.validation_path, "data.validation_path", form, tokenizer, vocabulary_size
        )
        notes += further
    largest = max(corpus.largest, 0 if validation is None else validation.largest)
    if largest >= vocabulary_size:
        raise TokenError(
            f"{source} has the token id {largest}, and model.vocabulary_size={vocabulary_size}; set "
            f"model.vocabulary_size={largest + 1} or more, or give the ids of another tokenizer"
        )
    data = ArrayData(config, form, tokenizer, dealing, corpus=corpus, validation=validation, source=source)
    data.notes += notes
    return data


def _corpus(
    config: DataConfig,
    path: str | None,
    key: str,
    form: SequenceForm,
    tokenizer: Any,
    vocabulary_size: int,
) -> tuple[Corpus, str, tuple[str, ...]]:
    """The documents of a local source, what they are in words, and what is to be said of them."""
    if path is None:
        corpus = encoded(builtin_documents(), Encoder(tokenizer), form, "the built-in text")
        return corpus, "built-in English text", ()
    # What is held out from the built-in text may be a text file.
    kind = "text" if config.source == "builtin" else config.source
    files = files_at(path, kind, key)
    source = f"{kind} {_file_names(files)}"
    if kind == "tokens":
        return read_token_files(files, form, key, vocabulary_size), source, ()
    documents = FileDocuments(files, kind, config.text_column, key)
    return encoded(documents, Encoder(tokenizer), form, f"{key}={path}"), source, documents.notes


def _file_names(files: Sequence[Path]) -> str:
    name = files[0].name
    return f"file {name}" if len(files) == 1 else f"files {name} to {files[-1].name} ({len(files)})"


def _check_mixture(config: DataConfig) -> None:
    for name, weight in config.mixture.items() if config.source == "mixture" else ():
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise UsageError(f"data.mixture: the weight {weight} of {name} is not a finite number above 0")
