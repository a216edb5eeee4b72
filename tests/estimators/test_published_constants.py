"""Numbers from the literature, and what a definition must give on activations made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from activation_cases import finalised, strata_for, values
from scipy import stats

from osp_diag.estimators import (
    ActivationObservation,
    FisherKurtosis,
    MassiveActivations,
    MaxMedianRatio,
    OspExcessKurtosis,
    PearsonKurtosis,
    PooledKurtosis,
    SixSigmaOutliers,
    Suite,
    SystematicOutlierTokens,
    TopMagnitude,
    TweoPenalty,
    gaussian_floor,
    get_estimator,
)
from osp_diag.estimators.base import Output


def osp_of(tokens: np.ndarray) -> float:
    """The OSP formula on (token, channel)."""
    x = tokens.astype(np.float32)[None]
    return float(values(x, strata_for(1, len(tokens)), OspExcessKurtosis())["osp_excess_kurtosis"][0])


def gaussian(tokens: int, channels: int) -> np.ndarray:
    return np.random.default_rng(channels).standard_normal((tokens, channels), dtype=np.float32)


SIMULATED_FLOORS = {128: 0.142, 256: 0.106, 512: 0.078, 768: 0.066, 1024: 0.058, 2048: 0.0417, 4096: 0.029}


@pytest.mark.parametrize(("channels", "floor"), SIMULATED_FLOORS.items())
def test_the_floor_of_the_osp_formula(channels: int, floor: float) -> None:
    measured = osp_of(gaussian(8_000_000 // channels, channels))
    assert measured == pytest.approx(floor, rel=0.05)
    assert gaussian_floor(channels) == pytest.approx(measured, rel=0.05)
    assert gaussian_floor(channels) < np.sqrt(24 / (2 * np.pi * channels))


def test_the_floor_tends_to_its_asymptote() -> None:
    assert gaussian_floor(10**7) == pytest.approx(np.sqrt(24 / (2 * np.pi * 10**7)), rel=1e-3)
    assert gaussian_floor(2) == 0.0


@pytest.mark.parametrize("channels", [8, 576, 2048])
def test_a_one_hot_token_reaches_the_ceiling(channels: int) -> None:
    token = np.zeros((1, channels))
    token[0, 1] = 25_805.0
    outputs = finalised(
        token.astype(np.float32)[None], strata_for(1, 1), [OspExcessKurtosis(), FisherKurtosis()]
    )
    assert outputs["osp_excess_kurtosis"].values[0] == pytest.approx(channels - 3)
    assert outputs["osp_excess_kurtosis"].ceiling == channels - 3
    assert outputs["osp_excess_kurtosis_of_ceiling"].values[0] == pytest.approx(1.0)
    fisher = outputs["fisher_kurtosis"]
    assert fisher.values[0] == pytest.approx(channels - 5 + 1 / (channels - 1))
    assert fisher.ceiling == pytest.approx(fisher.values[0])


def test_one_massive_channel_saturates_the_osp_formula() -> None:
    tokens = gaussian(16, 2048)
    tokens[:, 1415] = 2556.8
    assert osp_of(tokens) > 0.998 * 2045


def test_two_massive_channels_halve_it() -> None:
    tokens = gaussian(64, 2048)
    tokens[:, 1415], tokens[:, 1076] = 10_000.0, 6_000.0
    assert osp_of(tokens) == pytest.approx(1247, abs=2)


def test_one_channel_of_twenty_sigma() -> None:
    """A channel of standard deviation 20 among 4095 of 1, its values spread evenly over their law."""
    tokens = gaussian(2000, 4096)
    tokens[:, 5] = 20.0 * stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    assert osp_of(tokens) == pytest.approx(58, abs=2)


def test_a_shift_adds_six_m_squared_and_m_to_the_fourth() -> None:
    tokens = gaussian(4000, 2048)
    assert osp_of(tokens + np.float32(3.0)) == pytest.approx(136.9, rel=0.015)
    for m in (0.5, 1.0, 2.0):
        assert osp_of(tokens + np.float32(m)) == pytest.approx(6 * m**2 + m**4, rel=0.02)
    shifted = values((tokens + 3)[None], strata_for(1, 4000), FisherKurtosis())["fisher_kurtosis"][0]
    assert shifted == pytest.approx(-6 / 2049, abs=0.01)


def test_three_definitions_disagree_on_the_same_numbers() -> None:
    """Seen in the wild: 82.9, 85.9 and 136,726 for one model and text."""
    x = gaussian(512, 576)[None]
    x[0, 0, 7] = 25_805.0
    x[0, :, 7] += 20.0
    found = values(x, strata_for(1, 512), OspExcessKurtosis(), PearsonKurtosis(), PooledKurtosis())
    osp, pearson, pooled = (found[f"{name}_kurtosis"][0] for name in ("osp_excess", "pearson", "pooled"))
    assert pearson == pytest.approx(osp + 3, rel=0.1)
    assert pooled > 1000 * osp
    assert pooled == pytest.approx(512 * 576, rel=0.01)


def test_a_token_without_spread_scores_zero() -> None:
    x = np.full((1, 6, 64), -7.3, np.float32)
    found = values(x, strata_for(1, 6), OspExcessKurtosis(), FisherKurtosis(), PooledKurtosis())
    for name in ("osp_excess_kurtosis", "fisher_kurtosis", "pooled_kurtosis"):
        assert found[name][0] == 0.0
    np.testing.assert_allclose(found["fisher_kurtosis_quantile"][0], 0.0, atol=0.07)


def test_a_massive_activation_needs_both_rules() -> None:
    x = gaussian(64, 128)[None] * 0.05
    x[0, 0, 3] = 99.0  # far beyond 1000 medians, but not beyond 100
    x[0, 1, 4] = 101.0
    loud = gaussian(64, 128)[None]
    loud[0, 0, 3] = 500.0  # beyond 100, but not 1000 medians
    both = np.concatenate([x, loud])
    found = values(both, strata_for(2, 64, padding=False), MassiveActivations())
    assert found["massive_activation_count"][0] == 0.5
    channels = found["massive_activation_channel_count"]
    assert channels[4] == 0.5
    assert channels.sum() == 0.5
    exactly = np.ones((1, 4, 8), np.float32) * 0.01
    exactly[0, 0, 0] = 100.0
    assert values(exactly, strata_for(1, 4), MassiveActivations())["massive_activation_count"][0] == 0


def test_systematic_outliers_compare_with_a_mean_that_they_raise() -> None:
    x = np.zeros((1, 64, 32), np.float32)
    x[0, 0, 0] = 1e5
    found = values(x, strata_for(1, 64), SystematicOutlierTokens())
    assert found["systematic_outlier_token_count"][0] == 1, "the mean is 1e5 / 2048"
    few = values(x[:, :30], strata_for(1, 30), SystematicOutlierTokens())
    assert few["systematic_outlier_token_count"][0] == 0, "the mean is 1e5 / 960"


def test_top_magnitudes_of_sequences_with_fewer_elements_than_ranks() -> None:
    x = np.array([[[2.0]], [[-4.0]]], np.float32)
    found = values(x, strata_for(2, 1, padding=False), TopMagnitude())
    np.testing.assert_array_equal(found["top_magnitude"][0], [3.0, 0.0, 0.0])
    assert found["median_magnitude"] == 3.0


def test_the_median_is_the_lower_one() -> None:
    x = np.array([[[1.0, 2.0, 3.0, 8.0]]], np.float32)
    assert values(x, strata_for(1, 1), MaxMedianRatio())["max_median_ratio"][0] == 4.0


def test_gaussian_noise_has_no_six_sigma_outliers_and_the_stated_penalty() -> None:
    x = gaussian(512, 256)[None]
    found = values(x, strata_for(1, 512), SixSigmaOutliers(), TweoPenalty())
    assert found["six_sigma_fraction"][0] == 0
    assert found["tweo_penalty"][0] == pytest.approx(3 / 81, rel=0.02)


def measured(name: str, x: np.ndarray, strata: np.ndarray) -> dict[str, Output]:
    suite, observation = Suite([get_estimator(name)]), ActivationObservation(x, strata)
    state = suite.update(suite.init(observation.layout, x), observation)
    return suite.finalise(state, observation.layout)


def test_an_offset_takes_the_osp_formula_beyond_what_one_channel_gives() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 50, 512))
    strata = np.zeros((4, 1, 50), np.float32)
    strata[0] = strata[3] = 1
    found = measured("osp_excess_kurtosis", (noise + 10).astype(np.float32), strata)
    x = noise[0] + 10
    expected = np.mean((x**4).mean(axis=-1) / x.var(axis=-1, ddof=1) ** 2 - 3)
    assert found["osp_excess_kurtosis"].values[0] == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(6 * 10**2 + 10**4, rel=0.05)
    assert found["osp_excess_kurtosis_of_ceiling"].values[0] > 20
    assert found["osp_excess_kurtosis_of_ceiling"].ceiling is None
    assert get_estimator("osp_excess_kurtosis").range == "[0, ∞)"


def test_a_stratum_may_be_all_outliers_of_its_sequence() -> None:
    x = np.full((1, 100, 64), 0.01, np.float32)
    x[:, :, ::2] = -0.01
    x[0, 0] = 10
    strata = np.zeros((4, 1, 100), np.float32)
    strata[0], strata[1, 0, 0], strata[3, 0, 1:] = 1, 1, 1
    found = measured("six_sigma_outliers", x, strata)["six_sigma_fraction"]
    np.testing.assert_allclose(found.values, [0.01, 1, np.nan, 0])
    assert found.ceiling == 1


def test_one_element_gives_the_pooled_ceiling() -> None:
    x = np.zeros((1, 50, 20), np.float32)
    x[0, 3, 4] = 5000
    found = measured("pooled_kurtosis", x, np.ones((4, 1, 50), np.float32))["pooled_kurtosis"]
    assert found.values[0] == pytest.approx(50 * 20 - 4, abs=0.01)


def test_a_mean_of_many_deviations_leaves_the_kurtosis_alone() -> None:
    x = (np.random.default_rng(1).standard_t(5, (1, 16, 768)) + 1e5).astype(np.float32)
    strata = np.zeros((4, 1, 16), np.float32)
    strata[0] = strata[3] = 1
    exact = stats.kurtosis(x[0].astype(np.float64), axis=-1).mean()
    assert measured("fisher_kurtosis", x, strata)["fisher_kurtosis"].values[0] == pytest.approx(
        exact, rel=1e-6
    )
