"""Training data that are refused, with what is wrong and what to do."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from osp_diag.errors import TokenError, UsageError
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data import open_data
from tests.training_documents import word_tokenizer, write_texts


def refused(message: str, *, kind=TokenError, batch_size=2, vocabulary_size=4096, rank=0, ranks=1, **changes):
    with pytest.raises(kind, match=message):
        open_data(
            DataConfig(**changes),
            batch_size=batch_size,
            vocabulary_size=vocabulary_size,
            rank=rank,
            ranks=ranks,
        )


def test_missing_and_empty_files_are_refused(tmp_path):
    for source in ("text", "jsonl", "parquet", "tokens"):
        message = f"data.path=.*nowhere: there is no such file or folder; data.source={source} reads"
        refused(message, source=source, path=str(tmp_path / "nowhere"))
        refused("no file matches the pattern", source=source, path=str(tmp_path / "*.none"))
        refused(f"the folder has no {source} files", source=source, path=str(tmp_path))
    (tmp_path / "blank.txt").write_text(" \n ")
    refused(
        "data.path=.*blank.txt is empty: there is no text", source="text", path=str(tmp_path / "blank.txt")
    )
    refused("data.validation_path=.*there is no such file", source="builtin", validation_path="/no/where")


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused(
        "data.path: .*a.txt is not UTF-8 text: byte 3 is 0xe9, in line 1",
        source="text",
        path=str(tmp_path / "a.txt"),
    )
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nno json\n')
    refused("a.jsonl, line 2 is no JSON: Expecting value", source="jsonl", path=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("[1]\n")
    refused("b.jsonl: entry 1 is no JSON object", source="jsonl", path=str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    refused(
        "c.jsonl, line 2: int in the column 'text', not text", source="jsonl", path=str(tmp_path / "c.jsonl")
    )
    (tmp_path / "a.parquet").write_bytes(b"PAR?")
    refused("a.parquet is no whole Parquet file", source="parquet", path=str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt.gz").write_bytes(b"no gzip")
    refused("a.txt.gz cannot be read", source="text", path=str(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_columns_there_are_are_named(kind, tmp_path):
    config = {**write_texts(tmp_path, kind), "text_column": "words"}
    message = "no text column 'words'; its text columns are story, note; .* all its columns are id, story"
    refused(message, **config)
    unclear = "is not clear: its text columns are story, note; name one with text_column .*data.text_column"
    refused(f"which column .* {unclear}", **{**config, "text_column": None})


def test_too_small_a_corpus_is_refused(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(30))
    options = {"source": "tokens", "path": str(tmp_path / "ids.npy")}
    refused(
        "fewer than one sequence of data.sequence_length=64 with its labels", sequence_length=64, **options
    )
    message = "makes 3 sequences of data.sequence_length=8, fewer than one batch of batch_size=4"
    refused(message, sequence_length=8, batch_size=4, **options)


def test_too_little_held_out_text_is_refused():
    data = open_data(DataConfig(), batch_size=1, vocabulary_size=4096)
    message = (
        r"the held-out text has 6,381 tokens, and probe.tokens=8192 needs 8,193; raise "
        r"data.validation_fraction=0.02, or give more text in data.validation_path, or lower probe.tokens"
    )
    with pytest.raises(TokenError, match=message):
        data.held_out(8192)


def test_foreign_vocabularies_are_refused(tmp_path):
    refused(
        "the tokenizer has 4,096 entries and model.vocabulary_size=4000; set model.voc", vocabulary_size=4000
    )
    np.save(tmp_path / "ids.npy", np.arange(100))
    options = {"source": "tokens", "path": str(tmp_path / "ids.npy"), "sequence_length": 4}
    refused("has the token id 99, and model.vocabulary_size=50; set model.voc", vocabulary_size=50, **options)
    np.save(tmp_path / "ids.npy", np.arange(-1, 100))
    refused("has the id -1; token ids are 0 or more", **options)


def test_files_that_hold_no_ids_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    refused(r"has float64 of shape \(2, 3\); token ids are", source="tokens", path=str(tmp_path / "a.npy"))
    (tmp_path / "a.bin").write_bytes(b"123")
    refused("3 bytes are no whole number of uint16", source="tokens", path=str(tmp_path / "a.bin"))
    (tmp_path / "b.bin").write_bytes(b"")
    refused("b.bin holds no token ids: it is empty", source="tokens", path=str(tmp_path / "b.bin"))


def test_ids_without_the_bos_that_is_asked_for_are_refused(tmp_path):
    folder = word_tokenizer(tmp_path / "tokenizer", config=True)
    np.save(tmp_path / "ids.npy", np.asarray([3, 4, 2] * 20))
    options = {"source": "tokens", "path": str(tmp_path / "ids.npy"), "tokenizer": str(folder)}
    refused(r"begins with id 3, not with BOS \(1\), which data.bos=document expects", **options)
    open_data(DataConfig(bos="none", sequence_length=4, **options), batch_size=2, vocabulary_size=11)


def test_tokenizers_that_cannot_be_opened_are_refused(tmp_path):
    refused("data.tokenizer=/no/where: there is no tokenizer at /no/where", tokenizer="/no/where")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("is not a tokenizer of the library tokenizers", tokenizer=str(tmp_path / "tokenizer.json"))
    message = (
        "data.tokenizer=nobody/nothing: .*cannot be opened: .* Check the hub id and the connection; without a"
    )
    refused(message, tokenizer="nobody/nothing")
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    refused("has no token that ends a document", tokenizer=str(tmp_path / "bare.json"))


def test_batches_that_cannot_be_shared_out_are_refused():
    message = "batch_size=3 cannot be shared out evenly to 2 ranks; give a multiple of 2"
    refused(message, kind=UsageError, batch_size=3, ranks=2)
    refused("batch_size=0: give 1 or more", kind=UsageError, batch_size=0)
    refused("rank 2 is none of 2 ranks", kind=UsageError, rank=2, ranks=2)
