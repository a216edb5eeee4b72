"""Every activation statistic against plain float64, on ordinary and on hostile inputs, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from activation_cases import (
    EVERYTHING,
    assert_matches,
    finalised,
    inputs,
    layout_of,
    measure,
    runner,
    state_of,
    strata_for,
)
from activation_oracle import Oracle, fisher, lower_median, oracles_of_test_files

from osp_diag.estimators import Suite, default_estimators, get_estimator

INPUTS = inputs()
NOT_IN_ORACLE = {
    "osp_excess_kurtosis_over_floor",
    "fisher_kurtosis_quantile",
    "rotated_pearson_kurtosis",
    "max_median_ratio_max",
    "max_median_ratio_quantile",
    "max_median_ratio_undefined_count",
    "centred_max_median_ratio_max",
    "centred_max_median_ratio_quantile",
    "centred_max_median_ratio_undefined_count",
    "nonfinite_token_count",
    "nonfinite_first_token",
    "nonfinite_first_channel",
    "gradient_nonfinite_count",
    "residual_sink_channel",
    "effective_bits",
}
"""Checked by tests of their own."""

NOT_OF_FIRST = {"secondary_sink_fraction", "first_token_cosine"}
"""What compares other tokens with the first one."""


def strata_of(x: np.ndarray, padding: bool = True) -> np.ndarray:
    return strata_for(*x.shape[:2], padding=padding)


def test_the_oracle_covers_every_output() -> None:
    x = INPUTS["normal"]
    outputs = finalised(x, strata_of(x))
    expected = set(Oracle(x, strata_of(x)).expected())
    missing = set(outputs) - NOT_IN_ORACLE - expected
    assert not missing, f"let a test file in this folder give them: def expected(oracle) -> {sorted(missing)}"
    assert not expected - set(outputs)


def test_a_test_file_says_what_its_statistic_should_be(tmp_path) -> None:
    text = "\ndef expected(oracle):\n    return {'width': oracle.over_tokens(len)}\n"
    (tmp_path / "test_of_the_width.py").write_text(text)
    (tmp_path / "test_of_nothing.py").write_text("raise AssertionError('imported')\n")
    (expected,) = oracles_of_test_files(tmp_path)
    x = INPUTS["normal"]
    np.testing.assert_array_equal(expected(Oracle(x, strata_of(x)))["width"], [x.shape[-1]] * 4)


@pytest.mark.parametrize("padding", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_equals_float64(name: str, backend: str, padding: bool) -> None:
    x = INPUTS[name]
    strata = strata_of(x, padding)
    assert_matches(finalised(x, strata, backend=backend), Oracle(x, strata).expected())


@pytest.fixture(scope="module")
def jitted():
    return runner(EVERYTHING, "jax")


JAX_RANGE = [name for name in INPUTS if name not in ("huge", "tiny")]


@pytest.mark.parametrize("name", JAX_RANGE)
def test_jax_equals_float64(name: str, jitted) -> None:
    x = INPUTS[name]
    strata = strata_of(x)
    outputs = EVERYTHING.finalise(state_of(jitted(x, strata)), layout_of(x))
    assert_matches(outputs, Oracle(x, strata).expected())


@pytest.mark.parametrize("name", ["huge", "tiny"])
def test_jax_beyond_the_range_of_float32_is_never_nan(name: str, jitted) -> None:
    x = INPUTS[name]
    strata = strata_of(x)
    outputs = EVERYTHING.finalise(state_of(jitted(x, strata)), layout_of(x))
    expected = Oracle(x, strata).expected()
    scale_free = ("osp_excess_kurtosis", "fisher_kurtosis", "max_median_ratio", "channel_absolute_maximum")
    assert_matches(outputs, {key: expected[key] for key in scale_free})
    assert not [key for key, state in state_of(jitted(x, strata)).items() if np.isnan(state).any()]


@pytest.mark.parametrize("name", ["normal", "planted", "zero", "sparse"])
def test_strict_array_api_equals_float64(name: str) -> None:
    x = INPUTS[name]
    strata = strata_of(x)
    assert_matches(finalised(x, strata, backend="strict"), Oracle(x, strata).expected())


@pytest.fixture(scope="module")
def compiled_without_medians():
    names = ("osp_excess_kurtosis", "fisher_kurtosis", "pooled_kurtosis", "nonfinite", "token_scale")
    suite = Suite([get_estimator(name) for name in names])
    return suite, runner(suite, "torch-compiled")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planted", "constant"])
def test_compiled_torch_equals_float64(name: str, compiled_without_medians) -> None:
    suite, run = compiled_without_medians
    x = INPUTS[name]
    strata = strata_of(x)
    outputs = suite.finalise(state_of(run(x, strata)), layout_of(x))
    expected = Oracle(x, strata).expected()
    assert_matches(outputs, {key: expected[key] for key in outputs if key in expected})


@pytest.mark.slow
def test_everything_compiles_into_one_graph() -> None:
    EVERYTHING.init(layout_of(INPUTS["planted"]), torch.zeros(1))  # a state comes first, as in any use
    run = runner(EVERYTHING, "torch-compiled-eagerly", significant_bits=31)
    for name in ("planted", "student", "huge", "zero"):
        x = INPUTS[name]
        strata = strata_of(x)
        outputs = EVERYTHING.finalise(state_of(run(x, strata)), layout_of(x))
        assert_matches(outputs, Oracle(x, strata).expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    x = torch.as_tensor(INPUTS["planted"] / 2).to(dtype)
    strata = strata_of(INPUTS["planted"])
    state = measure(EVERYTHING, x, torch.as_tensor(strata))
    outputs = EVERYTHING.finalise(state_of(state), layout_of(INPUTS["planted"]))
    assert_matches(outputs, Oracle(x.double().numpy(), strata).expected())


def test_autocast_changes_nothing() -> None:
    x, strata = (torch.as_tensor(a) for a in (INPUTS["student"], strata_of(INPUTS["student"])))
    plain = measure(EVERYTHING, x, strata)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = measure(EVERYTHING, x, strata)
    assert all(torch.equal(plain[key], under_autocast[key]) for key in plain)


@pytest.mark.parametrize("name", ["student", "planted", "normal"])
def test_quantiles_are_within_a_bin(name: str) -> None:
    x = INPUTS[name]
    strata = strata_of(x)
    outputs, oracle = finalised(x, strata), Oracle(x, strata)
    found = outputs["fisher_kurtosis_quantile"].values
    np.testing.assert_allclose(found + 3, oracle.quantiles(fisher) + 3, rtol=0.022)
    found = outputs["max_median_ratio_quantile"].values
    exact = oracle.quantiles(lambda token: np.abs(token).max() / lower_median(np.abs(token)))
    np.testing.assert_allclose(found, exact, rtol=0.022)


def test_tokens_with_a_zero_median_are_left_out_and_counted() -> None:
    x, strata = INPUTS["sparse"], strata_of(INPUTS["sparse"])
    undefined = Oracle(x, strata).over_tokens(lambda token: float(lower_median(np.abs(token)) == 0))
    outputs = finalised(x, strata)
    count = outputs["max_median_ratio_undefined_count"].values
    np.testing.assert_allclose(count, undefined * outputs["token_count"].values)
    assert count[0] > 0


def test_the_rotated_control_removes_the_basis() -> None:
    x, strata = INPUTS["planted"], strata_of(INPUTS["planted"])
    outputs = finalised(x, strata)
    assert outputs["pearson_kurtosis"].values[0] > 10
    assert outputs["rotated_pearson_kurtosis"].values[0] == pytest.approx(3.0, abs=0.3)
    again = finalised(x, strata, default_estimators(observes="activation", optional=True))
    assert np.array_equal(
        again["rotated_pearson_kurtosis"].values, outputs["rotated_pearson_kurtosis"].values
    )


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_nonfinite_tokens_are_excluded_and_located(backend: str) -> None:
    x = INPUTS["planted"].copy()
    strata = strata_of(x)
    x[2, 9, 40], x[2, 9, 11], x[0, 20, 5], x[1, -1, 0] = np.nan, np.inf, -np.inf, np.nan
    assert strata[0, 1, -1] == 0, "a NaN in padding is nobody's business"
    outputs = finalised(x, strata, backend=backend)
    assert_matches(outputs, Oracle(x, strata).expected())
    bad = (strata * ~np.isfinite(x).all(-1)).sum((1, 2))
    np.testing.assert_array_equal(outputs["nonfinite_token_count"].values, bad)
    assert outputs["nonfinite_first_token"].values == 9
    assert outputs["nonfinite_first_channel"].values == 11


def test_a_finite_tensor_has_no_nonfinite_place() -> None:
    x = INPUTS["normal"]
    outputs = finalised(x, strata_of(x))
    assert np.isnan(outputs["nonfinite_first_token"].values)
    assert not outputs["nonfinite_token_count"].values.any()


def test_a_stratum_without_tokens_is_nan_and_the_others_are_not() -> None:
    x = INPUTS["normal"]
    strata = strata_of(x)
    strata[3] += strata[2]
    strata[2] = 0
    for name, output in finalised(x, strata).items():
        if output.dims[:1] == ("stratum",) and "count" not in name:
            assert np.isnan(output.values[2]).all(), name
            others = [0, 3] if name in NOT_OF_FIRST else [0, 1, 3]
            assert not np.isnan(output.values[others]).any(), name
