"""Kurtosis and norm ratios of weights: the definition in float64, laws, and projections by their roles."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

import osp_diag
from osp_diag.estimators import Suite, weight_outliers
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.weight_outliers import WeightObservation
from osp_diag.estimators.weight_shape import WeightShape
from tests.families import FAMILIES
from tests.site_reference import built

SUITE = Suite([WeightShape()])
NAMES = ("weight_excess_kurtosis", "weight_row_norm_ratio", "weight_column_norm_ratio")
namespace_of(torch.zeros(1))


def oracle(weight: np.ndarray) -> dict[str, float]:
    """In float64 by the definition, of (expert, row, channel)."""
    matrices = weight.astype(np.float64)

    def ratio(axis: int) -> float:
        norms = np.sort(np.linalg.norm(matrices, axis=axis), axis=-1)
        return (norms[:, -1] / norms[:, (norms.shape[-1] - 1) // 2]).max()

    kurtosis = max(stats.kurtosis(matrix, axis=None) for matrix in matrices)
    return dict(zip(NAMES, (kurtosis, ratio(2), ratio(1)), strict=True))


def found_in(weight: Any) -> dict[str, float]:
    observation = WeightObservation(weight)
    state = SUITE.update(SUITE.init(observation.layout, weight), observation)
    return {name: float(output.values) for name, output in SUITE.finalise(state, observation.layout).items()}


def matrices(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(5, (3, 14, 9)) + 0.4
    weight[1, 3], weight[2, :, 4] = weight[1, 3] * 7, weight[2, :, 4] * 5
    return weight.astype(np.float32)


@pytest.mark.parametrize("block", [20, 2**22])
@pytest.mark.parametrize("to", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_against_the_formula_in_float64(to: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_outliers, "_BLOCK_ELEMENTS", block)
    assert found_in(to(matrices())) == pytest.approx(oracle(matrices()), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-30, -1e-3, 1e30])
def test_scaling_changes_nothing(factor: float) -> None:
    scaled = (matrices() * np.float32(factor)).astype(np.float32)
    assert found_in(scaled) == pytest.approx(oracle(matrices()), rel=1e-5)


def test_turned_the_ratios_change_places() -> None:
    upright, turned = found_in(matrices()), found_in(matrices().swapaxes(1, 2))
    assert turned[NAMES[0]] == pytest.approx(upright[NAMES[0]], rel=1e-6)
    assert (turned[NAMES[1]], turned[NAMES[2]]) == pytest.approx((upright[NAMES[2]], upright[NAMES[1]]))


def test_the_ends_of_the_scale_and_what_is_not_defined() -> None:
    signs = np.where(np.indices((8, 8)).sum(0) % 2, 1.0, -1.0).astype(np.float32)[None]
    assert found_in(signs) == pytest.approx(dict(zip(NAMES, (-2, 1, 1), strict=True)))
    constant = found_in(np.full((1, 6, 5), 0.1, np.float32))
    assert np.isnan(constant[NAMES[0]])
    assert (constant[NAMES[1]], constant[NAMES[2]]) == pytest.approx((1, 1))
    single = np.zeros((1, 6, 5), np.float32)
    single[0, 2, 3] = 4.0
    found = found_in(single)
    assert found[NAMES[0]] == pytest.approx(stats.kurtosis(single, axis=None))
    assert np.isnan([found[NAMES[1]], found[NAMES[2]]]).all()
    broken = matrices()[:1]
    broken[0, 1, 1] = np.nan
    assert np.isnan(list(found_in(broken).values())).all()
    # Beside a matrix that is whole, the broken one is left out.
    assert found_in(np.concatenate([broken, matrices()[1:]])) == pytest.approx(
        oracle(matrices()[1:]), rel=1e-5
    )


def test_seeing_weights_twice_changes_nothing() -> None:
    once, again = found_in(matrices()), WeightObservation(matrices())
    state = SUITE.update(SUITE.init(again.layout, again.weight), again)
    twice = SUITE.finalise(SUITE.merge(state, state), again.layout)
    assert {name: float(output.values) for name, output in twice.items()} == once


ROLES = {
    # family → role → (module within block 1, rows of it, whether it is stored as (input, output))
    "llama": {
        "query": ("self_attn.q_proj", slice(None)),
        "key": ("self_attn.k_proj", slice(None)),
        "value": ("self_attn.v_proj", slice(None)),
        "attention_output": ("self_attn.o_proj", slice(None)),
        "gate": ("mlp.gate_proj", slice(None)),
        "up": ("mlp.up_proj", slice(None)),
    },
    "qwen3": {"query": ("self_attn.q_proj", slice(None)), "key": ("self_attn.k_proj", slice(None))},
    "phi3": {
        "query": ("self_attn.qkv_proj", slice(0, 32)),
        "key": ("self_attn.qkv_proj", slice(32, 48)),
        "value": ("self_attn.qkv_proj", slice(48, 64)),
        "gate": ("mlp.gate_up_proj", slice(0, 48)),
        "up": ("mlp.gate_up_proj", slice(48, 96)),
    },
    "gpt2": {"key": ("attn.c_attn", slice(32, 64)), "up": ("mlp.c_fc", slice(None))},
    "gpt_neox": {"value": ("attention.query_key_value", [i for i in range(96) if i % 24 >= 16])},
    "deepseek_v3": {"self_attn.kv_b_proj": ("self_attn.kv_b_proj", slice(None))},
}


@pytest.mark.parametrize("name", ROLES)
def test_projections_are_known_by_what_they_compute(name: str) -> None:
    model = built(name)
    probe = osp_diag.Probe(model, sites=["projection_weight:*"])
    with probe.step(0), torch.no_grad():
        model(**FAMILIES[name].inputs())
    run = probe.run
    block = model.get_submodule(probe.site_map.block_paths[1])
    for role, (path, rows) in ROLES[name].items():
        module = block.get_submodule(path)
        weight = module.weight.detach().numpy()
        weight = (weight.T if name == "gpt2" else weight)[rows]
        at = run.at(f"projection_weight:{role}").sel(step=0, layer=1)
        found = {key: at[key].item() for key in NAMES}
        assert found == pytest.approx(oracle(weight[None]), rel=1e-5), role
    meaning = "weights of this projection: statistics of a matrix, not of tokens"
    assert set(run.attrs["sites"].values()) == {meaning}


def test_of_down_projections_by_default_and_of_the_others_on_request() -> None:
    model = built("llama")
    probe = osp_diag.Probe(model)
    with probe.step(0), torch.no_grad():
        model(**FAMILIES["llama"].inputs())
    assert not [site for site in probe.run.sites if site.startswith("projection_weight")]
    found = probe.run["weight_excess_kurtosis"]
    assert set(np.atleast_1d(found["site"].values)) == {"mlp_down_weight"}
    weight = model.model.layers[0].mlp.down_proj.weight.detach().numpy()  # type: ignore[union-attr]
    expected = oracle(weight[None])["weight_excess_kurtosis"]
    assert found.sel(layer=0).squeeze().item() == pytest.approx(expected, rel=1e-5)
