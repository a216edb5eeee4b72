"""Guo's value-state drain: norms of values after the output projection, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import osp_diag
from osp_diag.estimators.attention import AttentionObservation
from osp_diag.estimators.base import Suite
from osp_diag.estimators.guo import GuoValueDrain
from tests.attention_reference import observed

RNG = np.random.default_rng(5)


def norms_after_projection(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """‖W_O^h v‖₂ (batch, head, token) in float64; weight is (head, row, width)."""
    value = np.repeat(value.astype(np.float64), weight.shape[0] // value.shape[1], axis=1)
    return np.linalg.norm(np.einsum("hrw,bhtw->bhtr", weight.astype(np.float64), value), axis=-1)


@pytest.mark.parametrize("to", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_against_float64_with_shared_values_and_padding(to) -> None:
    tokens, first = 9, 3
    query = RNG.standard_normal((2, 4, tokens, 6)).astype(np.float32)
    key, value = (RNG.standard_normal((2, 2, tokens, 6)).astype(np.float32) for _ in range(2))
    value[1, 0, 5, 2] = np.nan  # the token is left out
    weight = RNG.standard_normal((4, 10, 6)).astype(np.float32)
    strata = np.zeros((4, 2, tokens), np.float32)
    strata[0, :, first:], strata[1, :, first], strata[3, :, first + 1 :] = 1, 1, 1
    arrays = [to(array) for array in (query, key, value, strata)]
    suite = Suite([GuoValueDrain()])

    def outputs(output_weight: object) -> dict[str, np.ndarray]:
        observation = AttentionObservation(*arrays, scale=0.4, output_weight=output_weight)
        state = suite.update(suite.init(observation.layout, arrays[0]), observation)
        return {k: np.asarray(v.values) for k, v in suite.finalise(state, observation.layout).items()}

    norm = norms_after_projection(np.nan_to_num(value), weight)
    counted = strata[0] > 0
    counted[1, 5] = False
    sink = norm[:, :, first].mean(0)
    counted[:, first] = False
    other = (norm * counted[:, None]).sum((0, 2)) / counted.sum()
    found = outputs(to(weight))
    np.testing.assert_allclose(found["guo_sink_value_norm"], sink, rtol=1e-6)
    np.testing.assert_allclose(found["guo_other_value_norm"], other, rtol=1e-6)
    np.testing.assert_allclose(found["guo_value_drain"], sink / other, rtol=1e-6)
    with np.errstate(invalid="ignore"):
        assert np.isnan(outputs(None)["guo_value_drain"]).all()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    """Its output projection is square, and stored as (input, output)."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


@pytest.mark.parametrize("build", [llama, gpt2])
def test_of_a_model(build) -> None:
    torch.manual_seed(0)
    model, ids = build(), torch.arange(22).reshape(2, 11)
    _, calls, _ = observed(model, {"input_ids": ids})
    probe = osp_diag.Probe(model, sites=["attention"], estimators=["guo_value_drain"])
    with probe.step(0), torch.no_grad():
        model(ids)
    found = probe.run["guo_value_drain"].squeeze()
    for layer, call in enumerate(calls):
        if build is llama:
            weight = model.model.layers[layer].self_attn.o_proj.weight
        else:
            weight = model.transformer.h[layer].attn.c_proj.weight.T
        by_head = weight.detach().unflatten(1, (4, -1)).movedim(1, 0).numpy()
        norm = norms_after_projection(call.value.numpy(), by_head)
        expected = norm[:, :, 0].mean(0) / norm[:, :, 1:].mean((0, 2))
        np.testing.assert_allclose(found.sel(layer=layer).values, expected, rtol=1e-5)


def test_a_quantised_projection_is_said_in_a_note() -> None:
    model = llama()
    o_proj = model.model.layers[1].self_attn.o_proj
    probe = osp_diag.Probe(model, sites=["attention"], estimators=["guo_value_drain"])
    plain, o_proj.forward = o_proj.weight.data, lambda x: x @ plain.T
    del o_proj.weight
    o_proj.weight = torch.nn.Parameter(plain.to(torch.int8), requires_grad=False)
    with probe.step(0), torch.no_grad():
        model(torch.arange(11)[None])
    found = probe.run["guo_value_drain"]
    assert np.isnan(found.sel(layer=1)).all()
    assert np.isfinite(found.sel(layer=0)).all()
    note = "values after the output projection are not measured: its weight is quantised (int8)"
    assert note in probe.run.attrs["notes"]
