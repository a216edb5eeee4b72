"""What must not change the numbers of the attention site: tiles, cuts, order, padding; and what they mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, softmax

from osp_diag.errors import EstimatorError
from osp_diag.estimators import logits as logit_estimators
from osp_diag.estimators import sinks
from osp_diag.estimators.attention import AttentionMask, AttentionObservation
from osp_diag.estimators.attention_tiles import LogitGrid
from osp_diag.estimators.base import Suite
from tests.attention_cases import ATTENTION, CASES, assert_same, finalised, observe, run
from tests.dense_attention import dense_logits, dense_outputs, make_case, sub_batch


@pytest.mark.parametrize("tile", [1, 5, 22, 23, 500])
@pytest.mark.parametrize("name", ["causal", "window, left padding", "bidirectional", "learned sinks"])
def test_tile_size_does_not_matter(name: str, tile: int) -> None:
    expected = run(CASES[name])
    assert_same(run(CASES[name], tile=tile), expected, rtol=1e-5)


def test_sampled_queries_are_evenly_spaced_and_the_rest_is_exact() -> None:
    case = CASES["causal"]
    found = run(case, query_sample=5)
    exact = dense_outputs(case)
    logits, allowed = dense_logits(case)
    rows = [((2 * i + 1) * 23) // 10 for i in range(5)]
    assert rows == [2, 6, 11, 16, 20]
    mean = np.where(allowed, logits, 0).sum(axis=-1) / allowed.sum(axis=-1)
    exact["delta_logit"] = (logits[..., 0] - mean)[:, :, rows].mean(axis=(0, 2))
    weights = softmax(np.where(allowed, logits, -np.inf), axis=-1)
    exact["attention_entropy"] = entr(weights).sum(axis=-1)[:, :, rows].mean(axis=(0, 2))
    assert_same(found, exact)


@pytest.mark.parametrize("name", ["causal", "left padding", "learned sinks", "bidirectional"])
def test_halves_merge_to_the_whole(name: str) -> None:
    case = CASES[name]
    parts = [observe(sub_batch(case, slice(0, 1))), observe(sub_batch(case, slice(1, 3)))]
    states = [ATTENTION.measure(part) for part in parts]
    layout = parts[0].layout
    merged = finalised(ATTENTION.merge(*states), layout)
    whole = run(case)
    assert_same(merged, whole, rtol=1e-5, atol=1e-6)
    assert_same(finalised(ATTENTION.merge(*states[::-1]), layout), merged, rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)), cut=st.integers(1, 3))
def test_order_and_cuts_of_the_data_do_not_matter(seed: int, order: list[int], cut: int) -> None:
    case = make_case(seed, batch=4, tokens=11, left=(0, 2, 5, 1))
    whole = run(case)
    shuffled = sub_batch(case, np.asarray(order))
    state = ATTENTION.init(observe(case).layout, case.query)
    for part in (slice(0, cut), slice(cut, 4)):
        state = ATTENTION.update(state, observe(sub_batch(shuffled, part)))
    found = finalised(state, observe(case).layout)
    assert_same(found, {k: v for k, v in whole.items() if k != "logit_density"}, rtol=1e-4, atol=1e-5)
    # An ulp may move a logit over the edge of a bin, no more.
    widths = np.diff(LogitGrid().edges)
    moved = np.abs(found["logit_density"] - whole["logit_density"]) * widths
    assert moved.sum(axis=-1).max() < 0.1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.integers(0, 6))
def test_left_padding_changes_nothing(seed: int, shift: int) -> None:
    short = make_case(seed, batch=2, tokens=9)
    pad = [(0, 0), (0, 0), (shift, 0), (0, 0)]
    padded = replace(
        short,
        query=np.pad(short.query, pad, constant_values=3.0),
        key=np.pad(short.key, pad, constant_values=-2.0),
        value=np.pad(short.value, pad, constant_values=9.0),
        strata=np.pad(short.strata, [(0, 0), (0, 0), (shift, 0)]),
        keys=np.pad(np.ones((2, 9), dtype=bool), [(0, 0), (shift, 0)]),
    )
    found, expected = run(padded), run(short)
    found["key_mass"] = found["key_mass"][:, :9]
    assert_same(found, expected, rtol=1e-5, atol=1e-5)


def test_leading_axes_are_kept_by_finalise() -> None:
    cases = [make_case(seed) for seed in range(6)]
    states = [
        ATTENTION.merge(ATTENTION.init(observe(c).layout, c.query), ATTENTION.measure(observe(c)))
        for c in cases
    ]
    stacked = {
        key: np.stack([s[key] for s in states]).reshape(2, 3, *np.shape(states[0][key])) for key in states[0]
    }
    layout = observe(cases[0]).layout
    found = ATTENTION.finalise(stacked, layout)
    for n, state in enumerate(states):
        for name, values in finalised(state, layout).items():
            part = found[name].values[n // 3, n % 3]
            assert part.ndim == len(found[name].dims)
            np.testing.assert_allclose(part, values, rtol=1e-12, err_msg=name)


def test_dimensions_and_coordinates_fit() -> None:
    case = CASES["causal"]
    observation = observe(case)
    state = ATTENTION.merge(ATTENTION.init(observation.layout, case.query), ATTENTION.measure(observation))
    for name, output in ATTENTION.finalise(state, observation.layout).items():
        sizes = [
            len(output.coords[d]) if d in output.coords else observation.layout.size(d) for d in output.dims
        ]
        assert list(np.shape(output.values)) == sizes, name
        assert output.definition, name


def test_histogram_counts_the_logits_by_class_of_key() -> None:
    case = make_case(31, batch=4, tokens=64, size=3.0)
    found = run(case)
    logits, allowed = dense_logits(case)
    grid = LogitGrid()
    sink = np.zeros(64, dtype=bool)
    sink[0] = True
    for c, keys in enumerate((sink, ~sink)):
        for h in range(4):
            values = logits[:, h, :, keys].transpose(1, 2, 0)[allowed[:, h][:, :, keys]]
            counts, _ = np.histogram(values, grid.edges)
            share = found["logit_density"][h, c] * np.diff(grid.edges)
            assert share.sum() == pytest.approx(1)
            assert np.abs(share - counts / counts.sum()).sum() < 2e-3
            exact = np.quantile(values, logit_estimators.QUANTILES)
            away = np.arcsinh(found["logit_quantile"][h, c]) - np.arcsinh(exact)
            assert np.abs(away).max() < 0.12, (c, h)


def test_logits_beyond_the_bins_fall_into_the_outer_ones() -> None:
    logits = np.full((1, 1, 4, 4), 5e4, np.float32)
    logits[..., 2:, :] = -5e4  # of whole queries: so far below its row's largest, an entry is a fill
    strata = np.zeros((4, 1, 4), np.float32)
    strata[0], strata[3, :, 1:], strata[1, :, 0] = 1, 1, 1
    observation = AttentionObservation.from_logits(logits, None, strata, mask=AttentionMask(causal=False))
    found = finalised(ATTENTION.measure(observation), observation.layout)
    other = found["logit_density"][0, 1] * np.diff(LogitGrid().edges)
    assert other[0] == pytest.approx(1 / 2)
    assert other[-1] == pytest.approx(1 / 2)
    assert found["max_logit"][0] == 5e4


def test_ties_go_to_the_sink_key() -> None:
    case = make_case(1)
    flat = run(replace(case, query=case.query * 0))
    np.testing.assert_array_equal(flat["first_token_dominance"][:, 0], 1.0)
    harmonic = sum(1 / (i + 1) for i in range(23)) / 23
    np.testing.assert_allclose(flat["first_token_attention"][:, 0], harmonic, rtol=1e-6)
    np.testing.assert_array_equal(flat["sink_logit_channels_90"], 0)


def test_packed_documents_use_the_first_document_s_first_token() -> None:
    case = make_case(1)
    strata = case.strata.copy()
    strata[1, :, 10] = 1
    strata[2, :, 10] = strata[3, :, 10] = 0
    observation = observe(replace(case, strata=strata))
    assert observation.sink.tolist() == [0, 0, 0]


def test_parameters_of_the_sink_rate() -> None:
    case = CASES["causal"]
    suite = Suite([sinks.SinkRate(epsilons=(0.05,), sink_positions=(0, 30))])
    observation = observe(case)
    state = suite.merge(suite.init(observation.layout, case.query), suite.measure(observation))
    rate = suite.finalise(state, observation.layout)["sink_rate"]
    assert rate.values.shape == (4, 1, 2)
    assert np.isnan(rate.values[..., 1]).all()
    with pytest.raises(EstimatorError, match=r"epsilons .* must be shares between 0 and 1"):
        sinks.SinkRate(epsilons=(30,))
    with pytest.raises(EstimatorError, match="count from 0"):
        sinks.SinkRate(sink_positions=(-1,))
