"""Where training data come from: files, data sets, tokenizers."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from osp_diag.text import builtin_text
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data import open_data
from osp_diag.trainer.data.make_tokenizer import make_tokenizer
from osp_diag.trainer.data.sources import builtin_documents
from osp_diag.trainer.data.tokenizing import builtin_tokenizer
from tests.training_documents import TEXTS, numbered, rows_of, word_tokenizer, write_texts


def test_the_built_in_text_needs_nothing():
    data = open_data(DataConfig(), batch_size=16, vocabulary_size=4096)
    assert data.documents == 46
    assert data.tokenizer.eos_token_id == data.tokenizer.bos_token_id == 0
    assert data.tokenizer_fingerprint != "none"
    assert data.description.startswith(
        "built-in English text: 46 documents, 240,167 tokens; 6,381 tokens held"
    )
    documents = list(builtin_documents())
    assert [document.source for document in documents[:3]] == ["chapter", "address", "chapter"]
    assert "\n\n".join(document.text for document in documents) == builtin_text().strip()
    inputs, labels, _ = rows_of(data, 1)[0]
    assert inputs[1:] == labels[:-1]
    assert data.tokenizer.decode([t for t in inputs if t]) in builtin_text().replace("\n\nChapter", "Chapter")


def test_the_tokenizer_that_comes_along_is_the_one_its_script_makes():
    made, kept = make_tokenizer(), builtin_tokenizer()
    assert made.to_str() == kept.backend_tokenizer.to_str()
    assert len(kept) == 4096
    text = "Sir Walter Elliot, of Kellynch Hall — naïve?\n\n\tЁ 漢字 <|endoftext|>"
    assert kept.decode(kept(text, add_special_tokens=False)["input_ids"]) == text
    assert kept("Anne")["input_ids"][0] == 0, "it puts BOS first by itself"


def test_what_ends_documents_is_no_part_of_their_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one <|endoftext|> two " * 20}))
    config = DataConfig(source="jsonl", path=str(tmp_path), sequence_length=4, bos="none")
    data = open_data(config, batch_size=1, vocabulary_size=4096)
    assert 0 not in data._stream.slice(0, len(data._stream) - 1)


@pytest.mark.parametrize("kind", ["text", "separated", "jsonl", "jsonl.gz", "jsonl.xz", "parquet"])
def test_files_of_every_kind_give_the_same_documents(kind, tmp_path):
    config = DataConfig(sequence_length=8, validation_fraction=0.2, **write_texts(tmp_path, kind))
    data = open_data(config, batch_size=1, vocabulary_size=4096)
    found = [*data._stream.slice(0, 10**6), *data._held_out.slice(0, 10**6)]
    texts = {text.strip() for text in data.tokenizer.decode(found).split("<|endoftext|>")} - {""}
    assert texts == set(TEXTS)
    assert data.documents < len(TEXTS)
    assert str(tmp_path) not in data.description


@pytest.mark.parametrize("name", ["ids.npy", "ids.bin", "ids.bin.xz", "ids.bin.gz", "ids64.npy"])
def test_files_of_ids_are_taken_as_they_are(name, tmp_path):
    ids = np.asarray([t for d in numbered([20] * 10) for t in [*d, 0]])
    if name.endswith(".npy"):
        np.save(tmp_path / name, ids.astype(np.int64 if "64" in name else np.uint32))
    else:
        pack = {".bin": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[Path(name).suffix]
        (tmp_path / name).write_bytes(pack(ids.astype("<u2").tobytes()))
    config = DataConfig(source="tokens", path=str(tmp_path / name), sequence_length=5, shuffle=False)
    data = open_data(config, batch_size=1, vocabulary_size=201)
    assert data.tokenizer is None
    assert data.tokenizer_fingerprint == "none"
    assert data.documents == 9
    assert len(set(data._stream.slice(0, 10**6)) | set(data._held_out.slice(0, 10**6))) == 201
    assert len(data.fingerprint) == 32


def test_several_files_end_their_documents(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1, 11))
    np.save(tmp_path / "b.npy", np.asarray([*range(11, 21), 0, *range(21, 31)]))
    np.save(tmp_path / "held.npy", np.arange(50, 70))
    config = DataConfig(
        source="tokens",
        path=str(tmp_path / "[ab].npy"),
        validation_path=str(tmp_path / "held.npy"),
        sequence_length=33,
        shuffle=False,
    )
    data = open_data(config, batch_size=1, vocabulary_size=100)
    inputs, labels, _ = rows_of(data, 1)[0]
    assert inputs == [0, *range(1, 11), 0, *range(11, 21), 0, *range(21, 31)]
    assert labels[-1] == 0


@pytest.mark.parametrize("given_as", ["configured", "folder", "file"])
def test_a_tokenizer_with_two_delimiters(given_as, tmp_path):
    folder = word_tokenizer(tmp_path / "tokenizer", config=given_as == "configured")
    (tmp_path / "a.txt").write_text("a b c\n<|endoftext|>\nd e\n")
    (tmp_path / "held.txt").write_text("f g h f g h f g h")
    expected = {
        "document": [[1, 3, 4, 5, 2, 1, 6, 7], [3, 4, 5, 2, -100, 6, 7, 2], [0, 0, 0, 0, 0, 1, 1, 1]],
        "sequence": [[1, 3, 4, 5, 2, 6, 7], [3, 4, 5, 2, -100, 7, 2], [0, 0, 0, 0, 0, 1, 1]],
        "none": [[3, 4, 5, 2, 6, 7], [4, 5, 2, -100, 7, 2], [0, 0, 0, 0, 1, 1]],
    }
    for bos, rows in expected.items():
        config = DataConfig(
            source="text",
            path=str(tmp_path / "a.txt"),
            validation_path=str(tmp_path / "held.txt"),
            tokenizer=str(folder / "tokenizer.json" if given_as == "file" else folder),
            sequence_length=len(rows[0]),
            bos=bos,
            separate_documents=True,
        )
        batch = open_data(config, batch_size=1, vocabulary_size=11).next_batch()
        assert [batch.input_ids[0].tolist(), batch.labels[0].tolist()] == rows[:2]
        assert batch.document_ids[0].tolist() == rows[2]
