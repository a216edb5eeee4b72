"""Streamed training data: what is read, resumption, ranks, mixtures, and what is refused. No network."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_diag.errors import TokenError, UsageError
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data import OSP_TOKENIZER, Prefetched, open_data, osp_mixture
from osp_diag.trainer.loop import train
from tests.training_runs import minute

WORDS = ("the", "of", "and", "to", "in", "a", "that", "is", "was", "he", "for", "it", "with", "as", "his")


@pytest.fixture(autouse=True, scope="module")
def hurried():
    """Data sets in Parquet end without the seconds that ``datasets`` leaves their threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


def text(folder: str, number: int) -> str:
    return f"{folder} {number}: " + " ".join(WORDS[(number * 7 + k) % 15] for k in range(3 + number * 5 % 11))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Local data sets of several files: 61 documents in JSONL, 40 in Parquet."""
    import pyarrow
    import pyarrow.parquet

    places = {name: tmp_path_factory.mktemp(name) for name in ("lines", "tables")}
    for part in range(3):
        rows = [{"text": text("lines", n), "id": n} for n in range(part, 61, 3)]
        (places["lines"] / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in range(2):
        table = pyarrow.table({"text": [text("tables", n) for n in range(part, 40, 2)]})
        pyarrow.parquet.write_table(table, places["tables"] / f"{part}.parquet", row_group_size=6)
    return places


def open_stream(place, batch_size=4, rank=0, ranks=1, vocabulary_size=4096, **changes):
    source = {"source": "mixture", "mixture": place} if isinstance(place, dict) else {}
    source = source or {"source": "huggingface", "dataset": str(place)}
    values = {"sequence_length": 16, "shuffle_buffer": 7, "validation_fraction": 0.1, **source, **changes}
    return open_data(
        DataConfig(**values), batch_size=batch_size, vocabulary_size=vocabulary_size, rank=rank, ranks=ranks
    )


def texts_of(data, batches: int) -> list[str]:
    """The documents that the sequences of so many batches are made of, the last perhaps in part."""
    ids = torch.cat([data.next_batch().input_ids.flatten() for _ in range(batches)]).tolist()
    return data.tokenizer.decode(ids).split("<|endoftext|>")[1:]


FORMS = st.fixed_dictionaries(
    {
        "packing": st.sampled_from(["stream", "documents"]),
        "bos": st.sampled_from(["document", "sequence", "none"]),
        "shuffle": st.booleans(),
        "separate_documents": st.booleans(),
        "sequence_length": st.sampled_from([5, 16, 100]),
        "shuffle_buffer": st.sampled_from([1, 7, 61, 1000]),
    }
)


@pytest.mark.slow
@settings(max_examples=10)
@given(form=FORMS, batches=st.integers(0, 20), ranks=st.sampled_from([1, 2, 4]), place=st.integers(0, 2))
def test_resumed_streams_go_on_with_the_very_next_token(folders, form, batches, ranks, place):
    lines, tables = str(folders["lines"]), str(folders["tables"])
    source = [lines, tables, {lines: 1.0, tables: 3.0}][place]
    uninterrupted = open_stream(source, **form)
    for _ in range(batches):
        uninterrupted.next_batch()
    state = json.dumps(uninterrupted.state_dict())
    assert len(state) < 20_000
    team = [open_stream(source, rank=rank, ranks=ranks, **form) for rank in range(ranks)]
    for member in team:
        member.load_state_dict(json.loads(state))
    for _ in range(6):
        whole = uninterrupted.next_batch()
        for rank, member in enumerate(team):
            part = member.next_batch()
            assert torch.equal(part.input_ids, whole.input_ids[rank::ranks])
            assert torch.equal(part.labels, whole.labels[rank::ranks])
            if form["separate_documents"]:
                assert torch.equal(part.document_ids, whole.document_ids[rank::ranks])
    # A resumed one can be resumed again.
    state = json.dumps(team[-1].state_dict())
    team[0].load_state_dict(json.loads(state))
    assert torch.equal(team[0].next_batch().input_ids, uninterrupted.next_batch().input_ids[::ranks])


def test_every_document_is_read_once_an_epoch_and_those_held_out_never(folders):
    data = open_stream(folders["lines"])
    held = set(data.tokenizer.decode(data.held_out(64).ravel()).split("<|endoftext|>"))
    found = texts_of(data, 40)
    everything = {text("lines", n) for n in range(61)}
    kept = set(found[:-1])
    assert kept < everything
    assert len(everything - kept) in range(1, 15)
    first, second = found[: len(kept)], found[len(kept) : 2 * len(kept)]
    assert set(first) == set(second) == kept
    assert first != second, "every epoch has its own order"
    assert not kept & held
    assert (everything - kept) & held


def test_without_shuffling_the_order_is_the_files(folders):
    found = texts_of(open_stream(folders["lines"], shuffle=False), 8)
    numbers = [int(one.split()[1].rstrip(":")) for one in found[:20]]
    expected = [number for part in range(3) for number in range(part, 61, 3)]
    assert numbers == [number for number in expected if number in numbers][:20]
    data = open_stream(folders["lines"], shuffle=False)
    found = texts_of(data, 40)
    kept = len(set(found[:-1]))
    assert found[:kept] == found[kept : 2 * kept], "every epoch has the same order"
    assert len(found) > 2 * kept


def test_labels_are_the_next_tokens_of_the_stream(folders):
    data = open_stream(folders["lines"])
    batches = [data.next_batch() for _ in range(3)]
    inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    assert torch.equal(labels[:-1], inputs[1:])
    assert inputs[0] == 0


def test_every_sequence_of_documents_begins_with_one(folders):
    data = open_stream(folders["lines"], packing="documents")
    for _ in range(10):
        batch = data.next_batch()
        assert (batch.input_ids[:, 0] == 0).all()
        assert (batch.labels != -100).all()
    seen = Counter(
        piece.split(":")[0]
        for row in batch.input_ids
        for piece in data.tokenizer.decode(row).split("<|endoftext|>")[1:]
    )
    assert set(seen.values()) == {1}


def test_a_mixture_gives_every_part_its_share_of_the_tokens(folders):
    lines, tables = str(folders["lines"]), str(folders["tables"])
    data = open_stream({lines: 1.0, tables: 3.0}, sequence_length=64)
    found = texts_of(data, 25)
    tokens = Counter()
    for one in found:
        tokens[one.split()[0]] += 1 + len(data.tokenizer(one, add_special_tokens=False)["input_ids"])
    assert tokens["tables"] / tokens.total() == pytest.approx(0.75, abs=0.01)
    assert str(folders["lines"].parent) not in data.description


def test_prefetched_streams_resume_at_the_last_batch_handed_out(folders):
    plain, ahead = open_stream(folders["lines"]), Prefetched(open_stream(folders["lines"]), depth=4)
    for _ in range(7):
        assert torch.equal(ahead.next_batch().input_ids, plain.next_batch().input_ids)
    state = json.loads(json.dumps(ahead.state_dict()))
    ahead.close()
    resumed = open_stream(folders["lines"])
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next_batch().input_ids, plain.next_batch().input_ids)


def test_rows_without_a_text_are_counted_across_resumptions(folders, tmp_path):
    place = tmp_path / "gaps.jsonl"
    rows = [{"text": None if n % 3 == 0 else text("gaps", n)} for n in range(30)]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def opened():
        return open_stream(place, batch_size=1, shuffle=False)

    data, resumed = opened(), opened()
    assert data.notes == ()
    data.next_batch()
    assert data.notes == ("gaps.jsonl: 3 of 7 rows read without a text left out.",)
    for _ in range(3):
        state = json.loads(json.dumps(data.state_dict()))
        resumed.load_state_dict(state)
        assert resumed.notes == data.notes, "a block that is read again counts once"
        while data.notes == resumed.notes:
            data.next_batch()
    while "of 60 rows" not in data.notes[0]:
        data.next_batch()
    assert data.notes == ("gaps.jsonl: 20 of 60 rows read without a text left out.",), "in two epochs"
    # A state of before rows were counted.
    (member,) = state["position"]["documents"]["members"]
    assert (member.pop("rows_before"), member.pop("rows_without_text_before")) == (7, 3)
    older = opened()
    older.load_state_dict(state)
    assert older.notes == ("gaps.jsonl: 4 of 14 rows read without a text left out.",)
    assert torch.equal(older.next_batch().input_ids, resumed.next_batch().input_ids)
    held_out = open_stream(folders["lines"], validation_path=str(place))
    held_out.held_out(64)
    assert held_out.notes == ("gaps.jsonl: 5 of 14 rows read without a text left out.",)


def test_a_run_that_leaves_a_stream_says_how_many_rows_had_no_text(folders, tmp_path):
    place = tmp_path / "gaps.jsonl"
    rows = [{"text": None if n % 3 == 0 else text("gaps", n)} for n in range(30)]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "huggingface", "dataset": str(place), "validation_path": str(folders["lines"])}
    config = minute(steps=1, batch_size=1, probe__tokens=32, probe__sites=("embedding",))
    config = replace(config, data=DataConfig(sequence_length=16, shuffle=False, shuffle_buffer=15, **data))
    said: list[str] = []
    run = train(config, tmp_path / "run.zarr", announce=said.append)
    note = "gaps.jsonl: 5 of 15 rows read without a text left out."
    assert note in run.notes
    assert said[-1] == f"note: {note}"


def test_validation_of_streams(folders):
    data = open_stream(folders["lines"], batch_size=2, validation_path=str(folders["tables"]), shuffle=False)
    batches = list(data.validation_batches(5))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert data.tokenizer.decode(batches[0].input_ids[0]).startswith("<|endoftext|>tables 0:")
    assert len(texts_of(data, 200)) > 61, "nothing of the data is held out"


def test_a_data_set_saved_to_disk(folders, tmp_path):
    rows = [text("saved", n) for n in range(30)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "saved"))
    data, again = open_stream(tmp_path / "saved"), open_stream(tmp_path / "saved")
    for _ in range(5):
        data.next_batch()
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert torch.equal(data.next_batch().input_ids, again.next_batch().input_ids)


def test_the_fingerprint_is_of_source_and_tokenizer(folders):
    one = open_stream(folders["lines"]).fingerprint
    assert open_stream(folders["lines"], seed=3, sequence_length=8).fingerprint == one
    assert open_stream(folders["tables"]).fingerprint != one
    assert open_stream(folders["lines"], validation_fraction=0.3).fingerprint != one


def test_the_mixture_of_the_paper():
    corpus = "HuggingFaceTB/smollm-corpus"
    assert osp_mixture() == {f"{corpus}:fineweb-edu-dedup": 220, f"{corpus}:cosmopedia-v2": 28}
    assert osp_mixture("me/python")["me/python"] == 4
    config = DataConfig(source="mixture", mixture=osp_mixture(), tokenizer=OSP_TOKENIZER)
    with pytest.raises(TokenError, match=r"data.tokenizer=dmis-lab/OSP.*Check the hub id and the connection"):
        open_data(config, batch_size=1, vocabulary_size=49_152)


# What is refused


def test_data_sets_that_cannot_be_read_are_refused(folders, tmp_path, monkeypatch):
    with pytest.raises(
        TokenError, match=r"data.dataset=nobody/nothing: the data set nobody/nothing cannot be read"
    ):
        open_stream("nobody/nothing")
    with pytest.raises(TokenError, match=r"data.mixture=\./nowhere: there is no data set at \./nowhere"):
        open_stream({str(folders["lines"]): 1.0, "./nowhere": 1.0})
    with pytest.raises(TokenError, match="has no split 'test'; it has train"):
        open_stream(folders["lines"], split="test")
    with pytest.raises(
        TokenError, match=r"no text column 'words'.*data.text_column\); all its columns are text, id"
    ):
        open_stream(folders["lines"], text_column="words")
    with pytest.raises(TokenError, match=r"the tokenizer has 4,096 entries and model.vocabulary_size=100"):
        open_stream(folders["lines"], vocabulary_size=100)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match=r"data.mixture: the weight .* is not a finite number above 0"):
            open_stream({str(folders["lines"]): weight})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TokenError, match=r'needs the package datasets: pip install "osp-diag\[datasets\]"'):
        open_stream(folders["lines"])


def test_data_sets_without_text_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n' * 5)
    data = open_stream(tmp_path / "empty.jsonl", shuffle_buffer=2)
    with pytest.raises(TokenError, match="has no text in its column 'text'"):
        data.next_batch()
    with pytest.raises(TokenError, match=r"the held-out text has 0 tokens, and probe.tokens=64 needs 65"):
        data.held_out(64)
