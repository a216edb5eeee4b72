"""Laws that hold whatever the data: merging, scaling, permuting; and what a state is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from activation_cases import EVERYTHING, inputs, layout_of, measure, runner, state_of, strata_for, values
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from osp_diag.errors import EstimatorError
from osp_diag.estimators import (
    GENERIC,
    ActivationObservation,
    ChannelConcentration,
    FisherKurtosis,
    Layout,
    MaxMedianRatio,
    NeuronKurtosis,
    NeuronKurtosisVariance,
    OspExcessKurtosis,
    OutlierFeatures,
    PeakMedianRatio,
    PooledKurtosis,
    Suite,
    TopMagnitude,
    TweoPenalty,
    get_estimator,
    merge_states,
    outlier_features,
    top_channel_overlap,
)
from osp_diag.estimators._arrays import namespace_of

SHAPES = st.tuples(st.integers(2, 4), st.integers(1, 7), st.integers(4, 9))
WHOLE_NUMBERS = SHAPES.flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(-50, 50).map(float))
)
SCALE_FREE = (
    OspExcessKurtosis(),
    FisherKurtosis(),
    PooledKurtosis(epsilon=0.0),
    NeuronKurtosis(),
    NeuronKurtosisVariance(),
    MaxMedianRatio(),
    PeakMedianRatio(),
    ChannelConcentration(tops=(1, 2)),
    get_estimator("six_sigma_outliers"),
    get_estimator("systematic_outlier_tokens"),
    get_estimator("glu_spike_ratio"),
)


def strata_like(x: np.ndarray) -> np.ndarray:
    return strata_for(*x.shape[:2])


def empty(x: np.ndarray) -> dict[str, Any]:
    return EVERYTHING.init(layout_of(x), x)


def updated(x: np.ndarray, strata: np.ndarray) -> dict[str, Any]:
    return EVERYTHING.update(empty(x), ActivationObservation(x, strata))


def assert_same_states(first: dict[str, Any], second: dict[str, Any], rtol: float = 1e-6) -> None:
    assert set(first) == set(second)
    for key in first:
        np.testing.assert_allclose(first[key], second[key], rtol=rtol, atol=1e-9, err_msg=key)


@settings(max_examples=40)
@given(WHOLE_NUMBERS, st.data())
def test_two_halves_make_the_whole(x: np.ndarray, data: st.DataObject) -> None:
    strata = strata_like(x)
    cut = data.draw(st.integers(1, x.shape[0] - 1))
    halves = [updated(x[:cut], strata[:, :cut]), updated(x[cut:], strata[:, cut:])]
    whole = updated(x, strata)
    assert_same_states(EVERYTHING.merge(*halves), whole)
    in_turn = EVERYTHING.update(halves[0], ActivationObservation(x[cut:], strata[:, cut:]))
    assert_same_states(in_turn, whole)


@settings(max_examples=40)
@given(WHOLE_NUMBERS)
def test_merge_is_commutative_and_associative_and_keeps_its_arguments(x: np.ndarray) -> None:
    strata = strata_like(x)
    a, b, c = (updated(part, strata) for part in (x, x[::-1].copy(), 3 * x))
    before = {key: np.copy(value) for key, value in a.items()}
    assert_same_states(EVERYTHING.merge(a, b), EVERYTHING.merge(b, a), rtol=0)
    left = EVERYTHING.merge(EVERYTHING.merge(a, b), c)
    assert_same_states(left, EVERYTHING.merge(a, EVERYTHING.merge(b, c)), rtol=1e-14)
    assert_same_states(EVERYTHING.merge(empty(x), a), a, rtol=0)
    assert_same_states(a, before, rtol=0)


@given(WHOLE_NUMBERS, st.integers(-20, 20))
def test_scaling_leaves_kurtoses_and_ratios_unchanged(x: np.ndarray, power: int) -> None:
    strata = strata_like(x)
    first = values(x, strata, *SCALE_FREE)
    second = values(x * np.float32(2.0**power), strata, *SCALE_FREE)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6, atol=1e-9, err_msg=name)


@given(WHOLE_NUMBERS, st.randoms(use_true_random=False))
def test_the_order_of_channels_does_not_matter(x: np.ndarray, random: Any) -> None:
    strata = strata_like(x)
    order = list(range(x.shape[-1]))
    random.shuffle(order)
    first, second = values(x, strata), values(x[..., order], strata)
    outputs = EVERYTHING.finalise(state_of(updated(x, strata)), layout_of(x))
    for name, output in outputs.items():
        if name.startswith("rotated"):
            continue
        if "quantile" in name or name == "effective_bits":  # a value at a bin's edge may cross it
            continue
        if name == "residual_sink_channel":  # of channels that are equally large, the last
            continue
        expected = first[name][..., order] if output.dims[-1:] == ("channel",) else first[name]
        np.testing.assert_allclose(second[name], expected, rtol=2e-5, atol=1e-5, err_msg=name)


@given(WHOLE_NUMBERS)
def test_bounds(x: np.ndarray) -> None:
    d = x.shape[-1]
    found = values(x, strata_like(x))
    bounds = {
        "osp_excess_kurtosis": (0, np.inf),
        "fisher_kurtosis": (-2, max(0.0, d - 5 + 1 / (d - 1))),
        "neuron_kurtosis": (1, d),
        "participation_ratio": (1, d),
        "channel_share": (0, 1),
        "channel_gini": (0, 1 - 1 / d),
        "channel_entropy": (0, 1),
        "channel_max_to_mean": (1, d),
        "max_median_ratio": (1, np.inf),
        "six_sigma_fraction": (0, 1 / 36),
    }
    for name, (low, high) in bounds.items():
        known = found[name][~np.isnan(found[name])]
        assert ((known >= low - 1e-5) & (known <= high + 1e-5 * d)).all(), name


def test_finalise_takes_any_leading_axes_and_keeps_float64() -> None:
    cases = [inputs()[name] for name in ("normal", "student", "planted", "zero")]
    states = [state_of(updated(x, strata_like(x))) for x in cases]
    stacked = {
        key: np.stack([s[key] for s in states]).reshape(2, 2, *states[0][key].shape) for key in states[0]
    }
    layout = layout_of(cases[0])
    together = EVERYTHING.finalise(stacked, layout)
    for number, state in enumerate(states):
        for name, output in EVERYTHING.finalise(state, layout).items():
            assert together[name].dims == output.dims
            found = together[name].values[divmod(number, 2)]
            np.testing.assert_allclose(found, output.values, rtol=1e-12, atol=1e-12, err_msg=name)
            assert together[name].values.dtype == np.float64, name


def test_a_mean_does_not_lose_float64() -> None:
    suite = Suite([OspExcessKurtosis()])
    layout = Layout(channels=8)
    state = suite.init(layout, np.zeros(1))
    state["token.count"][:] = 1.0
    state["osp_token_kurtosis.total"][:] = 1.0 + 1e-12
    assert suite.finalise(state, layout)["osp_excess_kurtosis"].values[0] == 1.0 + 1e-12


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_states_have_the_declared_shapes_on_the_backend(backend: str) -> None:
    x = inputs()["normal"]
    increments = runner(EVERYTHING, backend)(x, strata_like(x))
    like = next(iter(increments.values()))
    state = EVERYTHING.init(layout_of(x), like)
    assert {key: tuple(v.shape) for key, v in state.items()} == {
        k: tuple(v.shape) for k, v in increments.items()
    }
    merged = merge_states(EVERYTHING.fields(layout_of(x)), state, increments)
    assert all(namespace_of(value) is namespace_of(like) for value in merged.values())
    if backend != "jax":
        assert all(value.dtype == state["token.count"].dtype for value in merged.values())
        assert "float64" in str(state["token.count"].dtype)


def test_each_reduction_is_taken_once() -> None:
    calls: list[str] = []

    def counting(name: str, function: Any) -> Any:
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    reductions = type(GENERIC)(**{k: counting(k, f) for k, f in GENERIC._asdict().items()})
    x = inputs()["normal"]
    chosen = [e for e in EVERYTHING.estimators if not e.optional]
    measure(Suite(chosen), x, strata_like(x), reductions=reductions)
    assert sorted(set(calls)) == sorted(GENERIC._asdict())
    assert calls.count("exceedances") == 3, "6, 6σ and massive: one threshold each"
    for name in ("row_moments", "row_median", "sequence_median", "channel_sums"):
        assert calls.count(name) == 1


def test_observing_changes_no_input() -> None:
    x = inputs()["planted"]
    tensor = torch.as_tensor(x.copy())
    measure(EVERYTHING, tensor, torch.as_tensor(strata_like(x)))
    assert np.array_equal(tensor.numpy(), x)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(
        EstimatorError, match=r"must be \(batch, token, channel\).*got \(4, 8\) and \(4, 4, 8\)"
    ):
        ActivationObservation(np.zeros((4, 8), np.float32), np.zeros((4, 4, 8), np.float32))
    with pytest.raises(EstimatorError, match=r"strata \(4, batch, token\); got \(1, 2, 8\) and \(3, 1, 2\)"):
        ActivationObservation(np.zeros((1, 2, 8), np.float32), np.zeros((3, 1, 2), np.float32))
    with pytest.raises(EstimatorError, match="none of them 0"):
        ActivationObservation(np.zeros((1, 0, 8), np.float32), np.zeros((4, 1, 0), np.float32))


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(EstimatorError, match=r"quantiles must be .* in \(0, 1\]; got \[1.5\]"):
        FisherKurtosis(quantiles=(0.5, 1.5))
    with pytest.raises(EstimatorError, match="threshold must be positive; got 0"):
        OutlierFeatures(threshold=0)
    with pytest.raises(EstimatorError, match="threshold must be positive"):
        TweoPenalty(threshold=-1)
    with pytest.raises(EstimatorError, match="ranks must be at least 1; got 0"):
        TopMagnitude(ranks=0)
    with pytest.raises(EstimatorError, match="tops must be positive"):
        ChannelConcentration(tops=(0, 1))
    with pytest.raises(EstimatorError, match="two different measurements are named 'large_channel'"):
        Suite([OutlierFeatures(), OutlierFeatures(threshold=10.0)])


def test_llm_int8_rule() -> None:
    fraction = np.zeros((8, 5))
    fraction[:2, 0] = 0.24  # a quarter of the layers, 6% of the positions
    fraction[:2, 1] = 0.23  # too few positions
    fraction[:1, 2] = 1.0  # too few layers
    fraction[:, 3] = 0.06
    assert outlier_features(fraction).tolist() == [True, False, False, True, False]
    assert outlier_features(np.stack([fraction, 0 * fraction])).shape == (2, 5)
    with pytest.raises(EstimatorError, match=r"layers is a share and must be between 0 and 1; got 25"):
        outlier_features(fraction, layers=25)


def test_overlap_of_the_hottest_channels() -> None:
    first = np.array([[5.0, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]])
    second = np.array([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])
    np.testing.assert_allclose(top_channel_overlap(first, second, top=4), [1.0, 2 / 6])
    with pytest.raises(EstimatorError, match="top must be between 1 and the 6 channels; got 7"):
        top_channel_overlap(first, second, top=7)
