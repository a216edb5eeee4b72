"""Checkpoints, tokenizers and texts from a stranger: what they declare is held against what there is."""

import gzip
import json
import random
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_diag.checkpoints import open_checkpoint
from osp_diag.checkpoints.gguf import read_header
from osp_diag.checkpoints.weight_files import check_pickle, check_safetensors, read_json
from osp_diag.cli.main import main
from osp_diag.errors import CheckpointError, TokenError
from osp_diag.json_text import parse_json, parse_object
from osp_diag.terminal import filtered_streams, one_line, printable
from osp_diag.text.panics import no_panic
from osp_diag.text.tokenizer import delimiter_ids_of, encode
from osp_diag.trainer.data.sources import FileDocuments
from tests.hostile_files import damage_bytes, damage_json, gguf_file, refusal
from tests.tiny_checkpoints import byte_tokenizer, llama, save


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(llama(), tmp_path_factory.mktemp("whole") / "model", byte_tokenizer())


@pytest.fixture
def configured(whole, tmp_path):
    """A copy of the checkpoint whose configuration has these entries too."""

    def make(**entries):
        folder = tmp_path / "model"
        folder.mkdir()
        for file in whole.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((whole / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def refused(message, source, *, error=CheckpointError):
    with pytest.raises(error, match=message) as raised:
        open_checkpoint(source)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"vocab_size": 10**8},
        {"num_hidden_layers": 10**6},
        {"num_labels": 10**9},
        {"intermediate_size": 2**31},
        {"max_position_embeddings": 2**45},
        {"text_config": {"num_experts": 10**9}},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_a_size_that_the_weights_cannot_have_is_refused_before_anything_is_made(configured, entries):
    refused(
        r"config\.json declares [\w.]+=[\d,]+, and the weights beside it have [\d,]+ bytes",
        configured(**entries),
    )


def test_a_model_many_times_larger_than_its_weights_is_not_made(configured):
    folder = configured(vocab_size=10**7, hidden_size=10**5)
    refused(r"describes a model of [\d,]{13,} numbers, and its weights have [\d,]+ bytes", folder)


def test_sizes_that_fit_are_opened(configured):
    assert open_checkpoint(configured(max_position_embeddings=10_485_760)).vocabulary_size == 260


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a": ' + "9" * 5000 + "}", '{"a": "\udc80"}', "[]", "3"])
def test_a_configuration_that_is_no_object_is_one_sentence(configured, text):
    folder = configured()
    (folder / "config.json").write_text(text, errors="surrogateescape")
    refused(r"config\.json is not readable JSON", folder)


def test_shards_lie_beside_their_index(configured):
    folder = configured()
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for name in ("../secret.safetensors", 3, "a\x1b[2J"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused("no file beside it|what is no name", folder)


# JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
@settings(max_examples=60, deadline=None)
def test_json_is_read_as_it_was_written(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")):
        try:
            assert parse_json(text) == value
        except ValueError:
            assert any("\ud800" <= sign <= "\udfff" for sign in json.dumps(value, ensure_ascii=False))


def test_what_no_reader_takes_is_a_value_error():
    assert parse_json('{"a\\ud800": ["\\udfff"]}') == {"a?": ["?"]}
    for text in ("[" * 10**6, "9" * 5000, b"\xff", "", '"\x00'):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
    with pytest.raises(ValueError, match="it is a list and not an object"):
        parse_object("[]")


# Files of weights


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_header_of_safetensors_is_refused_or_true(whole, seed, tmp_path_factory):
    dice = random.Random(seed)
    data = (whole / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + length].decode(), dice).encode(errors="surrogatepass")
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    message = refusal(check_safetensors, path)
    assert not message or "damaged.safetensors" in message


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    return gguf_file(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_gguf_header_is_refused_or_read(gguf_bytes, seed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damage_bytes(gguf_bytes[:9000], random.Random(seed)) + gguf_bytes[9000:])
    message = refusal(read_header, path)
    assert "damaged.gguf" in message or read_header(path).size <= path.stat().st_size


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_configuration_is_refused_or_an_object(whole, seed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "config.json"
    damaged = damage_json((whole / "config.json").read_text(), random.Random(seed))
    path.write_text(damaged, errors="surrogatepass")
    message = refusal(read_json, path)
    assert not message or "config.json" in message


# Tokenizers


class PanicException(BaseException):
    """As pyo3 makes it in each library of Rust, below no :class:`Exception`."""


def test_a_panic_of_a_tokenizer_is_an_error_that_names_it(whole, monkeypatch):
    def panics(*arguments, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panics)
    refused(r"the tokenizer of .*model cannot be opened: RuntimeError: its library gave up: index out", whole)
    with pytest.raises(KeyboardInterrupt), no_panic():
        raise KeyboardInterrupt


def test_a_panic_anywhere_is_no_traceback(monkeypatch, capsys, tmp_path):
    def panics(*arguments, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("osp_diag.runs.run.open_whole_part", panics)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "a.html")]) == 2
    assert capsys.readouterr().err.startswith("osp-diag: unexpected PanicException: index out of bounds")


# Texts


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = tmp_path / "bomb.jsonl.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(24):
            file.write(b"a" * 2**22)
    assert bomb.stat().st_size < 2**20
    with pytest.raises(TokenError, match=r"data\.path: .*bomb\.jsonl\.gz unpacks to more than [\d,]+ bytes"):
        list(FileDocuments([bomb], "jsonl", None, "data.path"))


def test_packed_text_is_read_as_it_is(tmp_path):
    texts = [f"text {number} " * 50 for number in range(200)]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for file in (plain, packed):
        assert [document.text for document in FileDocuments([file], "jsonl", None, "data.path")] == texts


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), packed=st.booleans())
def test_damaged_lines_are_named(tmp_path_factory, seed, packed):
    lines = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(30)).encode()
    dice = random.Random(seed)
    data = damage_bytes(gzip.compress(lines) if packed else lines, dice)
    path = tmp_path_factory.getbasetemp() / ("lines.jsonl.gz" if packed else "lines.jsonl")
    path.write_bytes(data)
    message = refusal(lambda: list(FileDocuments([path], "jsonl", None, "data.path")))
    assert not message or path.name in message


# Terminals


@given(st.text(alphabet=st.characters(codec=None)))
@settings(max_examples=100)
def test_nothing_that_a_terminal_acts_on_is_left(text):
    shown = printable(text)
    assert len(shown) == len(text)
    assert not set(shown) & {chr(number) for number in (*range(9), *range(11, 32), *range(127, 160))}
    shown.encode()
    assert one_line(text).isprintable()
    assert printable(shown) == shown
    assert all(a == b or b == "\ufffd" for a, b in zip(text, shown, strict=True))


def test_a_tokenizer_that_fails_in_use_is_named():
    class Broken:
        all_special_ids = ()

        def __call__(self, *arguments, **options):
            raise PanicException("no such token")

        def get_vocab(self):
            return {"a": "b"}[1]

    with pytest.raises(
        TokenError, match=r"the tokenizer \(Broken\) fails when it is used: RuntimeError: its library"
    ):
        encode(Broken(), "text", special=False)
    with pytest.raises(
        TokenError, match=r"the tokenizer \(Broken\) fails when it is used: KeyError: 1\. Its files"
    ):
        delimiter_ids_of(Broken())


def test_a_pickle_that_would_unpack_to_more_than_it_has_is_refused(tmp_path):
    bomb = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**24))
    with pytest.raises(
        CheckpointError, match=r"no file that torch wrote: it would unpack to 16,777,216 bytes"
    ):
        check_pickle(bomb)


def test_progress_bars_still_move(capsys):
    with filtered_streams():
        for text in ("\r 50%", "\x1b[A", "\n\x1b[A\x1b[A", "a\x1b[31mb\n"):
            sys.stderr.write(text)
    assert capsys.readouterr().err == "\r 50%\x1b[A\n\x1b[A\x1b[Aa\ufffd[31mb\n"
