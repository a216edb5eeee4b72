"""The largest channel of each token against NumPy in float64, and at the ends of the scale."""

import numpy as np
import pytest

from osp_diag.estimators import ActivationObservation, Suite
from osp_diag.estimators.token_peak import PeakRmsRatio, TokenPeak


def peak(token: np.ndarray) -> float:
    return float(np.abs(token).max())


def crest(token: np.ndarray) -> float:
    largest = np.abs(token).max()
    return float(1 / np.sqrt(((token / largest) ** 2).mean())) if largest > 0 else 1.0


def expected(oracle) -> dict[str, np.ndarray]:
    """Every output by name: the tests of all backends and of hostile inputs ask for it."""
    return {
        "token_peak": oracle.over_tokens(peak),
        "peak_rms_ratio": oracle.over_tokens(crest),
        "peak_rms_ratio_max": oracle.top_of_tokens(crest),
    }


@pytest.mark.parametrize(("token", "ratio"), [(np.ones(64), 1), (np.eye(64)[5], 8), (np.zeros(64), 1)])
def test_bounds(token: np.ndarray, ratio: float) -> None:
    strata = np.array([[[1]], [[1]], [[0]], [[0]]], np.float32)
    suite, observation = (
        Suite([TokenPeak(), PeakRmsRatio()]),
        ActivationObservation(3e4 * token.astype(np.float32)[None, None], strata),
    )
    state = suite.update(suite.init(observation.layout, observation.x), observation)
    outputs = suite.finalise(state, observation.layout)
    assert outputs["peak_rms_ratio"].values[0] == pytest.approx(ratio)
    assert outputs["token_peak"].values[0] == pytest.approx(3e4 * token.max())


def test_it_is_a_mean_of_maxima_and_no_maximum() -> None:
    x = np.array([[[1.0, 0.0], [0.0, -100.0], [3.0, 3.0]]], np.float32)
    strata = np.array([[[1, 1, 1]], [[1, 0, 0]], [[0, 0, 0]], [[0, 1, 1]]], np.float32)
    suite, observation = Suite([TokenPeak()]), ActivationObservation(x, strata)
    state = suite.update(suite.init(observation.layout, x), observation)
    np.testing.assert_allclose(
        suite.finalise(state, observation.layout)["token_peak"].values, [104 / 3, 1, np.nan, 51.5]
    )
