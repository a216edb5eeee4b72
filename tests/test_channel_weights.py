"""Norm gains and the embedding by channel: kept by a probe, compared between models."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

import osp_diag
from osp_diag.analyses.channels.comparison import compare_channels
from osp_diag.capture.channel_weights import channel_weights
from osp_diag.sites import find_sites
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.model import Llama
from tests.channel_runs import channel_run, profile
from tests.tiny_checkpoints import byte_tokenizer, llama, save


def test_gains_and_embedding_are_the_models_own():
    model = llama()
    inner = model.model
    with torch.no_grad():
        inner.layers[1].post_attention_layernorm.weight[3] = -7.0
        inner.norm.weight[5] = 4.0
        inner.embed_tokens.weight[9, 2] = -50.0
    found = channel_weights(model, find_sites(model))
    assert found["norm"].values.tolist() == ["input_layernorm", "post_attention_layernorm"]
    assert found["norm_gain"].sel(norm="post_attention_layernorm", layer=1, channel=3) == 7
    assert found["norm_gain"].sel(norm="input_layernorm").values.tolist() == [
        block.input_layernorm.weight.abs().tolist() for block in inner.layers
    ]
    assert found["outside_norm_gain"].sel(outside_norm="model.norm", channel=5) == 4
    assert found["embedding_maximum"].sel(channel=2) == 50
    assert found["embedding_token"].sel(channel=2) == 9
    table = inner.embed_tokens.weight.detach().abs()
    np.testing.assert_array_equal(found["embedding_maximum"], table.amax(0))
    np.testing.assert_array_equal(found["embedding_token"], table.argmax(0))


def test_a_model_with_one_gain_for_all_channels_has_none_by_channel():
    model = Llama(ModelConfig(vocabulary_size=64, hidden_size=16, layers=2, heads=2, norm="ssnorm"))
    found = channel_weights(model, find_sites(model))
    assert set(found.data_vars) == {"embedding_maximum", "embedding_token"}


def test_a_probe_of_a_checkpoint_keeps_them(tmp_path):
    path = save(llama(), tmp_path / "model", byte_tokenizer())
    run = osp_diag.probe(str(path), tokens=64, out=tmp_path / "run.zarr")
    model = llama()
    expected = channel_weights(model, find_sites(model))
    xr.testing.assert_equal(run.channel_weights.load(), expected)
    assert "channel_weights" not in run.sites
    without = osp_diag.probe(str(path), tokens=64, weights=())
    assert not without.channel_weights.data_vars


def test_those_behind_hot_channels_are_compared():
    def kept(gain: float, entry: float) -> dict[str, xr.Dataset]:
        gains, outside = np.ones((1, 2, 20)), np.ones((1, 20))
        gains[0, 1, 5], outside[0, 5] = gain, 0.25
        largest = np.full(20, 2.0)
        largest[5] = 2 * entry
        weights = xr.Dataset(
            {
                "norm_gain": (("norm", "layer", "channel"), gains),
                "outside_norm_gain": (("outside_norm", "channel"), outside),
                "embedding_maximum": (("channel",), largest),
                "embedding_token": (("channel",), np.arange(20) + 100),
            },
            {"norm": ["input_layernorm"], "outside_norm": ["model.norm"], "layer": [0, 1]},
        ).assign_coords(channel=np.arange(20))
        return {"channel_weights": weights}

    sites = {"residual_post": profile(20, {5: 30.0})[None]}
    one, two = (
        channel_run(sites, model_name=name, static=kept(*planted), hidden_size=20)
        for name, planted in (("one", (8.0, 3.0)), ("two", (1.0, 1.0)))
    )
    found = compare_channels(one, two)
    ratio = found.data["channel_gain_ratio"]
    assert ratio.sel(run="one", gain_norm="input_layernorm", gain_layer=1, weight_channel=5) == 8
    assert ratio.sel(run="one", gain_norm="model.norm", gain_layer=-1, weight_channel=5) == 0.25
    text = " ".join(found.text().split())
    assert (
        "Norm gains at A's hot channels (5): 0.25 (model.norm, channel 5) to 8 (input_layernorm, layer 1, "
        "channel 5) times that of the median channel"
    ) in text
    assert (
        "Embedding at A's hot channels (5): largest entry up to 3 times that of the median channel "
        "(channel 5, token 105)"
    ) in text
    assert "norm gains (weights:norm_gain)" not in text
    assert found.netcdf()
