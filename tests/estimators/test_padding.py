"""Padding changes no number: positions count from a sequence's first token, samples are of its tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from osp_diag.estimators import ActivationObservation, Suite, get_estimator
from osp_diag.estimators._arrays import Array
from tests.attention_cases import run
from tests.dense_attention import make_case

TOKENS, CHANNELS, WIDTH = 9, 12, 24


def located(left: int) -> dict[str, Array]:
    """Two planted outliers and a NaN in the 4th, 6th and 7th of nine tokens, ``left`` columns of padding."""
    x = np.random.default_rng(1).standard_normal((2, WIDTH, CHANNELS)).astype(np.float32) * 0.1
    strata = np.zeros((4, 2, WIDTH), np.float32)
    strata[0, :, left : left + TOKENS] = 1
    strata[1, :, left] = 1
    strata[3] = strata[0] - strata[1]
    x[0, left + 3, 2], x[1, left + 5, 7], x[1, left + 6, 4] = 900.0, -900.0, np.nan
    suite = Suite([get_estimator("six_sigma_outliers"), get_estimator("nonfinite")])
    observation = ActivationObservation(x, strata)
    state = suite.update(suite.init(observation.layout, x), observation)
    return {name: output.values for name, output in suite.finalise(state, observation.layout).items()}


@pytest.mark.parametrize("left", [0, 7, WIDTH - TOKENS])
def test_positions_count_from_the_first_token(left: int) -> None:
    found = located(left)
    np.testing.assert_array_equal(np.flatnonzero(found["six_sigma_position_count"]), [3, 5])
    assert found["nonfinite_first_token"] == 6
    assert found["nonfinite_first_channel"] == 4


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("left", [0, 20, 31])
def test_queries_are_sampled_among_the_tokens_that_are_there(left: int, backend: str) -> None:
    short = make_case(3, batch=2, tokens=9)
    pad = [(0, 0), (0, 0), (left, 31 - left), (0, 0)]
    padded = replace(
        short,
        query=np.pad(short.query, pad, constant_values=3.0),
        key=np.pad(short.key, pad, constant_values=-2.0),
        value=np.pad(short.value, pad, constant_values=9.0),
        strata=np.pad(short.strata, [(0, 0), (0, 0), pad[2]]),
        keys=np.pad(np.ones((2, 9), dtype=bool), [(0, 0), pad[2]]),
    )
    for sample in (4, 16):
        found, expected = run(padded, backend, query_sample=sample), run(short, query_sample=sample)
        for name in ("delta_logit", "logit_quantile", "logit_density"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert np.isfinite(found["delta_logit"]).all()
