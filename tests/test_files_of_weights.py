"""Weights that people have: the rows of docs/files.md on GGUF, safetensors, pickles and foreign formats."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import osp_diag
from osp_diag.checkpoints import open_checkpoint
from osp_diag.checkpoints.gguf import cache_directory
from osp_diag.checkpoints.loaded import stray_prefix, unused_notes
from osp_diag.cli.main import main
from osp_diag.cli.report import run as report_verb
from osp_diag.errors import CheckpointError
from tests.checkpoint_folders import edit_config, refused, same_parameters, save, tiny_llama, tiny_tokenizer
from tests.file_situations import situation
from tests.gguf_files import experts, write_model
from tests.tiny_checkpoints import byte_tokenizer, llama, transformers


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OSP_DIAG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tiny_llama(), tmp_path / "tiny", tiny_tokenizer())


# GGUF


@situation("a GGUF file that lacks a tensor", "a GGUF file whose experts lack one of their three matrices")
def test_missing_tensors_of_gguf_are_never_made_up(tmp_path):
    path = write_model(tmp_path / "a.gguf", llama(), without=("blk.1.ffn_down.weight",))
    refused(path, "a.gguf lacks 1 tensors of LlamaForCausalLM", "'model.layers.1.mlp.down_proj.weight'")
    assert list((cache_directory() / "gguf").iterdir()) == []
    path = write_model(tmp_path / "b.gguf", experts(), "qwen3moe", without=("blk.1.ffn_up_exps.weight",))
    refused(path, f"holds {4 * 48 * 32:,} numbers fewer", "blk.1.ffn_up_exps.weight")
    assert list((cache_directory() / "gguf").iterdir()) == []


@situation("a GGUF file of a mixture of experts")
def test_experts_of_gguf_are_those_that_were_written(tmp_path):
    model = experts()
    opened = open_checkpoint(write_model(tmp_path / "a.gguf", model, "qwen3moe"))
    assert opened.config.moe_intermediate_size == 48, "not the class's 768"
    assert same_parameters(opened.model, model)


@situation(
    "a GGUF file with `rope_freqs` (Llama 3.1 and later)", "a GGUF file with rotary scaling in its metadata"
)
def test_rotary_frequencies_of_gguf_are_those_of_the_model(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=scaling)).eval()
    plain = 10000.0 ** (-np.arange(8) / 8)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 4
    ids = torch.arange(3, 51)[None]
    opened = open_checkpoint(write_model(tmp_path / "a.gguf", model, extra={"rope_freqs.weight": factors}))
    torch.testing.assert_close(opened.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)

    entries = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    opened = open_checkpoint(write_model(tmp_path / "b.gguf", model, metadata=entries))
    np.testing.assert_allclose(opened.model.model.rotary_emb.inv_freq.numpy(), plain / 4, rtol=1e-6)
    entries |= {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16}
    opened = open_checkpoint(write_model(tmp_path / "c.gguf", model, metadata=entries))
    assert opened.config.rope_parameters["rope_type"] == "yarn"
    entries |= {"rope.scaling.type": "spiral"}
    refused(
        write_model(tmp_path / "d.gguf", model, metadata=entries), "frequencies by 'spiral'", "safetensors"
    )


@situation("a GGUF file whose `block_count` is beyond or below its tensors")
@pytest.mark.parametrize("count", [1, 3])
def test_block_counts_that_are_not_the_tensors(count, tmp_path):
    path = write_model(tmp_path / "a.gguf", llama(), metadata={"block_count": count})
    refused(path, f"llama.block_count is {count}, and its tensors are of blocks 0 to 1", "another GGUF file")


@situation("a GGUF file with tensors that the model does not use")
def test_tensors_of_gguf_that_go_unused_are_noted_each_time(tmp_path):
    bias = {"blk.0.attn_q.bias": np.ones(16, np.float32)}
    path = write_model(tmp_path / "a.gguf", llama(), extra=bias)
    for _ in range(2):  # converted, and from the cache
        note = "1 tensor of the file is not used by the model, the first 'blk.0.attn_q.bias'."
        assert open_checkpoint(path).notes == (note,)


@situation("one part of a split GGUF file", "a GGUF file of version 1, or big-endian")
def test_gguf_files_that_need_a_tool_first(tmp_path, monkeypatch):
    import gguf

    path = write_model(tmp_path / "whole.gguf", llama())
    for version, message in (
        (struct.pack("<I", 1), "GGUF version 1; versions 2 and 3 are supported. Download a later file"),
        (struct.pack(">I", 3), "big-endian GGUF file, .* `gguf-convert-endian FILE little`"),
    ):
        damaged = tmp_path / "other.gguf"
        damaged.write_bytes(b"GGUF" + version + path.read_bytes()[8:])
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(damaged)
    # Only the first part says what the model is.
    monkeypatch.setattr(gguf.GGUFWriter, "add_architecture", lambda self: None)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 2)
    writer.add_tensor("blk.1.ffn_up.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "b.gguf", "is one of 2 parts, the 2. of them", "llama-gguf-split --merge")


# Scales, unused and missing tensors, prefixes


@situation("quantised weights whose scales nothing uses (`weight_scale`, `weight_scale_inv`, `SCB` …)")
@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "SCB", "scale_weight"])
def test_weights_without_their_scales_are_refused(scale, folder):
    state, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj"
    factor = state[f"{name}.weight"].abs().max() / 448
    state[f"{name}.weight"] = (state[f"{name}.weight"] / factor).to(torch.float8_e4m3fn)
    state |= {f"{name}.{scale}": factor, f"{name}.input_scale": torch.ones(())}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # Where the configuration says how, transformers multiplies by weight_scale_inv.
    described = {"quant_method": "fp8", "activation_scheme": "static"}
    for settings in (None,) if scale == "weight_scale_inv" else (None, described):
        edit_config(folder, quantization_config=settings)
        refused(
            folder, "what scales them is not used: 1 tensors", f"'{name}.{scale}'", "a multiple of the true"
        )


def test_scales_of_a_layer_that_is_left_out_and_of_activations_are_no_alarm(folder):
    state = load_file(folder / "model.safetensors")
    state["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
    state["model.layers.7.mlp.up_proj.weight_scale"] = torch.ones(())
    state["model.layers.0.self_attn.k_scale"] = torch.ones(())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(folder).notes[0].startswith("3 tensors of the file are not used by the model")
    assert unused_notes(["score_head.weight"]) == ()


@situation("a checkpoint with tensors that the model does not use")
def test_notes_reach_terminal_json_and_report(folder, tmp_path, capsys):
    state = load_file(folder / "model.safetensors") | {"model.layers.2.mlp.up_proj.weight": torch.ones(2)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    note = "1 tensor of the file is not used by the model, the first 'model.layers.2.mlp.up_proj.weight'."
    out = tmp_path / "run.zarr"
    words = [
        "probe",
        str(folder),
        "--random-tokens",
        "--tokens",
        "64",
        "--sites",
        "residual_post",
        "attention",
    ]
    assert main([*words, "--out", str(out)]) == 0
    assert f"Note: {note}" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--json"]) == 0
    assert note in json.loads(capsys.readouterr().out)["notes"]
    assert report_verb((out,), out=tmp_path / "run.html", json=True) == 0
    assert note in json.loads(capsys.readouterr().out)["runs"][0]["notes"]
    card = (
        (tmp_path / "run.html").read_text().partition('<ul class="small caveats">')[2].partition("</ul>")[0]
    )
    assert "is not used by the model" in card
    ids = ["--random-tokens", "--tokens", "64", "--widths", "W16A16"]
    assert main(["quantize", str(folder), *ids]) == 0
    assert note in " ".join(capsys.readouterr().out.split())
    assert main(["quantize", str(folder), *ids, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["notes"] == [note]


@situation("names that begin with `_orig_mod.`, `module.` or another prefix")
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "network.inner."])
def test_prefixes_are_taken_off(prefix, folder):
    state, expected = load_file(folder / "model.safetensors"), tiny_llama()
    inside = {
        f"{prefix}{key.replace('mlp.', 'mlp._checkpoint_wrapped_module.')}": v for key, v in state.items()
    }
    torch.save({"model": {f"{prefix}{key}": v for key, v in state.items()}, "step": 3}, folder / "ckpt.pt")
    torch.save(inside, folder / "wrapped.pt")
    save_file(inside, folder / "model.safetensors", metadata={"format": "pt"})
    for source in (folder, folder / "ckpt.pt", folder / "wrapped.pt"):
        opened = open_checkpoint(source)
        assert same_parameters(opened.model, expected)
        assert "were read without what stands before the model's own" in opened.notes[0]
    torch.save(dict(list(inside.items())[:-1]), folder / "missing.pt")
    refused(folder / "missing.pt", "missing.pt lacks 1 tensors of LlamaForCausalLM")


def test_a_prefix_is_what_most_names_share():
    assert stray_prefix(["a.weight", "b.weight"], ["x.a.weight", "x.b.weight"]) == "x."
    assert stray_prefix(["a.weight"], ["xa.weight"]) is None
    assert stray_prefix(["a.weight", "b.weight", "c.weight"], ["x.a.weight"]) is None
    assert stray_prefix([], ["x.a.weight"]) is None


@situation("a single file of weights that lacks a tensor", "a folder called `pytorch_model.bin`")
def test_single_files_and_the_folder_that_is_named_like_one(folder):
    state = load_file(folder / "model.safetensors")
    torch.save({k: v for k, v in state.items() if "layers.0.mlp.up_proj" not in k}, folder / "weights.pt")
    refused(
        folder / "weights.pt",
        "weights.pt lacks 1 tensors of LlamaForCausalLM, the first 'model.layers.0.mlp.up_proj.weight'",
    )
    torch.save({k.removeprefix("model."): v for k, v in state.items() if "lm_head" not in k}, folder / "b.pt")
    assert "so LlamaModel was opened" in open_checkpoint(folder / "b.pt").notes[0]
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").mkdir()
    torch.save(state, folder / "pytorch_model.bin" / "pytorch_model.bin")
    assert same_parameters(open_checkpoint(folder).model, tiny_llama())


@situation(
    "DeepSpeed's ZeRO shards",
    "an FSDP checkpoint (`.distcp`)",
    "a checkpoint of `osp-diag train`",
    "Megatron's, NeMo's, JAX's, TensorFlow's or ONNX's files, or authors' own `consolidated.*.pth`",
)
@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (
            ["zero_to_fp32.py", "global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
            "zero_to_fp32.py . OUT",
        ),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "accelerate merge-weights"),
        (["__0_0.distcp", ".metadata"], "dcp_to_torch"),
        (["__0_0.distcp", "state.json"], "osp-diag export RUN"),
        (["latest_checkpointed_iteration.txt"], "Megatron-LM"),
        (["consolidated.00.pth"], "convert_*_weights_to_hf.py"),
        (["model.nemo"], "NeMo"),
        (["flax_model.msgpack"], "from_flax=True"),
        (["onnx/model.onnx"], "the PyTorch checkpoint that it was"),
    ],
)
def test_foreign_formats_are_recognised(names, advice, has_config, tmp_path, folder):
    place = tmp_path / "foreign"
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"")
    if has_config:
        (place / "config.json").write_bytes((folder / "config.json").read_bytes())
    refused(place, "it holds", advice)


@situation("a model most of whose sites are not found")
def test_a_run_that_lost_most_of_its_sites_says_so():
    model = llama()
    run = osp_diag.probe(model, tokenizer=byte_tokenizer(), tokens=64, sites=["residual_post", "embedding"])
    reasons = dict.fromkeys(("attention", "value", "mlp_input"), "its attention was not recognised")
    run.tree.attrs["absent_sites"] = reasons
    summary = run.summary()
    text = " ".join(summary.text().split())
    assert "Only 2 of 5 sites were measured: what is said here of the model is of those alone" in text
    assert "Not measured: attention, value, mlp_input (its attention was not recognised)" in text
    assert summary.as_dict()["absent_sites"] == reasons
    assert run.verdict().as_dict()["absent_sites"] == reasons
    run.tree.attrs["absent_sites"] = {"value": "none"}
    assert "Only" not in run.summary().text()
