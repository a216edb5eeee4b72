"""Checkpoints that are refused: what is wrong, where, and what to do."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from osp_diag.checkpoints import open_checkpoint
from osp_diag.checkpoints.weights import nonfinite_weights
from osp_diag.errors import TokenError, UsageError
from osp_diag.tokens import make_batches
from tests.checkpoint_folders import VOCABULARY, edit_config, refused, save, tiny_llama, tiny_tokenizer


@pytest.fixture
def llama(tmp_path) -> Path:
    return save(tiny_llama(), tmp_path / "tiny-llama", tiny_tokenizer())


def test_paths_that_do_not_exist(llama, tmp_path, monkeypatch):
    refused(tmp_path / "tiny-lama", "the path does not exist", "did you mean tiny-llama?")
    refused(tmp_path / "qqqq", "the path does not exist", "nothing is named like 'qqqq'")
    monkeypatch.chdir(tmp_path)
    refused("./tiny-lama", "did you mean")
    refused("tiny-llama/modell.safetensors", "did you mean model.safetensors?")
    refused("", "empty", kind=UsageError)
    refused(7, "not a int", kind=UsageError)


def test_directories_without_a_checkpoint(llama, tmp_path):
    refused(tmp_path, "it has no config.json", "inside it have one: tiny-llama")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "it has no config.json", "save_pretrained")
    (empty / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused(empty, "is an adapter, not a model. Merge it into org/base")
    (llama / "model.safetensors").rename(llama / "model.fp16.safetensors")
    refused(llama, "has no weights", "model.fp16.safetensors: pass that file itself")
    (llama / "model.fp16.safetensors").unlink()
    refused(llama, "has no weights", "was it copied whole?")
    (llama / "config.json").write_text("{")
    refused(llama, "config.json is not readable JSON", "again")


def test_unknown_architectures_and_foreign_code(llama):
    edit_config(llama, model_type="no-such-architecture")
    refused(llama, "does not know its architecture", "module:function")
    edit_config(llama, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    refused(llama, "brings its own model code", "trust_remote_code=True")


def test_unsupported_and_lonely_files(tmp_path):
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"\x08\x07")
    refused(onnx, "its type '.onnx' is not supported", ".gguf, .safetensors, .bin or .pt")
    alone = tmp_path / "alone.safetensors"
    save_file({"weight": torch.ones(2)}, alone)
    refused(alone, "there is no config.json beside it", "module:function")


def test_truncated_safetensors(llama):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(llama, "model.safetensors is truncated", f"{len(whole):,} bytes, and it has {len(whole) - 100:,}")
    path.write_bytes(whole[:50])
    refused(llama, "model.safetensors is truncated: it ends inside its header, at 50 bytes")
    path.write_bytes(whole[:5])
    refused(llama, "model.safetensors is truncated: it ends inside its header, at 5 bytes")
    path.write_bytes(b"<html><body>Not found</body></html>")
    refused(llama, "is not a safetensors file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(llama, "is a Git LFS pointer", "git lfs pull")
    path.write_bytes(struct.pack("<Q", 12) + b'{"a": [1,2]}')
    refused(llama, "its header cannot be read")


def test_missing_shards(tmp_path):
    directory = save(tiny_llama(), tmp_path / "sharded", max_shard_size="4KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    refused(shards[0], "is one shard of a model; pass its directory")
    shards[1].unlink()
    refused(directory, f"lacks 1 of {len(shards)} shards: {shards[1].name}")
    (directory / "model.safetensors.index.json").unlink()
    refused(directory, "there are shards such as", "model.safetensors.index.json is missing")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_never_run(llama, tmp_path):
    trace = tmp_path / "it-ran"
    torch.save({"model.embed_tokens.weight": Malicious(trace)}, llama / "weights.pt")
    shutil.copy(llama / "weights.pt", llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    for source in (llama, llama / "weights.pt"):
        refused(
            source,
            "is refused: its pickle holds more than tensors",
            "system",
            "Ask its author for safetensors",
        )
    assert not trace.exists()


def test_other_pickles_that_cannot_be_read(llama):
    path = llama / "weights.pt"
    torch.save(load_file(llama / "model.safetensors"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "is truncated or not a PyTorch file")
    torch.save([1, 2, 3], path)
    refused(path, "holds a list without tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nonfinite_weights(tmp_path, value, dtype):
    model = tiny_llama().to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, :3] = value
        model.lm_head.weight[1, 1] = value
    directory = save(model, tmp_path / "bad")
    name = "model.layers.1.mlp.down_proj.weight"
    refused(directory, f"NaN or Inf: 3 values of '{name}', 4 in all, in 2 tensors", "allow_nonfinite=True")
    checkpoint = open_checkpoint(directory, allow_nonfinite=True)
    assert checkpoint.notes == (f"4 weights are NaN or Inf, the first in '{name}'.",)


def test_large_finite_weights_are_no_alarm():
    model = nn.Linear(64, 64, dtype=torch.float32)
    with torch.no_grad():
        model.weight.fill_(3e38)  # their sum overflows
    assert nonfinite_weights(model) == {}


def test_tokenizers_that_do_not_belong(tmp_path, llama):
    directory = save(tiny_llama(), tmp_path / "foreign", tiny_tokenizer(VOCABULARY + 6))
    note = f"the tokenizer has {VOCABULARY + 6} tokens and the embedding {VOCABULARY} rows"
    checkpoint = open_checkpoint(directory)
    assert checkpoint.notes[0].startswith(note)
    with pytest.raises(TokenError, match=f"token id {VOCABULARY + 1} at position 0 .* has tokens added"):
        make_batches(
            checkpoint.tokenizer,
            text=f"w{VOCABULARY + 1}",
            tokens=1,
            vocabulary_size=checkpoint.vocabulary_size,
        )
    assert len(open_checkpoint(directory, tokenizer=tiny_tokenizer()).tokenizer) == VOCABULARY
    (llama / "tokenizer.json").write_text("{}")
    refused(llama, "the tokenizer of", "cannot be opened", "pass tokenizer=")


def test_weights_that_do_not_fit_their_configuration(llama):
    edit_config(llama, num_hidden_layers=3)
    refused(llama, "lacks 9 tensors of LlamaForCausalLM, the first 'model.layers.2", "Random numbers")
    edit_config(llama, num_hidden_layers=1)
    assert open_checkpoint(llama).notes[0].startswith("9 tensors of the file are not used by the model")
    edit_config(llama, num_hidden_layers=2, vocab_size=VOCABULARY + 2)
    refused(llama, "does not fit its config.json", f"({VOCABULARY}, 16)", f"({VOCABULARY + 2}, 16)")


def test_options_without_meaning(llama):
    refused(
        llama,
        "dtype 'float8' is not one of auto, float32, bfloat16, float16",
        dtype="float8",
        kind=UsageError,
    )
    refused(llama, "'gpu0' is not a device", device="gpu0", kind=UsageError)
    refused(llama, "cannot both place the model", device="cpu", device_map="auto", kind=UsageError)
    model = tiny_llama()
    refused(model, "a module in hand is measured as it is", dtype="float16", kind=UsageError)
    refused(model, "a module in hand is measured as it is", device="meta", kind=UsageError)
    assert open_checkpoint(model, device="cpu").model is model
    refused(nn.Identity(), "Identity (Identity) has no parameters")


def test_a_device_that_is_not_there(llama):
    absent = f"cuda:{torch.cuda.device_count()}"
    refused(llama, f"device '{absent}' was asked for, but this PyTorch", "use device='cpu'", device=absent)
