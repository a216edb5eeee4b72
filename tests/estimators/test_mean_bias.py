"""The share of energy in the mean against NumPy in float64, and at its ends."""

import numpy as np
import pytest

from osp_diag.estimators import ActivationObservation, Suite
from osp_diag.estimators.mean_bias import MeanBiasShare


def share_of(tokens: np.ndarray) -> float:
    if not tokens.any():
        return np.nan
    scaled = tokens.astype(np.float64) / np.abs(tokens).max()
    return float((scaled.mean(0) ** 2).sum() / (scaled**2).sum(-1).mean())


def expected(oracle) -> dict[str, np.ndarray]:
    """Every output by name: the tests of all backends and of hostile inputs ask for it."""
    return {"mean_bias_share": np.array([share_of(rows) for rows in oracle.rows])}


def measured(x: np.ndarray) -> np.ndarray:
    strata = np.zeros((4, 1, len(x)), np.float32)
    strata[0], strata[1, 0, 0], strata[3, 0, 1:] = 1, 1, 1
    suite, observation = Suite([MeanBiasShare()]), ActivationObservation(x[None].astype(np.float32), strata)
    state = suite.update(suite.init(observation.layout, observation.x), observation)
    return suite.finalise(state, observation.layout)["mean_bias_share"].values


@pytest.mark.parametrize("bias", [0.0, 0.3, 50.0])
def test_against_float64(bias: float) -> None:
    x = np.random.default_rng(0).normal(size=(40, 16)) + bias
    assert measured(x)[0] == pytest.approx(share_of(x), rel=1e-5)
    assert measured(x)[3] == pytest.approx(share_of(x[1:]), rel=1e-5)


def test_its_ends() -> None:
    one = np.random.default_rng(1).normal(size=(1, 16))
    assert measured(np.repeat(one, 6, axis=0))[0] == pytest.approx(1)
    assert measured(np.concatenate([one, -one]))[0] == pytest.approx(0, abs=1e-7)
    assert np.isnan(measured(np.zeros((3, 16)))[0])
