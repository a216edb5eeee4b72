"""Models of several stacks: an encoder and a decoder, two towers. Each is a run, which says whose it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import osp_diag
from osp_diag import Probe
from osp_diag.analyses.run_labels import labels_of
from osp_diag.cli.main import main
from osp_diag.errors import SiteError
from osp_diag.sites import find_sites
from tests.test_cross_attention import BATCH, DECODER_MASK, MASK, bart, sharp, t5
from tests.tiny_checkpoints import BYTES, byte_tokenizer, save

QUICK = ["--tokens", "128", "--seq-len", "16"]


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_each_stack_is_that_of_a_dense_pass(build: Callable[[str], nn.Module], stack: str) -> None:
    model = sharp(build)
    with Probe(model, stack=stack) as probe, probe.step(0), torch.no_grad():
        model(**BATCH)
    run = probe.run
    assert run.attrs["stack"] == stack
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        output = double(**BATCH, output_hidden_states=True, output_attentions=True)
    valid = (MASK if stack == "encoder" else DECODER_MASK).numpy() > 0
    states = getattr(output, f"{stack}_hidden_states")
    places = [("embedding", 0, states[0]), ("residual_post", 0, states[1])]
    places.append(("final_norm" if build is t5 else "residual_post", 1, states[2]))
    for site, layer, state in places:
        x = state.numpy()[valid]
        expected = np.maximum((x**4).mean(1) / x.var(1, ddof=1) ** 2 - 3, 0).mean()
        ours = run.at(site)["osp_excess_kurtosis"].sel(step=0, layer=layer, stratum="all")
        assert float(ours) == pytest.approx(expected, abs=1e-4)
    for layer, weights in enumerate(getattr(output, f"{stack}_attentions")):
        mass = np.full((2, weights.shape[1], valid.shape[1]), np.nan)
        for b, own in enumerate(valid):
            queries = np.flatnonzero(own)
            for k, key in enumerate(queries):
                asking = queries[queries >= key] if stack == "decoder" else queries
                mass[b, :, k] = weights[b].numpy()[:, asking, key].mean(-1)
        ours = run.at("attention")["key_mass"].sel(step=0, layer=layer)
        np.testing.assert_allclose(ours, np.nanmean(mass, 0), atol=1e-4)
    assert ("cross_attention" in run.sites) == (stack == "decoder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=BYTES + 8,
        d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    return save(model, tmp_path_factory.mktemp("stacks") / "tiny-t5", byte_tokenizer())


def test_all_stacks_in_one_call(checkpoint: Path, tmp_path: Path) -> None:
    runs = osp_diag.probe_stacks(checkpoint, tokens=64, seq_len=16, out=tmp_path / "run.zarr")
    assert list(runs) == ["decoder", "encoder"]
    assert runs["encoder"].path == tmp_path / "run.encoder.zarr"
    assert [len(run.at("residual_post")["layer"]) for run in runs.values()] == [3, 2]
    assert labels_of(list(runs.values()), [0, 0]) == ["tiny-t5, decoder", "tiny-t5, encoder"]
    for stack, run in runs.items():
        assert f"tiny-t5, {stack}, " in run.summary().text()
        findings = " ".join(finding.text for finding in run.verdict().findings)
        assert f"{stack} layer " in findings
        assert " , layer" not in findings
        assert run.draw("depth_profile", backend="none") is not None
    profile = osp_diag.figures.draw("depth_profile", list(runs.values()), backend="none")
    assert {"tiny-t5, decoder", "tiny-t5, encoder"} <= set(map(str, np.ravel(profile["run"].values)))


def test_the_command_measures_all_and_says_which(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.zarr"
    assert main(["probe", str(checkpoint), *QUICK, "--single-protocol", "--out", str(out)]) == 0
    text = capfd.readouterr().out
    assert text.index("tiny-t5, decoder,") < text.index("tiny-t5, encoder,")
    assert f"run: {tmp_path / 'run.encoder.zarr'}" in text
    assert "decoder layer" in text
    assert "encoder layer" in text
    assert "Cross-attention: sink rate" in " ".join(text.split())
    assert main(["probe", str(checkpoint), *QUICK, "--single-protocol", "--json"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert values["stack"] == "decoder"
    assert values["cross_attention"]["heads"] == 12
    assert list(values["stacks"]) == ["encoder"]
    assert "cross_attention" not in values["stacks"]["encoder"]
    assert main(["probe", str(checkpoint), *QUICK, "--stack", "encoder", "--single-protocol", "--json"]) == 0
    alone = json.loads(capfd.readouterr().out)
    assert "stacks" not in alone
    assert alone == values["stacks"]["encoder"]


def test_a_tower_is_chosen_by_a_part_of_its_path() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text: dict[str, Any] = {**sizes, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 4}, projection_dim=16
    )
    model = transformers.CLIPModel(config).eval()
    batch = {"input_ids": torch.arange(3, 23).reshape(2, 10), "pixel_values": torch.randn(2, 3, 16, 16)}
    for stack, tokens in (("vision", 17), ("text", 10)):
        with Probe(model, stack=stack, example=batch) as probe, probe.step(0), torch.no_grad():
            model(**batch)
        assert probe.run.attrs["stack"] == f"{stack}_model"
        count = probe.run.at("residual_post")["token_count"].sel(step=0, layer=1, stratum="all")
        assert float(count) == 2 * tokens
        (note,) = (note for note in probe.run.notes if "stack=" in note)
        assert note.startswith(
            f"every layer and site here is of the stack {stack}_model ({stack}_model.encoder"
        )
    with pytest.raises(
        SiteError, match="stack='encoder' names several stacks of blocks; this model has: text_model"
    ):
        find_sites(model, stack="encoder", example=batch)
    with pytest.raises(SiteError, match="stack='audio' names no stack of blocks that ran"):
        find_sites(model, stack="audio", example=batch)
    with pytest.raises(SiteError, match="both say which blocks; give one of them"):
        find_sites(model, stack="text", blocks="text_model.encoder.layers", example=batch)


def test_a_model_of_one_stack_says_nothing_of_stacks() -> None:
    from tests.families import FAMILIES

    sites = find_sites(FAMILIES["llama"].build())
    assert (sites.stack, sites.stacks) == ("", ())
