"""Statistics of gradients against plain float64, what they leave out, and where they apply."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from osp_diag.estimators import ActivationObservation, Suite, applies_to, default_estimators, get_estimator
from osp_diag.estimators.gradient import ActivationGradient
from osp_diag.schema import GRADIENT


def fisher(token: np.ndarray) -> float:
    return 0.0 if np.ptp(token) == 0 else float(stats.kurtosis(token / np.abs(token).max()))


def expected(oracle) -> dict[str, np.ndarray]:
    """Every output by name: the tests of all backends and of hostile inputs ask for it."""
    reached = [rows[np.abs(rows).max(-1) > 0] if len(rows) else rows for rows in oracle.rows]

    def rms(rows: np.ndarray) -> float:
        top = np.abs(rows).max()
        return top * np.sqrt(np.mean((rows / top) ** 2))

    def over(rows_of: list[np.ndarray], value) -> np.ndarray:
        return np.array([value(rows) if len(rows) else np.nan for rows in rows_of])

    return {
        "gradient_rms": over(reached, rms),
        "gradient_excess_kurtosis": over(reached, lambda rows: np.mean([fisher(row) for row in rows])),
        "gradient_absolute_maximum": over(oracle.rows, lambda rows: np.abs(rows).max()),
        "gradient_zero_share": over(oracle.rows, lambda rows: np.mean(np.abs(rows).max(-1) == 0)),
    }


def measured(x: np.ndarray) -> dict[str, np.ndarray]:
    strata = np.zeros((4, 1, len(x)), np.float32)
    strata[0], strata[1, 0, 0], strata[3, 0, 1:] = 1, 1, 1
    suite, observation = (
        Suite([ActivationGradient()]),
        ActivationObservation(x[None].astype(np.float32), strata),
    )
    state = suite.update(suite.init(observation.layout, observation.x), observation)
    return {name: output.values for name, output in suite.finalise(state, observation.layout).items()}


def test_tokens_that_the_loss_does_not_depend_on_are_told_apart() -> None:
    x = np.random.default_rng(0).normal(size=(6, 32)) * 1e-9
    dense = measured(x)
    x[[2, 5]] = 0
    x[4, 7] = np.nan
    outputs = measured(x)
    alone = measured(x[[0, 1, 3]])
    for name in ("gradient_rms", "gradient_excess_kurtosis", "gradient_absolute_maximum"):
        assert outputs[name][0] == alone[name][0]
    assert outputs["gradient_zero_share"][0] == 2 / 5
    assert outputs["gradient_nonfinite_count"].tolist() == [1, 0, 0, 1]
    assert dense["gradient_rms"][0] == pytest.approx(1e-9, rel=0.2)


def test_a_statistic_of_activations_is_none_of_gradients() -> None:
    names = {estimator.name for estimator in default_estimators(site=f"{GRADIENT}residual_post")}
    assert names == {"gradient"}
    assert not applies_to(get_estimator("osp_excess_kurtosis"), f"{GRADIENT}embedding")
    assert not applies_to(ActivationGradient, "residual_post")
