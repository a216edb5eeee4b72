"""Super weights: the definition in float64, one that is planted, and what cannot be told."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

import osp_diag
from osp_diag.errors import EstimatorError
from osp_diag.estimators import Suite
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.super_weight import ProductObservation, SuperWeight
from tests.families import FAMILIES

SUITE = Suite([SuperWeight()])
ROW, COLUMN, LAYER = 5, 17, 1
namespace_of(torch.zeros(1))


def expected_of(x: np.ndarray, y: np.ndarray, valid: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """In float64 over (batch, token, channel)."""
    x, y = np.abs(x.astype(np.float64)), np.abs(y.astype(np.float64))
    x, y = (np.where(valid[..., None] > 0, values, 0) for values in (x, y))
    row, column = y.max((0, 1)).argmax(), x.max((0, 1)).argmax()
    peaks = np.sort(y.max((0, 1)))
    value = float(weight[row, column])
    share = abs(value) * x.max() / y.max()
    spike = peaks[-1] / peaks[(len(peaks) - 1) // 2]
    same = (x.max(-1).argmax(-1) == y.max(-1).argmax(-1)).mean()
    return {
        "super_weight": float(same >= 0.5 and share >= 0.5 and spike >= 50),
        "super_weight_value": value,
        "super_weight_row": row,
        "super_weight_column": column,
        "super_weight_share": share,
        "super_weight_spike": spike,
        "super_weight_same_token": same,
    }


def case(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 6, 9)).astype(np.float32)
    weight = rng.standard_normal((7, 9)).astype(np.float32)
    x[0, 2, 4], weight[3, 4] = 90.0, 40.0
    valid = np.ones((3, 6), np.float32)
    x[1, 4, 2], valid[1, 4:] = 1e6, 0
    return x, x @ weight.T, valid, weight


@pytest.mark.parametrize("to", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_against_float64_in_halves(to: Any) -> None:
    x, y, valid, weight = case()
    state = None
    for part in (slice(0, 1), slice(1, 3)):
        observation = ProductObservation(to(x[part]), to(y[part]), to(valid[part]))
        if state is None:
            state = SUITE.init(observation.layout, to(x))
        state = SUITE.update(state, observation)
    unknown = {k: float(v.values) for k, v in SUITE.finalise(state, observation.layout).items()}
    assert np.isnan([unknown["super_weight"], unknown["super_weight_value"]]).all()
    state["product_peak.weight"] = to(np.float64(40.0))
    found = {k: float(v.values) for k, v in SUITE.finalise(state, observation.layout).items()}
    assert found == pytest.approx(expected_of(x, y, valid, weight), rel=1e-6)
    assert (found["super_weight_row"], found["super_weight_column"]) == (3, 4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EstimatorError, match=r"inputs \(1, 2, 3\), outputs \(1, 3, 3\) and valid \(1, 2\)"):
        ProductObservation(np.ones((1, 2, 3)), np.ones((1, 3, 3)), np.ones((1, 2)))


def planted() -> torch.nn.Module:
    """Token 7, wherever it stands, switches hidden channel 17 on, and one weight leads it to channel 5."""
    model = FAMILIES["llama"].build().eval()
    mlp = model.model.layers[LAYER].mlp  # type: ignore[union-attr]
    with torch.no_grad():
        mlp.gate_proj.weight[COLUMN] *= 30
        mlp.up_proj.weight[COLUMN] *= 30
        mlp.down_proj.weight[ROW, COLUMN] = -25.0
    return model


def test_a_planted_super_weight() -> None:
    model, batch = planted(), FAMILIES["llama"].inputs()
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: torch.nn.Module, args: tuple[Tensor], result: Tensor) -> None:
        seen.append((args[0], result))

    probe = osp_diag.Probe(model, sites=["mlp_down_weight"])
    for block in model.model.layers:  # type: ignore[union-attr]
        block.mlp.down_proj.register_forward_hook(keep)
    with probe.step(0), torch.no_grad():
        model(**batch)
    valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).numpy()
    for layer, (x, y) in enumerate(seen):
        weight = model.model.layers[layer].mlp.down_proj.weight.detach().numpy()  # type: ignore[union-attr]
        at = probe.run.at("mlp_down_weight").sel(step=0, layer=layer)
        expected = expected_of(x.numpy(), y.numpy(), valid, weight)
        assert {name: at[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    at = probe.run.at("mlp_down_weight").sel(step=0)
    assert at["super_weight"].values.tolist() == [0, 1]
    assert at["super_weight_value"].sel(layer=LAYER) == -25
    place = at["super_weight_row"].sel(layer=LAYER).item(), at["super_weight_column"].sel(layer=LAYER).item()
    assert place == (ROW, COLUMN)
