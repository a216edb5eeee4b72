"""The share of norm in fixed channels: against NumPy in float64, at its ends, beside the share of energy."""

from __future__ import annotations

import numpy as np
import pytest

from osp_diag.errors import EstimatorError
from osp_diag.estimators import ActivationObservation, Suite, get_estimator
from osp_diag.estimators.channel_concentration import ChannelConcentration
from osp_diag.estimators.residual_sink import ResidualSink


def mean_shares(tokens: np.ndarray) -> np.ndarray:
    tokens = tokens[np.abs(tokens).max(-1) > 0] if len(tokens) else tokens
    if not len(tokens):
        return np.full(tokens.shape[-1], np.nan)
    unit = tokens.astype(np.float64) / np.abs(tokens).max(-1, keepdims=True)
    return (unit**2 / (unit**2).sum(-1, keepdims=True)).mean(0)


def expected(oracle) -> dict[str, np.ndarray]:
    """Every output by name: the tests of all backends and of hostile inputs ask for it."""
    shares = np.array([mean_shares(rows) for rows in oracle.rows])
    return {
        "residual_sink_share": np.sort(shares)[:, -4:].sum(-1),
        "residual_sink_channel_share": shares.max(-1),
    }


def measured(x: np.ndarray, *estimators) -> dict[str, np.ndarray]:
    strata = np.zeros((4, 1, len(x)), np.float32)
    strata[0], strata[1, 0, 0], strata[3, 0, 1:] = 1, 1, 1
    suite, observation = Suite(estimators), ActivationObservation(x[None].astype(np.float32), strata)
    state = suite.update(suite.init(observation.layout, observation.x), observation)
    return {name: output.values for name, output in suite.finalise(state, observation.layout).items()}


def test_a_spike_on_one_token_is_no_residual_sink_and_a_channel_large_on_all_is() -> None:
    x = np.random.default_rng(0).normal(size=(200, 64))
    x[0, 9] = 1e4
    spike = measured(x, ResidualSink(), ChannelConcentration())
    assert spike["channel_share"][0, 2] > 0.99  # of the energy, in the spike's channel
    assert spike["residual_sink_share"][0] < 0.2
    assert spike["residual_sink_share"][1] == pytest.approx(1, abs=1e-5)
    assert spike["residual_sink_channel"][1] == 9
    x[:, 21] = 8
    sink = measured(x, ResidualSink())
    assert sink["residual_sink_channel"][3] == 21
    # Behind a norm all other channels are smaller by √(1 − share).
    others = np.delete(x[1:], 21, axis=1)
    scale = np.mean((others**2).sum(-1) / (x[1:] ** 2).sum(-1))
    assert 1 - sink["residual_sink_channel_share"][3] == pytest.approx(scale, rel=1e-5)


def test_its_ends_and_its_parameter() -> None:
    assert measured(np.ones((5, 16)), ResidualSink())["residual_sink_share"][0] == pytest.approx(4 / 16)
    assert measured(np.eye(16)[[3] * 5] * 1e-30, ResidualSink())["residual_sink_channel_share"][0] == 1
    zeros = measured(np.zeros((5, 16)), ResidualSink())
    assert np.isnan(list(zeros.values())).all()
    assert measured(np.ones((5, 3)), ResidualSink())["residual_sink_share"][0] == pytest.approx(1)
    with pytest.raises(EstimatorError, match="top must be a positive number of channels; got 0"):
        get_estimator("residual_sink", top=0)
