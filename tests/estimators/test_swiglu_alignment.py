"""Cosines between gate and up projections: the definition in float64, and of models, fused or not."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import osp_diag
from osp_diag.errors import EstimatorError
from osp_diag.estimators import Suite, swiglu_alignment
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.swiglu_alignment import GateObservation, SwigluAlignment
from tests.families import FAMILIES
from tests.site_reference import built

SUITE = Suite([SwigluAlignment()])
namespace_of(torch.zeros(1))


def oracle(gate: np.ndarray, up: np.ndarray) -> dict[str, Any]:
    """In float64 by the definition, of (neuron, input)."""
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    cosine = (gate * up).sum(-1) / np.linalg.norm(gate, axis=-1) / np.linalg.norm(up, axis=-1)
    size = np.abs(cosine)
    return {
        "swiglu_alignment": size.mean(),
        "swiglu_alignment_max": size.max(),
        "swiglu_alignment_neuron": size.argmax(),
        "swiglu_alignment_share": (size > 0.5).mean(),
        "swiglu_alignment_cosine": cosine,
    }


def found_in(gate: Any, up: Any) -> dict[str, np.ndarray]:
    observation = GateObservation(gate, up)
    state = SUITE.update(SUITE.init(observation.layout, gate), observation)
    outputs = SUITE.finalise(SUITE.merge(state, state), observation.layout)
    return {name: np.asarray(output.values) for name, output in outputs.items()}


def matrices() -> tuple[np.ndarray, np.ndarray]:
    gate, up = np.random.default_rng(0).normal(size=(2, 12, 7)).astype(np.float32)
    up[3], up[8] = -2 * gate[3] + 0.1 * up[3], gate[8] + up[8]
    return gate, up


@pytest.mark.parametrize("block", [20, 2**22])
@pytest.mark.parametrize("to", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_against_the_formula_in_float64(to: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu_alignment, "_BLOCK_ELEMENTS", block)
    gate, up = matrices()
    wanted = oracle(gate, up)
    found = found_in(to(gate), to(up))
    assert wanted["swiglu_alignment_neuron"] == 3
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in found_in(to(gate * np.float32(1e30)), to(up * np.float32(-1e-30))).items():
        sign = -1 if name.endswith("cosine") else 1
        np.testing.assert_allclose(sign * value, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_ends_of_the_scale_and_what_is_not_defined() -> None:
    gate, _ = matrices()
    assert found_in(gate, -gate)["swiglu_alignment"] == pytest.approx(1)
    assert found_in(gate, -gate)["swiglu_alignment_share"] == 1
    up = -gate
    up[0], gate[1, 2] = 0, np.nan
    found = found_in(gate, up)
    assert np.isnan(found["swiglu_alignment_cosine"]).tolist() == [True, True, *[False] * 10]
    assert found["swiglu_alignment"] == pytest.approx(1)
    assert np.isnan(list(map(np.max, found_in(gate, np.zeros_like(gate)).values()))).all()
    with pytest.raises(
        EstimatorError, match=r"as \(neuron, input\) both, none of them 0; got \(12, 7\) and \(7,\)"
    ):
        GateObservation(gate, gate[0])


MODULES = {
    "llama": lambda mlp: (mlp.gate_proj.weight, mlp.up_proj.weight),
    "phi3": lambda mlp: mlp.gate_up_proj.weight.chunk(2),
}


@pytest.mark.parametrize("name", MODULES)
def test_of_the_models_own_matrices(name: str) -> None:
    model = built(name)
    probe = osp_diag.Probe(model, sites=["mlp_gate_weight"])
    with probe.step(0), torch.no_grad():
        model(**FAMILIES[name].inputs())
    at = probe.run.at("mlp_gate_weight").sel(step=0, layer=1)
    block = model.get_submodule(probe.site_map.block_paths[1])
    gate, up = (weight.detach().numpy() for weight in MODULES[name](block.mlp))
    for key, value in oracle(gate, up).items():
        np.testing.assert_allclose(at[key].values, value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(("name", "reason"), [("gpt2", None), ("mixtral", "of experts are not read")])
def test_of_models_without_gates_and_of_experts(name: str, reason: str | None) -> None:
    model = built(name)
    found = osp_diag.Probe(model).site_map
    assert "mlp_gate_weight" not in found.sites
    assert (reason or "") in found.absent.get("mlp_gate_weight", "")
    assert ("mlp_gate_weight" in found.absent) == (reason is not None)
