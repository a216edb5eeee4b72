"""The block lens of weights against float64; experts, hot columns, and what is not defined."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from block_oracle import FORMATS, WIDTHS, Rounded, bits, crests, largest, mean, slices, smallest

from osp_diag.estimators import Suite, weight_block_lens
from osp_diag.estimators.weight_block_lens import WeightBlockLens
from osp_diag.estimators.weight_outliers import WeightObservation

SUITE = Suite([WeightBlockLens()])


def oracle(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """By format, or by width of the blocks, of one matrix (row, channel)."""
    matrix = matrix.astype(np.float64)
    channels = matrix.shape[1]
    by_format = [_of_format(name, matrix) for name in FORMATS]
    outputs = {key: np.array([one[key] for one in by_format]) for key in by_format[0] if key != "blocks"}
    for name, one in zip(FORMATS, by_format, strict=True):
        if WIDTHS[name]:
            outputs[f"weight_{name}_block_collateral_loss"] = one["blocks"]
    every = [np.stack([crests(matrix[:, s]) for s in slices(channels, width)]) for width in (16, 32, 128)]
    for width, crest in zip((16, 32, 128), every, strict=True):
        outputs[f"weight_block_crest_{width}"] = np.array([mean(block) for block in crest])
    outputs["weight_block_crest"] = np.array([mean(crest) for crest in every])
    return outputs | {"weight_block_crest_max": np.array([largest(crest) for crest in every])}


def _of_format(name: str, matrix: np.ndarray) -> dict[str, Any]:
    rows, channels = matrix.shape
    height = 128 if name == "fp8_block" else 1
    missing = np.zeros((-rows % height, channels))
    bands = np.concatenate([matrix, missing]).reshape(-1, height, channels)
    blocks = []
    for place in slices(channels, WIDTHS[name]):
        tiles = bands[:, :, place].reshape(len(bands), -1)
        blocks.append(Rounded(name, tiles, np.full(len(bands), np.abs(matrix).max())))
    loss, headroom = (np.stack([getattr(b, key) for b in blocks]) for key in ("loss", "headroom"))
    by_row = np.sort(bits(blocks))
    return {
        "blocks": np.array([mean(block) for block in loss]),
        "weight_collateral_loss": mean(loss),
        "weight_collateral_loss_max": largest(loss),
        "weight_collateral_loss_above_tenth": mean(np.where(np.isnan(loss), np.nan, loss > 0.1)),
        "weight_effective_bits": by_row[(len(by_row) - 1) // 2],
        "weight_effective_bits_min": by_row[0],
        "weight_zeroed_fraction": sum(b.zeroed.sum() for b in blocks) / (matrix != 0).sum(),
        "weight_scale_headroom": mean(headroom),
        "weight_scale_headroom_min": smallest(headroom),
        "weight_scale_underflow_fraction": np.mean([b.is_small for b in blocks]),
    }


def measured(weight: Any) -> dict[str, np.ndarray]:
    observation = WeightObservation(weight)
    state = SUITE.update(SUITE.init(observation.layout, weight), observation)
    state = SUITE.merge(state, state)  # the same weights again, or of another rank, change nothing
    outputs = SUITE.finalise({key: np.asarray(value) for key, value in state.items()}, observation.layout)
    return {name: output.values for name, output in outputs.items()}


def matrices() -> np.ndarray:
    weight = np.random.default_rng(0).standard_t(4, (2, 200, 150))
    weight[0, :, 21] *= 40
    return weight.astype(np.float32)


@pytest.mark.parametrize("to", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_against_float64(to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_block_lens, "_AT_ONCE", 150 * 128)
    found, expected = measured(to(matrices()[:1])), oracle(matrices()[0])
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=1e-6, err_msg=name)


def test_jax_gives_the_same() -> None:
    suite, weight = Suite([WeightBlockLens(("nvfp4",))]), matrices()[:1, :9, :40]
    found = jax.jit(lambda weight: suite.measure(WeightObservation(weight)))(jnp.asarray(weight))
    for name, values in suite.measure(WeightObservation(weight)).items():
        np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=1e-6, err_msg=name)


def test_of_experts_the_one_that_loses_most() -> None:
    both, hot, plain = (measured(part) for part in (matrices(), matrices()[:1], matrices()[1:]))
    np.testing.assert_array_equal(
        both["weight_collateral_loss"],
        np.maximum(hot["weight_collateral_loss"], plain["weight_collateral_loss"]),
    )
    np.testing.assert_array_equal(
        both["weight_effective_bits"],
        np.minimum(hot["weight_effective_bits"], plain["weight_effective_bits"]),
    )
    assert both["weight_nvfp4_block_collateral_loss"].argmax() == 1


def test_what_is_not_defined() -> None:
    broken = matrices()
    broken[0, 3, 3] = np.nan
    for name, values in measured(broken).items():
        np.testing.assert_array_equal(values, measured(matrices()[1:])[name], err_msg=name)
    assert all(np.isnan(values).all() for values in measured(broken[:1]).values())
    assert all(np.isnan(values).all() for values in measured(np.zeros((1, 4, 40), np.float32)).values())
