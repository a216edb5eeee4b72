"""Effective rank against singular values in float64, and at the ends of the scale."""

import numpy as np
import pytest

from osp_diag.estimators import ActivationObservation, Suite
from osp_diag.estimators.effective_rank import EffectiveRank


def entropy(tokens: np.ndarray) -> float:
    """Of the squared singular values: the eigenvalues of the Gram matrix, found another way."""
    energy = np.linalg.svd(tokens / np.abs(tokens).max(), compute_uv=False) ** 2
    share = energy[energy > 0] / energy.sum()
    return float(-(share * np.log(share)).sum())


def expected(oracle) -> dict[str, np.ndarray]:
    """Every output by name: the tests of all backends and of hostile inputs ask for it."""
    entropies = [entropy(tokens) for tokens in oracle.whole if np.any(tokens)]
    return {"effective_rank": np.array(np.mean(np.exp(entropies)) if entropies else np.nan)}


@pytest.mark.parametrize(
    ("tokens", "rank"),
    [
        (np.outer(np.arange(1, 6), np.ones(8)), 1),
        (np.eye(5, 8), 5),
        (np.concatenate([np.eye(4)] * 3), 4),
        (np.diag([1e6, 1, 1, 1]), 1),
    ],
)
def test_bounds(tokens: np.ndarray, rank: float) -> None:
    strata = np.zeros((4, 1, len(tokens)), np.float32)
    strata[0] = strata[3] = 1
    suite = Suite([EffectiveRank()])
    observation = ActivationObservation(1e3 * tokens.astype(np.float32)[None], strata)
    state = suite.update(suite.init(observation.layout, observation.x), observation)
    outputs = suite.finalise(state, observation.layout)
    assert outputs["effective_rank"].values == pytest.approx(rank, rel=1e-5)
