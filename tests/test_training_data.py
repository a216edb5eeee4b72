"""Training data in arrays: laws of packing, ranks, resumption, what is held out."""

from __future__ import annotations

import json
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_diag.errors import TokenError, TrainingError
from osp_diag.text import builtin_text
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data import Batch, Prefetched, open_data
from tests.training_documents import VOCABULARY, numbered, open_documents, rows_of

LENGTHS = st.lists(st.integers(0, 13), min_size=1, max_size=12)


def same(one: Batch, other: Batch) -> bool:
    if (one.document_ids is None) != (other.document_ids is None):
        return False
    pairs = [(one.input_ids, other.input_ids), (one.labels, other.labels)]
    if one.document_ids is not None and other.document_ids is not None:
        pairs.append((one.document_ids, other.document_ids))
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


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
            notes = open_data(config, batch_size=1, vocabulary_size=VOCABULARY).notes
        except TokenError:
            return
    assert held
    assert read
    assert not held & read
    if any("the end of the text is held out" in note for note in notes):
        return
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
