"""``osp-diag advise``: of a checkpoint or a run, in words, as JSON, in the run and as other tools' files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from compressed_tensors.quantization import QuantizationScheme

from osp_diag import open_run
from osp_diag.cli.main import main
from osp_diag.quantizing.advice_files import GGUF_TENSORS, llama_cpp_options, llm_compressor_recipe
from osp_diag.quantizing.measurements import measurement_of
from osp_diag.schema import LAYER_ERRORS, SENSITIVITY, SPARED_CHANNELS
from tests.test_sensitivity import advice, planted
from tests.tiny_checkpoints import byte_tokenizer, save

TOKENS = ["--tokens", "96", "--seq-len", "32"]
OPTIONS = [*TOKENS, "--calibration-tokens", "96", "--batch-size", "3"]


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    """A checkpoint, "model", with a hot channel at every norm's output, and the run of its probe."""
    folder = tmp_path_factory.mktemp("advise")
    norms = ("input_layernorm", "post_attention_layernorm")
    model = planted(*((layer, norm) for layer in range(2) for norm in norms))
    save(model, folder / "model", byte_tokenizer())
    probing = ["--single-protocol", "--sites", "residual_post", "--estimators", "token_peak"]
    assert main(["probe", str(folder / "model"), *probing, *TOKENS, "--out", str(folder / "run.zarr")]) == 0
    return folder


def test_of_a_run_it_says_stores_and_writes_what_was_measured(probed, tmp_path, capsys):
    run, out = probed / "run.zarr", tmp_path / "advice"
    assert main(["advise", str(run), *OPTIONS, "--budget", "0.06", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for words in (
        "model at 4-4-16, rounded to nearest, convention plain: perplexity",
        "inputs:attention_input",
        "Tried, within 6.0% of the blocks' weights:",
        "Keep in 16 bits: the hottest channel of every Linear's input. KL",
        "Note: parts are ranked on 3 × 32 tokens of built-in English text, behind those",
        f"stored in {run}",
    ):
        assert words in said
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "tensor-types.txt"}
    held = open_run(run)
    for group, tokens in ((SENSITIVITY, 93), (LAYER_ERRORS, 96), (SPARED_CHANNELS, 93)):
        assert measurement_of(held, group).attrs["tokens"] == tokens
        assert measurement_of(held, group).attrs["model_fingerprint"] == held.attrs["model_fingerprint"]


def test_as_json_nothing_helps_is_an_answer(probed, capsys):
    words = ["advise", str(probed / "model"), *OPTIONS, "--bits", "4-16-16", "--budget", "0", "--json"]
    assert main([*words, "--methods", "rtn"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["advice"] is None
    assert [(trial["name"], trial["helps"], trial["saved"]) for trial in printed["trials"]] == [
        ("RTN for all", False, 0.0)
    ]
    assert printed["spared_channels"]["channels"] == [0, 1, 2, 4, 8, 16]
    assert len(printed["sensitivity"]["divergence"]) == 7


def test_runs_whose_checkpoint_is_gone_or_unknown_are_refused(probed, tmp_path, capsys):
    gone = tmp_path / "gone.zarr"
    shutil.copytree(probed / "run.zarr", gone)
    where = probed / "model"
    moved = where.rename(probed / "elsewhere")
    try:
        assert main(["advise", str(gone), *OPTIONS]) == 2
    finally:
        moved.rename(where)
    assert f"give it: osp-diag advise CHECKPOINT --run {gone}" in capsys.readouterr().err
    save(planted(), tmp_path / "other", byte_tokenizer())
    assert main(["advise", str(tmp_path / "other"), "--run", str(gone), *OPTIONS]) == 2
    assert "whose weights are not those of other" in capsys.readouterr().err
    assert main(["advise", str(gone), "--run", "another.zarr", *OPTIONS]) == 2
    assert "is a run itself: leave --run out" in capsys.readouterr().err
    assert main(["advise", "nowhere", "--budget", "5"]) == 2
    assert "budget=5.0: give the share of the weights" in capsys.readouterr().err, "before it is opened"


def test_recipes_name_what_stays_as_other_tools_do():
    model = planted((1, "post_attention_layernorm"))
    found = advice(model, "4-4-16", 0.2)
    whole = found.best_linears
    assert whole is not None
    assert "model.layers.1.mlp.up_proj" in whole.linears
    recipe = llm_compressor_recipe(found, model)
    modifier = yaml.safe_load(recipe)["quantization_stage"]["quantization_modifiers"]["QuantizationModifier"]
    assert modifier["ignore"] == ["lm_head", *whole.linears]
    scheme = QuantizationScheme.model_validate(modifier["config_groups"]["group_0"])
    weights, inputs = scheme.weights, scheme.input_activations
    assert (weights.num_bits, weights.symmetric, weights.strategy) == (4, True, "channel")
    assert (inputs.num_bits, inputs.symmetric, inputs.dynamic) == (4, False, True)
    options = llama_cpp_options(found, model).splitlines()
    assert r"--tensor-type blk\.1\.ffn_up=q8_0" in options
    assert sum(line.startswith("--tensor-type ") for line in options) == len(whole.linears)
    alone = float(found.sensitivity["divergence"].sel(part="inputs:mlp_input", layer=1))
    assert any(f"inputs:mlp_input {alone:.3g} nat alone" in line for line in options)


def test_llama_cpps_names_are_those_of_its_own_table():
    from gguf.constants import TENSOR_NAMES

    known = set(TENSOR_NAMES.values())
    assert {f"blk.{{bid}}.{name}" for name in GGUF_TENSORS.values()} <= known
