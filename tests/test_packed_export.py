"""Quantized checkpoints for others: loaded by transformers, they predict what was simulated."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from compressed_tensors.compressors import pack_to_int32

from osp_diag import open_checkpoint
from osp_diag.cli.main import main
from osp_diag.errors import UsageError
from osp_diag.quantizing.packed_export import check_exportable, packed, save_quantized
from osp_diag.quantizing.perplexity import perplexity
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.quiet import quietly
from tests.test_sensitivity import CALIBRATION, IDS, planted
from tests.tiny_checkpoints import byte_tokenizer, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(save(planted(), tmp_path_factory.mktemp("export") / "model", byte_tokenizer()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_those_of_the_format(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 37), generator=generator)
    assert torch.equal(packed(codes, bits), pack_to_int32(codes.to(torch.int8), bits))


@pytest.mark.parametrize(
    ("bits", "method", "convention"),
    [("4-16-16", "gptq", "osp"), ("4-4-16", "rtn", "plain"), ("8-8-16", "rtn", "plain")],
)
def test_reloaded_it_predicts_what_was_simulated(checkpoint, tmp_path, bits, method, convention):
    setting = Setting.read(bits)
    ways = {"method": method, "convention": convention}
    calibration = CALIBRATION if method == "gptq" else None
    with quantized(checkpoint.model, setting, calibration=calibration, **ways):
        simulated = perplexity(checkpoint.model, IDS)
    folder = save_quantized(checkpoint, tmp_path / "saved", setting, calibration=calibration, **ways)
    with quietly():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert perplexity(loaded, IDS).negative_log_likelihood == pytest.approx(
            simulated.negative_log_likelihood, rel=1e-6
        )
        assert transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"]
    plain = perplexity(checkpoint.model, IDS).negative_log_likelihood
    assert plain != pytest.approx(simulated.negative_log_likelihood, rel=1e-5)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert described["ignore"] == ["lm_head"]
    with pytest.raises(UsageError, match="saved is there already"):
        save_quantized(checkpoint, folder, setting)


@pytest.mark.parametrize(
    ("bits", "method", "convention", "reason"),
    [
        ("16-4-16", "rtn", "plain", "weights of 16 bits: loaders take 4 and 8"),
        ("4-16-4", "rtn", "plain", "keys and values: its grids of them"),
        ("4-4-16", "quarot", "plain", "quarot: the Hadamard matrices that multiply activations"),
        ("4-4-16", "gptq", "osp", "the convention osp: a grid a head for the input of attention's"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(bits, method, convention, reason):
    with pytest.raises(UsageError, match=f"compressed-tensors cannot hold {reason}"):
        check_exportable(Setting.read(bits), method, convention)


def test_the_verb_saves_one_way(checkpoint, tmp_path, capsys):
    words = ["quantize", checkpoint.source, "--tokens", "64", "--seq-len", "32"]
    out = tmp_path / "int4"
    assert main([*words, "--bits", "4-16-16", "--save", str(out)]) == 0
    assert f"saved in {out}" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    for more, reason in (
        (["--bits", "4-16-16"], "it is there already"),
        (["--bits", "4-16-16", "8-16-16"], "give one --bits and one --method"),
        (["--bits", "4-16-16", "--method", "quarot"], "cannot hold quarot"),
    ):
        assert main([*words, *more, "--save", str(out)]) == 2
        assert reason in capsys.readouterr().err
