"""Models and tokenizers that people have: rows of docs/files.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import osp_diag
from osp_diag.checkpoints import open_checkpoint
from osp_diag.cli.main import main
from osp_diag.errors import TokenError, UsageError
from osp_diag.text.tokenizer import decode_each, delimiter_ids_of, encode, opening_tokens
from osp_diag.text.tokenizer_files import SAMPLE, SentencePieceTokenizer, open_tokenizer
from osp_diag.tokens import make_batches
from tests.file_situations import situation
from tests.hand_written import BLOCK
from tests.tiny_checkpoints import VOCABULARY, byte_tokenizer, llama, save, transformers

TEXT = "The tide had turned by noon.\nNobody on the quay had seen the pilot, and 9 crates were gone.\n" * 30

MODEL = (
    BLOCK
    + '''
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.patch = nn.Embedding(300, 8), nn.Embedding(48, 8), nn.Linear(12, 8)
        self.blocks, self.head = nn.ModuleList(Block(8) for _ in range(2)), nn.Linear(8, 300)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x), None


class Tower(Model):
    def forward(self, patches, scale):
        x = self.patch(patches) * scale
        for block in self.blocks:
            x = block(x)
        return x


class Bytes:
    """As tiktoken: no call, no vocabulary, no special tokens, ids without a token."""
    n_vocab = 300

    def encode(self, text, allowed_special=()):
        raise ValueError("disallowed special token")

    def encode_ordinary(self, text):
        return list(text.encode())

    def decode(self, ids):
        if max(ids) > 255:
            raise KeyError(ids)
        return bytes(ids).decode(errors="replace")


def load():
    torch.manual_seed(0)
    return Model()


def tower():
    return Tower()


def batch():
    return [(torch.ones(2, 9, 12), 2.0), {"patches": torch.zeros(3, 9, 12), "scale": 1.0}]


letters = Bytes
'''
)


@pytest.fixture
def by_hand(tmp_path) -> str:
    path = tmp_path / "by_hand.py"
    path.write_text(MODEL)
    return str(path)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A checkpoint without a tokenizer."""
    return save(llama(), tmp_path_factory.mktemp("bare") / "bare")


def shown(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@situation("a tokenizer with more tokens than the embedding has rows")
def test_a_longer_tokenizer_is_a_note(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"pad_token": "[PAD]", "additional_special_tokens": [f"<x{i}>" for i in range(9)]}
    )
    opened = open_checkpoint(save(llama(), tmp_path / "a", tokenizer))
    assert opened.notes[0].startswith(f"the tokenizer has 267 tokens and the embedding {VOCABULARY} rows")
    limits = {"vocabulary_size": opened.vocabulary_size, "tokens": 16, "seq_len": 16}
    assert make_batches(tokenizer, text=TEXT, **limits).tokens.shape == (1, 16)
    with pytest.raises(
        TokenError, match=r"token id 266 .* or has tokens added that the embedding has no rows"
    ):
        make_batches(tokenizer, text="<x8>" * 20, **limits)


@situation("a tokenizer of SentencePiece alone")
def test_sentencepiece_reads_as_the_model_itself_does(tmp_path):
    import sentencepiece

    folder = save(llama(), tmp_path / "a")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SAMPLE, *TEXT.splitlines()]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        model_type="bpe",
    )
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    # Without a tokenizer_config.json, transformers' conversion leaves out the blank before a text.
    opened = open_checkpoint(folder).tokenizer
    assert isinstance(opened, SentencePieceTokenizer)
    assert encode(opened, TEXT, special=True) == own.encode(TEXT)
    assert opened.decode(own.encode("had seen")).strip() == "had seen"
    assert (len(opened), opened.eos_token_id) == (own.get_piece_size(), own.eos_id())
    assert delimiter_ids_of(opened)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    opened = open_checkpoint(folder).tokenizer
    assert type(opened).__name__ == "LlamaTokenizer"
    assert encode(opened, "had turned by noon", special=False) == own.encode("had turned by noon")
    assert encode(open_tokenizer(folder / "tokenizer.model"), "the quay", special=False) == own.encode(
        "the quay"
    )


def test_what_is_no_sentencepiece_model_is_said_to_be_what_it_is(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    path.write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(TokenError, match="a vocabulary of tiktoken, which does not say how text is split"):
        open_tokenizer(path)
    path.write_bytes(b"nothing")
    with pytest.raises(TokenError, match=r"tokenizer\.model is no SentencePiece model"):
        open_tokenizer(path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenError, match="needs the package sentencepiece: pip install sentencepiece"):
        open_tokenizer(tmp_path / "tokenizer.model")


@situation("a checkpoint without a tokenizer", "token ids in a `.npy`")
def test_checkpoints_without_a_tokenizer_are_measured(bare, tmp_path, capsys):
    small = ["--tokens", "64", "--seq-len", "16"]
    probe = ["probe", str(bare), *small, "--single-protocol", "--sites", "residual_post"]
    assert main(probe) == 2
    assert "pass a tokenizer (--tokenizer), token ids (--ids FILE.npy), or --random-tokens" in shown(capsys)
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)
    np.save(tmp_path / "ids.npy", np.arange(200) % VOCABULARY)
    np.save(tmp_path / "rows.npy", np.arange(64).reshape(8, 8).astype(np.int32))
    for words, source in (
        (["--tokenizer", str(folder)], "built-in English text"),
        (["--ids", str(tmp_path / "ids.npy")], "token ids of ids.npy"),
        (["--random-tokens"], f"random token ids, each of {VOCABULARY} equally likely"),
    ):
        assert main([*probe, *words, "--out", str(tmp_path / "run.zarr"), "--overwrite"]) == 0
        assert f"({source})" in shown(capsys)
        assert main(["quantize", str(bare), *small, *words, "--widths", "W16A16"]) == 0
        assert f"({source}, sequences of 16)" in shown(capsys)
    rows = make_batches(ids=tmp_path / "rows.npy")
    assert rows.tokens.tolist() == np.arange(64).reshape(8, 8).tolist()
    cut = make_batches(ids=str(tmp_path / "ids.npy"), seq_len=50)
    assert cut.tokens.shape == (4, 50)
    assert main(["quantize", str(bare), "--protocol", "osp-published"]) == 2
    assert "perplexity is of real sequences" in shown(capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", None, "a .npz holds several; save the one that is meant"),
        ("a.npy", np.ones(3), r"not float64 of shape \(3,\)"),
        ("b.npy", None, "there is no file of token ids"),
    ],
)
def test_ids_that_are_none_are_refused(name, content, message, tmp_path):
    if name.endswith(".npz"):
        np.savez(tmp_path / name, ids=np.arange(9))
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(TokenError, match=message):
        make_batches(ids=tmp_path / name)


def test_random_tokens_are_even_and_the_same_everywhere():
    made = make_batches(random_tokens=True, vocabulary_size=10, tokens=10_000, seq_len=100)
    assert (
        made.tokens[0, :5].tolist()
        == make_batches(random_tokens=True, vocabulary_size=10).tokens[0, :5].tolist()
    )
    counts = np.bincount(made.tokens.ravel(), minlength=10)
    assert (abs(counts - 1000) < 5 * 30).all(), "30 is the standard deviation of each"
    with pytest.raises(TokenError, match="random tokens need a model with an embedding"):
        make_batches(random_tokens=True)
    with pytest.raises(UsageError, match="split and text_column are of a dataset"):
        make_batches(byte_tokenizer(), text_column="body")


@situation(
    "a tokenizer of tiktoken, or of your own",
    "a hand-written model (nanoGPT)",
    "a model that takes other arguments than ids",
)
def test_hand_written_models_are_probed_from_the_command_line(by_hand, tmp_path, capsys):
    probe = ["probe", f"{by_hand}:load", "--tokens", "96", "--single-protocol"]
    assert main([*probe, "--random-tokens"]) == 0
    assert "96 tokens in sequences of 48" in shown(capsys), "as many as it has positions"
    assert main([*probe, "--tokenizer", f"{by_hand}:letters"]) == 0
    assert "delimiters" in shown(capsys)
    assert main([*probe, "--tokenizer", f"{by_hand}:load"]) == 2
    assert "as a tokenizer it must return an object with encode(text) and decode(ids)" in shown(capsys)
    assert main([*probe, "--random-tokens", "--attention", "eager"]) == 2
    assert "whose attention is its own; leave attention out" in shown(capsys)
    out, tower = tmp_path / "tower.zarr", f"{by_hand}:tower"
    assert main(["probe", tower, "--example", f"{by_hand}:batch", "--out", str(out)]) == 0
    run = osp_diag.open_run(out)
    counts = run.at("residual_post")["token_count"].sel(stratum="all").values.ravel()
    assert counts.tolist() == [45, 45], "two sequences of nine, and three"
    assert run.attrs["token_source"] == f"what {by_hand}:batch returns"
    words = ["probe", tower, "--random-inputs", "patches=4x7x12"]
    assert main([*words, "scale=1", "--list-sites"]) == 0
    assert "residual_post" in shown(capsys)
    assert main(words) == 2
    assert "missing a required argument: 'scale'; its forward is forward(patches, scale)" in shown(capsys)
    assert main(["probe", tower, "--random-inputs", "4x7"]) == 2
    assert "write NAME=SHAPE" in shown(capsys)
    assert main([*words, "--random-tokens"]) == 2
    assert "are run in place of tokens" in shown(capsys)


def test_every_shared_option_has_its_example(capsys):
    for verb in ("probe", "quantize"):
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        for option in ("tokenizer", "ids", "random-tokens", "text-column", "split", "attention"):
            assert f"--{option}" in text
        examples = text.partition("Examples:")[2].partition("usage:")[0]
        assert "--tokenizer" in examples
        assert "--ids" in examples


def test_a_tokenizer_with_encode_and_decode_is_enough(by_hand):
    namespace: dict = {}
    exec(compile(MODEL, by_hand, "exec"), namespace)
    letters = namespace["Bytes"]()
    assert encode(letters, "a<|endoftext|>", special=True) == list(b"a<|endoftext|>")
    assert opening_tokens(letters, "auto") == ()
    assert set(decode_each(letters, 310)[256:]) == {""}
    assert {chr(number) for number in delimiter_ids_of(letters)} == set(",.;:!?\n\r")


@situation("a model with a soft cap on attention (Gemma 2)")
def test_a_soft_cap_is_kept(tmp_path, capsys):
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        head_dim=8,
        max_position_embeddings=64,
        attn_logit_softcapping=0.5,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 30
    folder = save(model, tmp_path / "gemma", byte_tokenizer())
    words = ["probe", str(folder), "--tokens", "64", "--sites", "attention", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["largest_logit"] <= 0.5
    assert main([*words, "--attention", "sdpa"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest_logit"] > 0.5
    assert "caps attention logits at 0.5, and sdpa leaves the cap out" in found["notes"][0]
