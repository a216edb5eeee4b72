"""Training data in arrays: laws of packing, ranks, resumption, what is held out, sources, refusals."""

from __future__ import annotations

import gzip
import json
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from osp_diag.errors import TokenError, TrainingError, UsageError
from osp_diag.text import builtin_text
from trainer.config import DataConfig
from trainer.data import Batch, Prefetched, TrainingData, open_data
from trainer.data.make_tokenizer import make_tokenizer
from trainer.data.sources import builtin_documents
from trainer.data.tokenizing import builtin_tokenizer

VOCABULARY = 100_000
LENGTHS = st.lists(st.integers(0, 13), min_size=1, max_size=12)


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents in which every token is another one, counted from 1."""
    firsts = np.cumsum([0, *lengths]) + 1
    return [list(range(first, first + length)) for first, length in zip(firsts, lengths, strict=False)]


def open_documents(documents: list[list[int]], batch_size: int = 1, **changes) -> TrainingData:
    """All of ``documents`` as training data, each ended by 0; something else is held out."""
    options = {key: changes.pop(key) for key in ("rank", "ranks") if key in changes}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/train.npy", np.asarray([t for d in documents for t in [*d, 0]], dtype=np.uint32))
        np.save(f"{folder}/other.npy", np.arange(90_000, 90_064, dtype=np.uint32))
        config = DataConfig(
            source="tokens", path=f"{folder}/train.npy", validation_path=f"{folder}/other.npy", **changes
        )
        return open_data(config, batch_size=batch_size, vocabulary_size=VOCABULARY, **options)


def same(one: Batch, other: Batch) -> bool:
    if (one.document_ids is None) != (other.document_ids is None):
        return False
    pairs = [(one.input_ids, other.input_ids), (one.labels, other.labels)]
    if one.document_ids is not None and other.document_ids is not None:
        pairs.append((one.document_ids, other.document_ids))
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def rows_of(data: TrainingData, count: int) -> list[tuple[list[int], list[int], list[int] | None]]:
    rows = []
    for _ in range(count):
        batch = data.next_batch()
        for row in range(len(batch)):
            documents = None if batch.document_ids is None else batch.document_ids[row].tolist()
            rows.append((batch.input_ids[row].tolist(), batch.labels[row].tolist(), documents))
    return rows


def stream_of(documents: list[list[int]], bos: str) -> list[int]:
    """Without a tokenizer 0 is both ends of a document: one between two of them, and BOS before the first."""
    stream = [token for document in documents for token in [*document, 0]]
    return [0, *stream] if bos == "document" else stream


# Laws of packing


@settings(max_examples=40)
@given(LENGTHS, st.integers(2, 9), st.sampled_from(["document", "sequence", "none"]), st.booleans())
def test_an_epoch_reads_every_token_of_the_stream_once(lengths, length, bos, shuffle):
    documents = numbered(lengths)
    stream = stream_of(documents, bos)
    body = length - (bos == "sequence")
    sequences = (len(stream) - 1) // body
    if sequences == 0:
        return
    data = open_documents(documents, sequence_length=length, bos=bos, shuffle=shuffle)
    assert data.sequences == sequences
    expected = []
    for first in range(0, sequences * body, body):
        own = [0] if bos == "sequence" else []
        labels = stream[first : first + body + 1] if own else stream[first + 1 : first + body + 1]
        expected.append(([*own, *stream[first : first + body]], labels, None))
    for _ in range(2):
        found = rows_of(data, sequences)
        assert sorted(found) == sorted(expected) if shuffle else found == expected


@settings(max_examples=40)
@given(LENGTHS, st.integers(2, 9), st.sampled_from(["document", "sequence", "none"]))
def test_no_document_lies_in_two_sequences_of_documents(lengths, length, bos):
    documents = numbered(lengths)
    stream, body = stream_of(documents, bos), length - (bos == "sequence")
    if len(stream) < 2:
        return
    data = open_documents(documents, sequence_length=length, bos=bos, packing="documents", shuffle=False)
    found = rows_of(data, data.sequences)
    # Naively: from the first document that begins where the last sequence is full, or after it.
    begins = list(np.cumsum([0, *[len(document) + 1 for document in documents[:-1]]]))
    expected = []
    while begins and begins[0] < len(stream) - 1:
        window = stream[begins[0] : begins[0] + body + 1]
        labels = [*window, *[-100] * (body + 1 - len(window))]
        inputs = [*window, *[0] * (body + 1 - len(window))][:-1]
        own = bos == "sequence"
        expected.append(([0, *inputs] if own else inputs, labels if own else labels[1:], None))
        begins = [begin for begin in begins if begin >= begins[0] + body]
    assert found == expected
    home = {token: number for number, document in enumerate(documents) for token in document}
    rows_with = [{home[token] for token in inputs if token} for inputs, _, _ in found]
    assert sum(map(len, rows_with)) == len(set().union(*rows_with)), "no document lies in two sequences"


@settings(max_examples=40)
@given(
    LENGTHS,
    st.integers(2, 9),
    st.sampled_from(["document", "sequence", "none"]),
    st.sampled_from(["stream", "documents"]),
)
def test_separate_documents_predict_nothing_of_one_another(lengths, length, bos, packing):
    documents = numbered(lengths)
    if len(stream_of(documents, bos)) <= length:
        return
    data = open_documents(
        documents, sequence_length=length, bos=bos, packing=packing, separate_documents=True
    )
    home = {token: number for number, document in enumerate(documents) for token in document}
    for inputs, labels, ids in rows_of(data, data.sequences):
        assert ids is not None
        assert ids[0] == 0
        assert all(step in (0, 1) for step in np.diff(ids))
        homes = [(home[token], own) for token, own in zip(inputs, ids, strict=True) if token]
        for one in homes:
            assert all((one[0] == other[0]) == (one[1] == other[1]) for other in homes)
        for token, label in zip(inputs, labels, strict=True):
            if token and label > 0:
                assert home[token] == home[label]
            if token and label == 0:  # the end of the document at hand is there to be learned
                assert token == documents[home[token]][-1]


def test_padding_after_the_last_document():
    data = open_documents(
        [[1, 2], [3]],
        sequence_length=8,
        bos="none",
        packing="documents",
        shuffle=False,
        separate_documents=True,
    )
    batch = data.next_batch()
    assert batch.input_ids.tolist() == [[1, 2, 0, 3, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[2, 0, -100, 0, -100, -100, -100, -100]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]


def test_packing_documents_says_what_it_leaves_out():
    data = open_documents([list(range(1, 10)), [20, 21]], sequence_length=4, bos="none", packing="documents")
    assert data.notes == (
        "data.packing=documents leaves out 46.2% of the tokens: the ends of documents that did not fit.",
    )


# Ranks, resumption, order


@settings(max_examples=30)
@given(
    LENGTHS.filter(lambda lengths: sum(lengths) > 40),
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from(["stream", "documents"]),
)
def test_all_ranks_together_see_the_same(lengths, ranks, packing):
    changes = {"sequence_length": 3, "packing": packing, "separate_documents": True}
    documents = numbered(lengths)
    if open_documents(documents, **changes).sequences < 6:
        return
    alone = open_documents(documents, batch_size=6, **changes)
    team = [open_documents(documents, batch_size=6, rank=r, ranks=ranks, **changes) for r in range(ranks)]
    for _ in range(4):
        whole = alone.next_batch()
        for rank, member in enumerate(team):
            part = member.next_batch()
            assert len(part) == 6 // ranks
            assert torch.equal(part.input_ids, whole.input_ids[rank::ranks])
            assert torch.equal(part.labels, whole.labels[rank::ranks])
            assert torch.equal(part.document_ids, whole.document_ids[rank::ranks])


@settings(max_examples=30)
@given(st.integers(0, 25), st.sampled_from([1, 2, 4]), st.booleans())
def test_resumed_data_go_on_with_the_very_next_sequence(batches, ranks, prefetched):
    documents, changes = numbered([9, 30, 4, 17]), {"sequence_length": 5, "batch_size": 4}
    uninterrupted = open_documents(documents, **changes)
    first = open_documents(documents, **changes)
    for _ in range(batches):
        uninterrupted.next_batch()
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    for rank in range(ranks):
        resumed = open_documents(documents, rank=rank, ranks=ranks, **changes)
        resumed.load_state_dict(state)
        uninterrupted.load_state_dict(state)
        source = Prefetched(resumed) if prefetched else resumed
        for _ in range(3):
            assert torch.equal(
                source.next_batch().input_ids, uninterrupted.next_batch().input_ids[rank::ranks]
            )
        if prefetched:
            source.close()


def test_every_epoch_has_its_own_order_that_the_seed_decides():
    documents = numbered([400])
    first, again = (open_documents(documents, sequence_length=4, seed=3) for _ in range(2))
    epochs = [rows_of(first, first.sequences) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert first.epoch == 2
    assert rows_of(again, first.sequences) == epochs[0]
    assert rows_of(open_documents(documents, sequence_length=4, seed=4), first.sequences) != epochs[0]


def test_prefetched_data_are_the_data():
    documents = numbered([90])
    plain = open_documents(documents, sequence_length=4, batch_size=3)
    with Prefetched(open_documents(documents, sequence_length=4, batch_size=3), depth=3) as ahead:
        start = ahead.state_dict()
        assert ahead.fingerprint == plain.fingerprint
        for _ in range(12):
            assert same(ahead.next_batch(), plain.next_batch())
            assert ahead.state_dict() == plain.state_dict()
        ahead.load_state_dict(start)
        plain.load_state_dict(start)
        assert same(ahead.next_batch(), plain.next_batch())
    # Closed, it goes on where it was.
    assert same(ahead.next_batch(), plain.next_batch())
    ahead.close()


def test_an_error_of_prefetching_is_raised_where_the_batch_was_asked_for(monkeypatch):
    data = open_documents(numbered([90]), sequence_length=4)
    monkeypatch.setattr(data, "next_batch", lambda: 1 / 0)
    ahead = Prefetched(data)
    with pytest.raises(ZeroDivisionError):
        ahead.next_batch()
    ahead.close()


def test_a_state_of_other_data_or_another_order_is_refused():
    data = open_documents(numbered([90]), sequence_length=4)
    other = open_documents(numbered([91]), sequence_length=4)
    with pytest.raises(TrainingError, match="the data are not those of the saved run: their fingerprint is"):
        other.load_state_dict(data.state_dict())
    longer = open_documents(numbered([90]), sequence_length=5, seed=1)
    message = r"data.sequence_length was 4 and is 5; data.seed was 0 and is 1. Resume with the same values"
    with pytest.raises(TrainingError, match=message):
        longer.load_state_dict(data.state_dict())


# What is held out


def held_and_read(config: DataConfig, vocabulary_size: int = VOCABULARY) -> tuple[set[int], set[int]]:
    data = open_data(config, batch_size=1, vocabulary_size=vocabulary_size)
    held = {t for batch in data.validation_batches(10**6) for t in batch.input_ids.flatten().tolist()}
    read = {t for inputs, _, _ in rows_of(data, data.sequences) for t in inputs}
    return held - {0}, read - {0}


@settings(max_examples=30)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=30), st.floats(0.01, 0.9))
def test_held_out_documents_are_never_read(lengths, fraction):
    documents = numbered(lengths)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/ids.npy", np.asarray([t for d in documents for t in [*d, 0]], dtype=np.int64))
        config = DataConfig(
            source="tokens",
            path=f"{folder}/ids.npy",
            sequence_length=2,
            validation_fraction=fraction,
            bos="none",
        )
        try:
            held, read = held_and_read(config)
        except TokenError:
            return
    assert held
    assert read
    assert not held & read
    home = {token: number for number, document in enumerate(documents) for token in document}
    assert not {home[t] for t in held} & {home[t] for t in read}, "documents are held out as a whole"


def test_the_held_out_part_does_not_depend_on_seed_length_or_packing(tmp_path):
    np.save(tmp_path / "ids.npy", np.asarray([t for d in numbered([40] * 30) for t in [*d, 0]]))
    config = {"source": "tokens", "path": str(tmp_path), "validation_fraction": 0.2}
    probes = [
        open_data(DataConfig(**config, **changes), batch_size=1, vocabulary_size=VOCABULARY).held_out(128)
        for changes in (
            {"sequence_length": 16},
            {"sequence_length": 32, "seed": 5},
            {"sequence_length": 64, "packing": "documents"},
        )
    ]
    assert [probe.shape for probe in probes] == [(8, 16), (4, 32), (2, 64)]
    assert all(np.array_equal(probe.ravel(), probes[0].ravel()) for probe in probes)
    assert probes[0][0, 0] == 0, "the first document has its BOS"


def test_a_text_is_held_out_by_what_it_says(tmp_path):
    lines = [json.dumps({"text": f"document number {n % 50} of some words"}) for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(source="jsonl", path=str(tmp_path), sequence_length=4, validation_fraction=0.1)
    data = open_data(config, batch_size=1, vocabulary_size=4096)
    texts = [
        set(data.tokenizer.decode(ids).split("<|endoftext|>")) - {""}
        for ids in (data._held_out.slice(0, 10**6), data._stream.slice(0, 10**6))
    ]
    assert len(texts[0]) + len(texts[1]) == 50, "none of the repeated texts is on both sides"


def test_of_a_single_document_the_end_is_held_out(tmp_path):
    (tmp_path / "book.txt").write_text(builtin_text()[:40_000])
    config = DataConfig(source="text", path=str(tmp_path / "book.txt"), validation_fraction=0.1)
    data = open_data(config, batch_size=2, vocabulary_size=4096)
    assert data.notes == (
        "There are too few documents to hold out whole ones; the end of the text is held out.",
    )
    words = data.tokenizer.decode(data.held_out(512)[0]).removeprefix("<|endoftext|>")
    assert words in builtin_text()[34_000:40_000]


def test_bos_of_the_probe_is_the_configurations():
    for bos, first in (("sequence", [0] * 4), ("none", None)):
        config = DataConfig(bos=bos, sequence_length=64)
        probe = open_data(config, batch_size=1, vocabulary_size=4096).held_out(256)
        assert probe.shape == (4, 64)
        assert probe.dtype == np.int64
        assert first is None or probe[:, 0].tolist() == first
        assert first is not None or (probe[0, 0] != 0)


def test_validation_batches_are_dealt_to_the_ranks():
    config = DataConfig(sequence_length=32)
    alone = open_data(config, batch_size=4, vocabulary_size=4096)
    whole = list(alone.validation_batches(10))
    assert [len(batch) for batch in whole] == [4, 4, 2]
    before = alone.state_dict()
    for rank in range(2):
        member = open_data(config, batch_size=4, vocabulary_size=4096, rank=rank, ranks=2)
        parts = torch.cat([batch.input_ids for batch in member.validation_batches(11)])
        assert torch.equal(parts, torch.cat([b.input_ids for b in alone.validation_batches(10)])[rank::2])
    assert alone.state_dict() == before, "validation takes nothing from training"


# Sources and tokenizers


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


TEXTS = [f"The {n}th of many documents, each of which has so many words as this one has." for n in range(12)]


def write_texts(folder: Path, kind: str) -> dict[str, str]:
    """The same documents as files of one kind; what of the configuration reads them."""
    rows = "".join(json.dumps({"id": n, "story": text, "note": "x"}) + "\n" for n, text in enumerate(TEXTS))
    column = {"text_column": "story"}
    if kind == "text":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:02}.txt").write_text(text)
        return {"source": "text", "path": str(folder)}
    if kind == "separated":
        (folder / "all.txt.gz").write_bytes(gzip.compress("\n<|endoftext|>\n".join(TEXTS).encode()))
        return {"source": "text", "path": str(folder / "*.gz")}
    if kind in ("jsonl", "jsonl.gz", "jsonl.xz"):
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[kind]
        (folder / f"rows.{kind}").write_bytes(pack(rows.encode()))
        return {"source": "jsonl", "path": str(folder), **column}
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(TEXTS))), "story": TEXTS, "note": ["x"] * len(TEXTS)})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=5)
    return {"source": "parquet", "path": str(folder / "rows.parquet"), **column}


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


def word_tokenizer(folder: Path, *, config: bool) -> Path:
    words = ["<unk>", "<s>", "</s>", *"abcdefgh"]
    bare = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(exist_ok=True)
    bare.save(str(folder / "tokenizer.json"))
    if config:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


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


# What is refused


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
    refused("a.txt is not UTF-8 text, at byte 3", source="text", path=str(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nno json\n')
    refused("a.jsonl: line 2 is no JSON", source="jsonl", path=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("[1]\n")
    refused("line 1 is no JSON object", source="jsonl", path=str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    refused("line 2 has int in the column 'text'", source="jsonl", path=str(tmp_path / "c.jsonl"))
    (tmp_path / "a.parquet").write_bytes(b"PAR?")
    refused("a.parquet: it is no Parquet file", source="parquet", path=str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt.gz").write_bytes(b"no gzip")
    refused("a.txt.gz cannot be read", source="text", path=str(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_columns_there_are_are_named(kind, tmp_path):
    config = {**write_texts(tmp_path, kind), "text_column": "words"}
    message = (
        r"no text column 'words'; its text columns are story, note \(data.text_column; all columns are id,"
    )
    refused(message, **config)
    refused(
        "which column .* is not clear: its text columns are story, note", **{**config, "text_column": None}
    )


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
    refused("data.tokenizer=/no/where: there is no such file or directory", tokenizer="/no/where")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("is not a tokenizer of the library tokenizers", tokenizer=str(tmp_path / "tokenizer.json"))
    message = (
        "data.tokenizer=nobody/nothing cannot be opened: .* check the hub id and the connection; without a"
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
