"""Texts and token ids that people have, and what numbers need to be true: rows of docs/files.md."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import time
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from osp_diag.cli.main import main
from osp_diag.errors import TokenError, UsageError
from osp_diag.quantizing.cases import Case
from osp_diag.quantizing.linears import rounded_share
from osp_diag.quantizing.perplexity import perplexity
from osp_diag.quantizing.results import partial_rounding
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.sweep import sweep
from osp_diag.text.documents import column_of
from osp_diag.tokens import make_batches
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.data import open_data
from tests.file_situations import situation
from tests.gguf_files import experts
from tests.tiny_checkpoints import bert, byte_tokenizer, llama, save, transformers

TEXT = "The tide had turned by noon.\nNobody on the quay had seen the pilot, and 9 crates were gone.\n" * 30


# Texts


@situation("a data set without a column called `text`", "rows without a text")
def test_the_schema_says_which_column_is_the_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": 1, "body": None}, {"id": 2, "body": TEXT}, {"id": 3}, {"id": 4, "body": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = make_batches(byte_tokenizer(), dataset=str(path), tokens=10**6, seq_len=64)
    assert made.source == "dataset rows.jsonl, split train, column body"
    assert made.notes[0] == "rows.jsonl: 2 rows without a text left out."
    config = DataConfig(source="jsonl", path=str(path), sequence_length=16, bos="none")
    assert open_data(config, batch_size=1, vocabulary_size=4096).notes[-1] == made.notes[0]
    assert column_of({"id": False, "title": True, "text": True}, None, "it") == "text"
    with pytest.raises(
        TokenError, match="its text columns are prompt, completion; name one with text_column"
    ):
        column_of({"prompt": True, "completion": True, "id": False}, None, "it")
    assert column_of({"a": None, "b": True}, "a", "it") == "a", "nothing but nulls were seen so far"


@situation(
    "a text in UTF-8 with a byte order mark, in UTF-16, compressed, or with CRLF",
    "a file in UTF-16 without a byte order mark, or no text at all",
)
def test_a_text_is_the_same_however_it_is_stored(tmp_path):
    plain = (TEXT + "«crème»\n").encode()
    forms = {
        "plain.txt": plain,
        "bom.txt": codecs.BOM_UTF8 + plain,
        "crlf.txt": plain.replace(b"\n", b"\r\n"),
        "utf16.txt": plain.decode().encode("utf-16"),
        "be.txt": codecs.BOM_UTF16_BE + plain.decode().encode("utf-16-be"),
        "packed.txt.gz": gzip.compress(plain),
        "packed.txt.xz": lzma.compress(plain),
        "packed.txt.bz2": bz2.compress(codecs.BOM_UTF8 + plain),
    }
    identities = set()
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        for source in ({"text": tmp_path / name}, {"dataset": str(tmp_path / name)}):
            identities.add(make_batches(byte_tokenizer(), tokens=10**6, seq_len=32, **source).fingerprint)
        config = DataConfig(source="text", path=str(tmp_path / name), sequence_length=16, bos="none")
        identities.add(open_data(config, batch_size=1, vocabulary_size=4096).fingerprint)
    assert len(identities) == 2, "one for probing, one for training"
    (tmp_path / "none.txt").write_bytes("ab".encode("utf-16-le"))
    with pytest.raises(
        TokenError, match=r"none\.txt is no text: byte 1 is zero\. If it is UTF-16, convert it"
    ):
        make_batches(byte_tokenizer(), text=tmp_path / "none.txt")


@situation("Parquet with dictionary, large or viewed strings")
def test_parquet_of_every_kind_of_string(tmp_path):
    import pyarrow
    import pyarrow.parquet

    identities = set()
    for kind in ("string", "large_string", "string_view", "dictionary"):
        plain = pyarrow.array(["one two", None, TEXT])
        column = plain.dictionary_encode() if kind == "dictionary" else plain.cast(getattr(pyarrow, kind)())
        path = tmp_path / f"{kind}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": column}), path)
        made = make_batches(byte_tokenizer(), dataset=str(path), tokens=10**6, seq_len=32)
        identities.add(made.fingerprint)
        config = DataConfig(source="parquet", path=str(path), sequence_length=16, bos="none")
        identities.add(open_data(config, batch_size=1, vocabulary_size=4096).fingerprint)
    assert len(identities) == 2


@situation("JSON lines of which one is broken", "rows given as `--text`")
def test_broken_lines_are_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(TokenError, match=r"rows\.jsonl, line 3 is no JSON: Expecting value; give one object"):
        make_batches(byte_tokenizer(), dataset=str(path))
    with pytest.raises(TokenError, match=r"data\.path: .*rows\.jsonl, line 3 is no JSON"):
        open_data(DataConfig(source="jsonl", path=str(path)), batch_size=1, vocabulary_size=4096)
    with pytest.raises(TokenError, match=r"holds rows, not a text; give it as dataset \(--dataset "):
        make_batches(byte_tokenizer(), text=path)
    path.write_text('[{"text": "one"}, {"text": "two"}]')
    made = make_batches(byte_tokenizer(), dataset=str(path), seq_len=8)
    assert byte_tokenizer().decode(made.tokens.ravel()) == "one\n\ntwo"


def test_tables_are_read_by_their_text(tmp_path):
    (tmp_path / "a.csv").write_text('id,body\n1,"one, two"\n2,\n3,three\n')
    made = make_batches(byte_tokenizer(), dataset=str(tmp_path / "a.csv"), seq_len=15)
    assert byte_tokenizer().decode(made.tokens.ravel()) == "one, two\n\nthree"
    assert made.notes[0] == "a.csv: 1 row without a text left out."


@situation("4 MB of text without a blank")
def test_a_text_without_blanks_is_read_as_far_as_needed(tmp_path):
    path = tmp_path / "dna.txt"
    path.write_text("acgt" * 10**6)

    class Counting:
        characters = 0

        def encode(self, text):
            Counting.characters += len(text)
            return list(text.encode())

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

        def __len__(self):
            return 256

    began = time.perf_counter()
    for source in ({"text": path}, {"dataset": str(path)}):
        made = make_batches(Counting(), tokens=128, seq_len=64, **source)
        assert bytes(made.tokens.ravel().tolist()) == b"acgt" * 32
    assert Counting.characters < 5000
    assert time.perf_counter() - began < 5


# Files of ids


def ids_of(path: Path, vocabulary_size: int = 4096) -> list[int]:
    config = DataConfig(source="tokens", path=str(path), sequence_length=8, bos="none", shuffle=False)
    return open_data(config, batch_size=1, vocabulary_size=vocabulary_size)._stream.slice(0, 8).tolist()


@situation(
    "a `.bin` with llm.c's header (modded-nanogpt, Llama 3)",
    "a `.bin` of 32-bit ids without a header",
    "Megatron's `.bin` with its `.idx`",
    "a `.npz`",
)
def test_files_of_ids_say_their_type_or_are_refused(tmp_path):
    ids = np.random.default_rng(0).integers(1, 4000, 2000)
    first = ids[:8].tolist()
    header = np.zeros(256, "<i4")
    for name, magic, kind in (("gpt2.bin", 20240520, "<u2"), ("llama3.bin", 20240801, "<u4")):
        header[:3] = magic, 1, len(ids)
        (tmp_path / name).write_bytes(header.tobytes() + ids.astype(kind).tobytes())
        assert ids_of(tmp_path / name) == ids_of(tmp_path / name, 128256) == first
    header[2] += 1
    (tmp_path / "cut.bin").write_bytes(header.tobytes() + ids.astype("<u4").tobytes())
    with pytest.raises(TokenError, match=r"llm\.c's header promises 2,001 ids of uint32, and 2,000 follow"):
        ids_of(tmp_path / "cut.bin")
    ids.astype("<u2").tofile(tmp_path / "bare.bin")
    assert ids_of(tmp_path / "bare.bin") == first
    with pytest.raises(TokenError, match=r"uint16, which cannot hold 128,256 different ids"):
        ids_of(tmp_path / "bare.bin", 128256)
    ids.astype("<u4").tofile(tmp_path / "wide.bin")
    with pytest.raises(TokenError, match=r"these are ids of 32 bits; .* numpy\.save\('ids\.npy'"):
        ids_of(tmp_path / "wide.bin")
    ids.astype("<i4").tofile(tmp_path / "megatron.bin")
    index = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x04" + bytes(16)
    (tmp_path / "megatron.idx").write_bytes(index)
    assert ids_of(tmp_path / "megatron.bin") == first
    (tmp_path / "megatron.idx").write_bytes(index[:9] + bytes(50))
    with pytest.raises(TokenError, match=r"megatron\.idx lies beside it.* does not say the type of the ids"):
        ids_of(tmp_path / "megatron.bin")
    np.savez(tmp_path / "a.npz", ids=ids)
    with pytest.raises(TokenError, match=r"a \.npz holds several arrays; give the array as \.npy"):
        ids_of(tmp_path / "a.npz")


# Numbers and their conditions


@situation("a model trained on masked tokens, for `quantize`")
def test_perplexity_is_of_what_does_not_see_ahead():
    ids = np.arange(24).reshape(2, 12) + 3
    with pytest.raises(
        UsageError, match="BertForMaskedLM is none: a prediction depends on the tokens after it"
    ):
        perplexity(bert(), ids)
    with pytest.raises(UsageError, match="needs a causal language model, and BertForMaskedLM is none"):
        sweep(bert(), ids, [Case(Setting(8, 8))])
    assert perplexity(llama().bfloat16(), ids).tokens == perplexity(experts(), ids).tokens == 22
    same = np.full((1, 4), 5)
    assert perplexity(llama(), same).tokens == 3
    tiny = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    encoder_decoder = transformers.T5ForConditionalGeneration(transformers.T5Config(**tiny)).eval()
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is an encoder with a decoder"):
        perplexity(encoder_decoder, ids)


@situation("a mixture of experts, for `quantize`")
def test_a_part_that_was_rounded_is_said_to_be_a_part(tmp_path, capsys):
    model = experts()
    inside = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim > 1)
    linears = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert rounded_share(model) == pytest.approx(linears / inside, rel=1e-12)
    assert rounded_share(llama()) == 1
    folder = save(model, tmp_path / "moe")
    words = ["quantize", str(folder), "--random-tokens", "--tokens", "64", "--bits", "W4A4", "--json"]
    assert main(words) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["rounded_share"] == pytest.approx(linears / inside)
    note = f"only {linears / inside:.0%} of the blocks' matrices are in Linears and rounded"
    assert row["notes"][0].startswith(note)
    results = sweep(model, np.arange(24).reshape(2, 12) + 3, [Case(Setting(4, 4))])
    assert partial_rounding(results).startswith(note)
    assert partial_rounding(results.drop_vars("rounded_share")) == ""


@situation("a tokenizer that puts BOS before a text, under `osp-published`")
def test_the_published_stream_begins_as_the_script_does():
    tokenizer = byte_tokenizer(puts_bos=True)
    made = make_batches(tokenizer, text=TEXT, tokens=64, protocol="osp-published")
    assert made.tokens.ravel().tolist() == tokenizer(TEXT)["input_ids"][:64]
    assert made.bos == "once, before the text"
    without = make_batches(tokenizer, text=TEXT, tokens=64, protocol="osp-published", bos="no")
    assert without.tokens.ravel().tolist() == tokenizer(TEXT)["input_ids"][1:65]
    assert without.bos == "no"
