"""Token batches: protocols, BOS, delimiters, identity, and what is refused."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.errors import TokenError, UsageError
from osp_diag.text import builtin_text
from osp_diag.text.sources import DatasetText, PlainText
from osp_diag.tokens import DELIMITERS, delimiter_ids_of, make_batches

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = [
    "[UNK]",
    "[BOS]",
    "[PAD]",
    "one",
    "two",
    "three",
    ".",
    ",",
    "...",
    "?!",
    "(",
    "x",
    "\n",
    " .",
    "end.",
]
NUMBER = {word: number for number, word in enumerate(WORDS)}
OPENING = builtin_text()[:5000]
TEXT = "one two three , one two . " * 40


def word_tokenizer(*, bos: bool = True, opens: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token a word; ``opens`` makes it put BOS first by itself."""
    bare = Tokenizer(models.WordLevel(NUMBER, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if opens:
        bare.post_processor = processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", NUMBER["[BOS]"])]
        )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"} | ({"bos_token": "[BOS]"} if bos else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **names)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The alphabet of byte-level BPE, without merges: every byte a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare)


def refused(message: str, kind=TokenError, **options) -> None:
    tokenizer = options.pop("tokenizer", word_tokenizer())
    with pytest.raises(kind, match=message):
        make_batches(tokenizer, **options)


# What comes out


def test_a_text_is_cut_into_sequences(capfd):
    made = make_batches(word_tokenizer(bos=False), text=TEXT, tokens=64, seq_len=16)
    assert made.tokens.dtype == np.int64
    assert made.tokens.shape == made.attention_mask.shape == (4, 16)
    expected = [NUMBER[word] for word in TEXT.split()][:64]
    assert made.tokens.ravel().tolist() == expected
    assert made.attention_mask.all()
    assert (made.protocol, made.bos, made.bos_ids, made.sequence_length) == ("sequence", "no", (), 16)
    assert made.source == "text given as a string"
    assert made.notes == ()
    assert len(made) == 4
    assert made.text_of(NUMBER["two"]) == "two"
    assert capfd.readouterr() == ("", "")


def test_the_default_is_the_built_in_text():
    made = make_batches(byte_tokenizer())
    assert made.tokens.shape == (16, 512)
    assert made.source == "built-in English text"
    assert "".join(made.text_of(token) for token in made.tokens[0]) == builtin_text()[:512]


def test_the_model_bounds_the_default_length():
    assert make_batches(byte_tokenizer(), max_length=100, tokens=250).tokens.shape == (2, 100)
    assert make_batches(byte_tokenizer(), tokens=60).tokens.shape == (1, 60)


def test_osp_published_feeds_the_same_tokens_one_by_one():
    for opens in (False, True):
        tokenizer = word_tokenizer(opens=opens)
        sequences = make_batches(tokenizer, text=TEXT, tokens=64, seq_len=16, bos="no")
        single = make_batches(tokenizer, text=TEXT, tokens=64, seq_len=16, protocol="osp-published")
        assert single.tokens.shape == (64, 1)
        # The released script tokenises the whole text at once: what the tokenizer puts first is there once.
        stream = [*([1] if opens else []), *sequences.tokens.ravel().tolist()][:64]
        assert single.tokens.ravel().tolist() == stream
        assert single.bos == ("once, before the text" if opens else "no")
        assert (single.sequence_length, single.protocol) == (1, "osp-published")
        assert single.fingerprint != sequences.fingerprint


def test_bos_follows_the_tokenizer_unless_told_otherwise():
    one = NUMBER["one"]

    def opening(bos: str, **tokenizer) -> tuple[list[int], str]:
        made = make_batches(word_tokenizer(**tokenizer), text=TEXT, tokens=32, seq_len=8, bos=bos)
        assert made.tokens.shape == (4, 8)
        return made.tokens[:, 0].tolist(), made.bos

    assert opening("auto", opens=True) == ([1, 1, 1, 1], "yes")
    assert opening("yes", opens=True) == ([1, 1, 1, 1], "yes")
    assert opening("yes") == ([1, 1, 1, 1], "yes")
    for choice in ({"bos": "auto"}, {"bos": "no", "opens": True}):
        first, kind = make_and_open = opening(choice.pop("bos"), **choice)
        assert (first[0], kind) == (one, "no"), make_and_open


def test_every_sequence_with_bos_continues_the_text():
    made = make_batches(word_tokenizer(opens=True), text=TEXT, tokens=32, seq_len=8)
    assert made.tokens[:, 1:].ravel().tolist() == [NUMBER[word] for word in TEXT.split()][:28]


def test_berts_classification_token_opens_a_sequence(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "x", "one", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    made = make_batches(bert, text="one . " * 20, tokens=16, seq_len=8)
    assert made.bos_ids == (2,)
    assert made.tokens[:, 0].tolist() == [2, 2]
    assert 3 not in made.tokens
    assert made.delimiter_ids == (7,)


def test_token_ids_are_taken_as_they_are():
    ids = torch.arange(12).reshape(3, 4)
    made = make_batches(ids=ids)
    assert made.tokens.tolist() == ids.tolist()
    assert (made.bos, made.source, made.delimiter_ids) == ("as given", "token ids given as an array", ())
    assert made.text_of(7) == "7"
    assert make_batches(ids=ids, tokens=8).tokens.shape == (2, 4)
    assert make_batches(ids=range(10), seq_len=4).tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_batches(ids=list(range(10))).tokens.shape == (1, 10)


def test_padding_of_given_ids_is_kept_and_never_becomes_a_sequence():
    ids, mask = [[5, 6, 2], [7, 2, 2]], [[1, 1, 0], [1, 0, 0]]
    assert make_batches(ids=ids, attention_mask=mask).attention_mask.tolist() == mask
    single = make_batches(ids=ids, attention_mask=mask, protocol="osp-published")
    assert single.tokens.tolist() == [[5], [6], [7]]


def test_a_text_that_is_too_short_gives_what_it_has_and_says_so():
    made = make_batches(word_tokenizer(bos=False), text="one two three " * 10, seq_len=8)
    assert made.tokens.shape == (3, 8)
    assert made.notes == ("text given as a string gives 3 sequences of 8; 1024 were asked for.",)


def test_batches_cover_every_sequence_once():
    made = make_batches(ids=np.arange(35).reshape(7, 5))
    sizes = [len(batch["input_ids"]) for batch in made.batches(3)]
    assert sizes == [3, 3, 1]
    shards = [torch.cat([b["input_ids"] for b in made.batches(2, rank=r, ranks=3)]) for r in range(3)]
    assert sorted(torch.cat(shards)[:, 0].tolist()) == made.tokens[:, 0].tolist()
    assert all(batch["attention_mask"].dtype == torch.int64 for batch in made.batches(7))
    with pytest.raises(UsageError, match="batch_size=0: a batch needs 1 or more"):
        next(made.batches(0))


def test_the_fingerprint_is_of_ids_mask_and_protocol():
    ids = np.arange(12).reshape(3, 4)
    base = make_batches(ids=ids).fingerprint
    assert len(base) == 32
    assert make_batches(ids=ids.copy()).fingerprint == base
    mask = np.ones_like(ids)
    mask[0, 3] = 0
    others = [
        make_batches(ids=ids + 1),
        make_batches(ids=ids.reshape(4, 3)),
        make_batches(ids=ids, attention_mask=mask),
        make_batches(ids=ids, protocol="osp-published"),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 5


@given(length=st.integers(1, 40), rows=st.integers(1, 6), extra=st.integers(0, 30))
def test_no_token_is_lost_or_made_up(length, rows, extra):
    ids = np.arange(rows * length + min(extra, length - 1))
    made = make_batches(ids=ids, seq_len=length)
    assert made.tokens.ravel().tolist() == ids[: rows * length].tolist()


@given(st.integers(1, 3000))
def test_a_prefix_never_splits_a_word(characters):
    prefix, exhausted = PlainText(OPENING, "").prefix(characters)
    assert OPENING.startswith(prefix)
    assert exhausted or (len(prefix) >= characters and OPENING[len(prefix)].isspace())


def test_fewer_tokens_are_a_prefix_of_more():
    tokenizer = byte_tokenizer()
    few, many = (make_batches(tokenizer, tokens=n, seq_len=64).tokens for n in (640, 6400))
    assert few.tolist() == many[:10].tolist()


# Delimiters


def test_delimiters_are_marks_that_end_something():
    tokenizer = word_tokenizer()
    found = {tokenizer.convert_ids_to_tokens(number) for number in delimiter_ids_of(tokenizer)}
    assert found == {".", ",", "...", "?!", "\n", " ."}
    assert make_batches(tokenizer, text=TEXT, seq_len=8).delimiter_ids == delimiter_ids_of(tokenizer)


def test_delimiters_of_bytes():
    tokenizer = byte_tokenizer()
    found = {tokenizer.decode([number]) for number in delimiter_ids_of(tokenizer)}
    assert found == {c for c in DELIMITERS if c.isascii()}


# Sources


def test_a_file_and_its_text_give_the_same_tokens(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(TEXT, encoding="utf-8")
    options = {"tokens": 32, "seq_len": 8}
    from_path, from_name, from_text = (
        make_batches(word_tokenizer(), text=text, **options) for text in (path, str(path), TEXT)
    )
    assert from_path.fingerprint == from_name.fingerprint == from_text.fingerprint
    assert from_path.source == "file words.txt"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_local_data_set(tmp_path, capfd):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"text": "one two", "url": "x"}, {"text": "three .", "url": "x"}]
    )
    made = make_batches(word_tokenizer(), dataset=str(path), seq_len=4)
    assert made.tokens.tolist() == [[NUMBER[word] for word in ["one", "two", "three", "."]]]
    assert made.source == "dataset rows.jsonl, split train, column text"
    assert capfd.readouterr().err == ""


def test_a_saved_data_set_and_its_splits(tmp_path):
    import datasets

    def rows(word: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"body": [f"{word} {word}"] * 20, "id": list(range(20))})

    saved = datasets.DatasetDict({"train": rows("one"), "validation": rows("two")})
    saved.save_to_disk(tmp_path / "saved")
    held_out = make_batches(word_tokenizer(), dataset=str(tmp_path / "saved"), seq_len=8)
    assert set(held_out.tokens.ravel()) == {NUMBER["two"]}
    chosen = make_batches(word_tokenizer(), dataset=str(tmp_path / "saved"), seq_len=8, split="train")
    assert set(chosen.tokens.ravel()) == {NUMBER["one"]}
    refused("has no split 'test'; it has train, validation", dataset=str(tmp_path / "saved"), split="test")


def test_a_data_set_is_read_only_as_far_as_needed(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "one two " * 10}] * 500)
    source = DatasetText(str(path))
    text, exhausted = source.prefix(400)
    assert 400 <= len(text) < 600
    assert not exhausted
    assert source.prefix(10**6)[1]
    assert source.prefix(10**6)[0].startswith(text)


def test_data_sets_that_cannot_be_used(tmp_path, monkeypatch):
    unclear = write_rows(tmp_path / "unclear.jsonl", [{"question": "one", "answer": "two", "id": 1}])
    refused("its text columns are question, answer; name one with text_column", dataset=str(unclear))
    assert (
        make_batches(word_tokenizer(), dataset=str(unclear), text_column="answer", seq_len=1).tokens.size == 1
    )
    refused("has no text column 'id'; its text columns are", dataset=str(unclear), text_column="id")
    refused("the path does not exist", dataset=str(tmp_path / "absent.jsonl"))
    (tmp_path / "notes.pdf").write_text("one")
    refused("its type must be one of .*.jsonl", dataset=str(tmp_path / "notes.pdf"))
    (tmp_path / "empty.jsonl").write_text("")
    refused(r"data set .*empty.jsonl", dataset=str(tmp_path / "empty.jsonl"))

    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'org/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused(r"org/data cannot be read: ConnectionError: Couldn't reach.*local \.jsonl", dataset="org/data")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r'pip install "osp-diag\[datasets\]"', dataset="org/data")


# What is refused


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "words.txt").write_bytes(b"one \xff two")
    refused("words.txt is not UTF-8 text: byte 4 is 0xff", text=tmp_path / "words.txt")
    refused("there is no text file .*word.txt; did you mean words.txt", text=tmp_path / "word.txt")
    refused("there is no text file no/such.txt; check the path", text="no/such.txt")
    refused("is a directory; give one text file", text=tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    refused("file empty.txt is empty", text=tmp_path / "empty.txt")
    refused("text given as a string is empty", text="")


def test_too_few_tokens():
    refused(
        "has 3 tokens, fewer than one sequence of 512; give a longer text, or --seq-len 3",
        text="one two three",
    )
    refused(
        "has 3 tokens, fewer than one sequence of 8; give a longer text, or --seq-len 4",
        text="one two three", seq_len=8, bos="yes",
    )  # fmt: skip
    refused("tokens=100 is less than one sequence of seq_len=512", UsageError, tokens=100, seq_len=512)
    refused("leaves no room beside the opening tokens; pass 2 or more", UsageError, bos="yes", seq_len=1)
    refused("token ids are empty", ids=np.zeros((0, 4), dtype=int))
    refused("is empty: it has no tokens", ids=np.zeros(0, dtype=int))


def test_too_long_sequences():
    refused("sequences of 64 tokens are longer than the 32 .* pass --seq-len 32", seq_len=64, max_length=32)
    refused("longer than the 3 that the model was made for", ids=[[1, 2, 3, 4]], max_length=3)


def test_foreign_ids():
    refused(
        r"token id 9 at position 1 of sequence 1 is outside the model's vocabulary of 9 \(2 such tokens\)",
        ids=[[1, 2, 3], [4, 9, 11]], vocabulary_size=9,
    )  # fmt: skip
    refused("token id -1 at position 0 of sequence 0", tokenizer=None, ids=[[-1]], vocabulary_size=9)
    refused("the tokenizer is not this model's", text=TEXT, seq_len=8, vocabulary_size=5)
    refused(r"not float64 of shape \(2,\)", ids=[1.5, 2.5])
    refused(r"not int64 of shape \(1, 1, 1\)", ids=[[[1]]])


def test_masks_that_do_not_fit():
    refused(r"mask has shape \(1, 2\), the token ids \(1, 3\)", ids=[[1, 2, 3]], attention_mask=[[1, 1]])
    refused("marks every token as padding", ids=[[1, 2]], attention_mask=[[0, 0]])


def test_no_bos_and_no_tokenizer():
    refused("has no BOS token; pass bos='no' or 'auto'", tokenizer=word_tokenizer(bos=False), bos="yes")
    refused("the checkpoint has no tokenizer", tokenizer=None, text=TEXT)
    refused("needs the tokenizer's BOS token", tokenizer=None, ids=[1, 2], bos="yes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "osp"}, "protocol 'osp' is not one of sequence, osp-published"),
        ({"bos": "maybe"}, "bos 'maybe' is not one of auto, yes, no"),
        ({"protocol": "osp-published", "bos": "yes"}, "puts one before a text; leave bos at auto"),
        ({"tokens": 0}, "tokens=0: give 1 or more"),
        ({"tokens": -5}, "tokens=-5: give 1 or more"),
        ({"seq_len": 0}, "seq_len=0: give 1 or more"),
        ({"text": "one", "ids": [1]}, "four sources; give one of them"),
        ({"ids": [[1, 2]], "seq_len": 3}, "seq_len=3, but the token ids given have 2 positions"),
        ({"ids": [[1, 2]], "bos": "yes"}, "taken as they are; put BOS into them"),
    ],
)
def test_options_without_meaning(options, message):
    refused(message, UsageError, **options)


# The built-in text


def test_the_built_in_text_is_plain_english_of_a_known_identity():
    import hashlib

    text = builtin_text()
    assert len(text) == 1_041_000
    assert text.isascii()
    assert not any(mark in text for mark in ("Gutenberg", "http", "@", "_", "\r", "\t", "  "))
    assert text.startswith("Chapter 1\n\nSir Walter Elliot, of Kellynch Hall")
    # Every number measured on it depends on every character of it.
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f681074326f412ea"
