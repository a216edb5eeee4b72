"""Secondary sinks against cosines taken one by one in float64."""

from __future__ import annotations

import numpy as np
import pytest

from osp_diag.errors import EstimatorError
from osp_diag.estimators import ActivationObservation, Suite
from osp_diag.estimators.secondary_sinks import SecondarySinks


def expected(oracle) -> dict[str, np.ndarray]:
    """Every output by name: the tests of all backends and of hostile inputs ask for it."""
    names = ("secondary_sink_count", "secondary_sink_fraction", "first_token_cosine")
    strata = len(oracle.keep)
    aligned, total, count = np.zeros(strata), np.zeros(strata), np.zeros(strata)
    for b, x in enumerate(oracle.x):
        present = np.flatnonzero(oracle.present[b])
        if not len(present) or not oracle.keep[0, b, present[0]] or not x[present[0]].any():
            continue
        first = x[present[0]] / np.abs(x[present[0]]).max()
        for s, t in np.argwhere(oracle.keep[:, b]):
            if t == present[0] or not x[t].any():
                continue
            token = x[t] / np.abs(x[t]).max()
            cosine = token @ first / np.linalg.norm(token) / np.linalg.norm(first)
            aligned[s] += cosine > 0.9
            total[s] += cosine
            count[s] += 1
    known = np.where(count > 0, count, np.nan)
    sequences = np.where(count > 0, len(oracle.whole), np.nan)
    return dict(zip(names, (aligned / sequences, aligned / known, total / known), strict=True))


def measured(x: np.ndarray, strata: np.ndarray) -> dict[str, np.ndarray]:
    suite, observation = Suite([SecondarySinks()]), ActivationObservation(x, strata)
    state = suite.update(suite.init(observation.layout, x), observation)
    return {name: output.values for name, output in suite.finalise(state, observation.layout).items()}


def test_a_delimiter_that_points_where_the_first_token_does() -> None:
    x = np.random.default_rng(0).standard_normal((2, 12, 64)).astype(np.float32)
    x[0, 5] = 0.01 * x[0, 0] + 1e-4
    x[1, 5] = -x[1, 0]
    strata = np.zeros((4, 2, 12), np.float32)
    strata[0], strata[1, :, 0], strata[2, :, 5] = 1, 1, 1
    strata[3] = 1 - strata[1] - strata[2]
    found = measured(x, strata)
    np.testing.assert_array_equal(found["secondary_sink_count"], [0.5, np.nan, 0.5, 0])
    np.testing.assert_allclose(found["secondary_sink_fraction"], [1 / 22, np.nan, 0.5, 0])
    assert abs(found["first_token_cosine"][2]) < 1e-3  # 1 and −1
    assert abs(found["first_token_cosine"][3]) < 0.1


def test_padding_before_the_first_token() -> None:
    x = np.random.default_rng(1).standard_normal((1, 6, 16)).astype(np.float32)
    x[0, 4] = 3 * x[0, 2]
    strata = np.zeros((4, 1, 6), np.float32)
    strata[0, :, 2:], strata[1, :, 2], strata[3, :, 3:] = 1, 1, 1
    assert measured(x, strata)["secondary_sink_count"][3] == 1


def test_refusal() -> None:
    with pytest.raises(EstimatorError, match="cosine is 1; give one between −1 and 1"):
        SecondarySinks(1)
