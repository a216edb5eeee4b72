"""An error of the user's model or function is called what it is, not a defect of osp-diag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import osp_diag
from osp_diag.cli.main import main
from osp_diag.errors import CaptureError
from osp_diag.foreign_errors import foreign_origin
from tests.hand_written import BLOCK

MODEL = (
    BLOCK
    + '''
class Model(nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, 8), nn.Embedding(positions, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 256)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Letters:
    """A tokenizer of bytes."""
    fails = False

    def __call__(self, text, **options):
        if self.fails:
            raise ZeroDivisionError("no letters")
        return {"input_ids": list(text.encode())}

    encode = lambda self, text, **options: self(text)["input_ids"]
    decode = lambda self, ids, **options: bytes(ids).decode(errors="replace")
    get_vocab = lambda self: {chr(number): number for number in range(256)}
    vocab_size, bos_token_id = 256, None
    __len__ = lambda self: 256


def load():
    return Model(48), Letters()


def load_failing():
    letters = Letters()
    letters.fails = True
    return Model(48), letters
'''
)


@pytest.fixture
def loader(tmp_path: Path) -> Path:
    path = tmp_path / "hand_made.py"
    path.write_text(MODEL)
    return path


def test_sequences_are_as_long_as_learned_positions(loader: Path, capsys) -> None:
    words = ["probe", f"{loader}:load", "--tokens", "96", "--single-protocol", "--sites", "residual_post"]
    assert main(words) == 0
    assert "in sequences of 48" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--seq-len", "96"]) == 2
    assert "longer than the 48 that the model was made for; pass --seq-len 48" in capsys.readouterr().err


def test_more_tokens_than_a_model_takes_name_the_option(loader: Path, capsys) -> None:
    loader.write_text(MODEL.replace("wpe", "places"))  # a name that says nothing of positions
    text = loader.with_name("text.txt")
    text.write_text("Ten boats left the harbour before dawn. " * 40)
    words = ["probe", f"{loader}:load", "--text", str(text), "--tokens", "512", "--single-protocol"]
    assert main(words) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "load itself raised IndexError: index out of range in self" in shown
    assert re.search(r"hand_made\.py:\d+, in forward\)", shown)
    assert "on sequences of 512 tokens" in shown
    assert "If it takes fewer tokens at a time, pass a smaller seq_len (--seq-len)" in shown
    assert "defect" not in shown
    assert main([*words, "--seq-len", "48", "--sites", "residual_post"]) == 0


def test_an_error_of_a_function_of_the_users_is_said_to_be_theirs(loader: Path, capsys) -> None:
    text = loader.with_name("text.txt")
    text.write_text("Ten boats left the harbour before dawn. " * 40)
    assert main(["probe", f"{loader}:load_failing", "--text", str(text), "--tokens", "512"]) == 2
    shown = capsys.readouterr().err
    assert "no letters" in shown
    assert "defect" not in shown


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            ", **options: bytes",
            "asked for decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=",
        ),
        (", **options):", "asked for a call with (text, add_special_tokens=…, verbose=False), and raised"),
    ],
)
def test_a_tokenizer_that_lacks_a_method_is_named(loader: Path, capsys, lost: str, message: str) -> None:
    assert lost in MODEL
    loader.write_text(MODEL.replace(lost, lost.replace(", **options", "")))
    text = loader.with_name("text.txt")
    text.write_text("Ten boats left the harbour before dawn. " * 40)
    assert main(["probe", f"{loader}:load", "--text", str(text), "--tokens", "96", "--seq-len", "48"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"the tokenizer (Letters) cannot be used: it was {message}" in shown
    assert "or pass no tokenizer, and token ids instead of text" in shown
    assert "defect" not in shown


def test_a_model_in_hand_that_fails_is_named(loader: Path) -> None:
    namespace: dict = {}
    exec(compile(MODEL.replace("wpe", "places"), str(loader), "exec"), namespace)
    with pytest.raises(CaptureError, match=r"itself raised IndexError.*\(--seq-len\)"):
        osp_diag.probe(namespace["Model"](48), tokenizer=namespace["Letters"](), tokens=256)


def test_an_error_of_ours_below_the_users_model_stays_ours() -> None:
    from osp_diag.estimators import get_estimator

    linear = torch.nn.Linear(2, 2)
    linear.register_forward_pre_hook(lambda module, args: get_estimator("sink_rate", epsilons=3))
    with pytest.raises(TypeError, match="not iterable") as caught:
        linear(torch.ones(1, 2))
    assert foreign_origin(caught.value) == ""
