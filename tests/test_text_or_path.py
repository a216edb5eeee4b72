"""Whether a string is a text or names a file: by the library, and by ``--text``."""

from __future__ import annotations

from pathlib import Path

import pytest

import osp_diag
from osp_diag.cli.main import main
from osp_diag.errors import TokenError
from osp_diag.tokens import make_batches
from tests.tiny_checkpoints import byte_tokenizer, llama, save

PROSE = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("text", [PROSE, "b" * 400 + "/c", "x" * 5000, "~nobody said so.", "a\0b" * 9])
def test_what_can_name_no_file_is_a_text(tokenizer, text):
    made = make_batches(tokenizer, text=text, tokens=64, seq_len=4, bos="no")
    assert made.source == "text given as a string"
    read = "".join(made.text_of(int(token)) for token in made.tokens.ravel())
    assert text[:64].startswith(read)
    assert read


def test_a_path_that_is_too_long_is_refused_as_a_path(tokenizer):
    with pytest.raises(TokenError, match="cannot be read: File name too long"):
        make_batches(tokenizer, text=Path("x" * 400 + ".txt"))


def test_a_name_without_a_file_is_told_even_where_it_looks_like_a_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(TokenError, match=r"has 6 tokens, fewer .* or the path of a file: none is named so"):
        make_batches(tokenizer, text="corpus", seq_len=32, bos="no")
    with pytest.raises(TokenError, match="folder is a directory; give one text file"):
        make_batches(tokenizer, text="folder")


def test_the_command_takes_a_text_too(tokenizer, tmp_path, capsys):
    model, run = save(llama(), tmp_path / "tiny", tokenizer), tmp_path / "run.zarr"
    words = ["--text", PROSE, "--tokens", "128", "--seq-len", "16", "--single-protocol"]
    assert main(["probe", str(model), *words, "--out", str(run)]) == 0
    assert "128 tokens in sequences of 16 (text given as a string)" in capsys.readouterr().out
    assert osp_diag.open_run(run).attrs["token_source"] == "text given as a string"
