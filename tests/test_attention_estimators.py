from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from dense_attention import Case, dense_logits, dense_outputs, make_case, sub_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_diag.errors import EstimatorError
from osp_diag.estimators import logits as logit_estimators
from osp_diag.estimators import query_key, sink_implementation, sinks, value_drain
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.attention import AttentionMask, AttentionObservation
from osp_diag.estimators.attention_tiles import LogitGrid
from osp_diag.estimators.base import Estimator, Suite
from osp_diag.estimators.query_key import HeadChannelNorm, HeadsObservation, MassiveValues

MODULES = (sinks, value_drain, logit_estimators, sink_implementation, query_key)
ESTIMATORS = tuple(
    found
    for module in MODULES
    for found in (getattr(module, name) for name in module.__all__)
    if isinstance(found, type) and issubclass(found, Estimator)
)
ATTENTION = Suite([e() for e in ESTIMATORS if e.observes == "attention"])
namespace_of(torch.zeros(1))  # a compiled function has to find the namespace already there
BACKENDS = ("numpy", "torch", "jax", "torch-compiled")
NOT_DENSE = {"logit_density", "logit_quantile", "nonfinite_query_key_tokens"}


def observe(case: Case, to: Callable[[Any], Any] = np.asarray, **options: Any) -> AttentionObservation:
    tensor = case.additive if case.additive is not None else case.allowed
    mask = AttentionMask(
        causal=case.causal,
        window=case.window,
        tensor=None if tensor is None else to(tensor),
        keys=None if case.keys is None else to(case.keys),
        function=case.function,
    )
    sink_logits = None if case.sink_logits is None else to(case.sink_logits)
    arrays = [to(a) for a in (case.query, case.key, case.value, case.strata)]
    settings = {"query_sample": None, "tile": 12, "mask": mask, "softcap": case.softcap, "scale": case.scale}
    return AttentionObservation(*arrays, **settings | {"sink_logits": sink_logits} | options)


def finalised(state: Any, layout: Any, suite: Suite = ATTENTION) -> dict[str, np.ndarray]:
    return {name: np.asarray(output.values) for name, output in suite.finalise(state, layout).items()}


def run(case: Case, backend: str = "numpy", **options: Any) -> dict[str, np.ndarray]:
    """Every output of the attention site on one backend."""
    to = {"numpy": np.asarray, "jax": jnp.asarray}.get(backend, torch.as_tensor)
    tensors = {
        name: to(part)
        for name in ("query", "key", "value", "strata", "additive", "allowed", "keys", "sink_logits")
        if (part := getattr(case, name)) is not None
    }

    def increments(inputs: dict[str, Any]) -> dict[str, Any]:
        return ATTENTION.measure(observe(replace(case, **inputs), lambda array: array, **options))

    if backend == "jax":
        increments = jax.jit(increments)
    elif backend == "torch-compiled":
        torch.compiler.reset()
        increments = torch.compile(increments, fullgraph=True, backend="aot_eager")
    layout = observe(case, **options).layout
    added = increments(tensors)
    state = ATTENTION.merge(ATTENTION.init(layout, tensors["query"]), added)
    return finalised(state, layout)


def assert_same(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 2e-5, atol: float = 2e-6
) -> None:
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=rtol, atol=atol, err_msg=name)


def alibi(heads: int, tokens: int) -> np.ndarray:
    slopes = 2.0 ** -np.arange(1, heads + 1)
    distance = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    return (slopes[:, None, None] * distance)[None].astype(np.float32)


def causal_fill(tokens: int, dtype: Any = np.float32) -> np.ndarray:
    hidden = np.triu(np.ones((tokens, tokens), dtype=bool), 1)
    return np.where(hidden, np.finfo(dtype).min, 0.0).astype(dtype)[None, None]


RNG = np.random.default_rng(7)
CASES = {
    "causal": make_case(1),
    "one head, no sharing": make_case(2, heads=1, groups=1),
    "no sharing": make_case(3, groups=4),
    "left padding": make_case(4, left=(5, 0, 11)),
    "right padding": make_case(5, right=(0, 9, 22)),
    "right padding, not masked": replace(make_case(5, right=(0, 9, 3)), keys=None),
    "a sequence of padding": make_case(6, left=(0, 23, 2)),
    "window": make_case(7, window=6),
    "window of 1": make_case(8, window=1),
    "window, left padding": make_case(9, window=5, left=(3, 0, 8)),
    "soft cap": make_case(10, softcap=2.0, size=2.0),
    "learned sinks": make_case(11, sink_logits=np.array([0.0, 3.0, -2.0, 8.0], np.float32)),
    "softmax off by one": make_case(12, sink_logits=np.zeros(4, np.float32), right=(3, 0, 1)),
    "ALiBi": make_case(13, additive=alibi(4, 23)),
    "ALiBi, soft cap, sinks": make_case(
        14, additive=alibi(4, 23), softcap=3.0, sink_logits=np.ones(4, np.float32), left=(2, 1, 0)
    ),
    "bidirectional": make_case(15, causal=False),
    "bidirectional, padding": make_case(16, causal=False, left=(4, 0, 0), right=(0, 7, 2)),
    "bool tensor": make_case(17, allowed=RNG.random((3, 1, 23, 23)) < 0.6),
    "bool tensor by key": make_case(18, allowed=RNG.random((3, 1, 1, 23)) < 0.8),
    "additive fill": make_case(19, additive=causal_fill(23)),
    "additive fill, float16": make_case(20, additive=causal_fill(23, np.float16)),
    "two dimensions": make_case(21, additive=causal_fill(23)[0, 0]),
    "function": make_case(22, function=lambda b, h, q, k: (q // 7 == k // 7) | (h == 1)),
    "one token": make_case(23, tokens=1),
    "two tokens": make_case(24, tokens=2),
    "exactly one tile": make_case(25, tokens=12),
}


def described(name: str) -> Case:
    case = CASES[name]
    if case.additive is not None and case.additive.ndim == 2:
        return replace(case, additive=case.additive[None, None])
    return case


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_every_output_equals_dense_attention(name: str, backend: str) -> None:
    with np.errstate(all="ignore"):
        expected = dense_outputs(described(name))
    found = run(CASES[name], backend)
    assert set(found) == set(expected) | NOT_DENSE
    assert_same(found, expected)


@pytest.mark.parametrize("backend", ["jax", "torch-compiled"])
@pytest.mark.parametrize(
    "name", ["ALiBi, soft cap, sinks", "window, left padding", "function", "bidirectional"]
)
def test_traced_equals_numpy(name: str, backend: str) -> None:
    expected = run(CASES[name], query_sample=5)
    found = run(CASES[name], backend, query_sample=5)
    assert_same(found, {k: v for k, v in expected.items() if k not in ("logit_density", "logit_quantile")})
    widths = np.diff(LogitGrid().edges)
    for k in (0, 1):
        assert (
            np.abs((found["logit_density"] - expected["logit_density"])[:, k] * widths).sum(axis=-1).max()
            < 0.1
        )


@pytest.mark.slow
def test_compiled_by_inductor_equals_numpy() -> None:
    case = CASES["ALiBi, soft cap, sinks"]
    expected = run(case, query_sample=5)
    inputs = [torch.as_tensor(a) for a in (case.query, case.key, case.value, case.strata)]
    bias, keys, sink_logits = (torch.as_tensor(a) for a in (case.additive, case.keys, case.sink_logits))

    @functools.partial(torch.compile, fullgraph=True)
    def increments(*arrays: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = AttentionMask(tensor=bias, keys=keys)
        options: dict[str, Any] = {"softcap": case.softcap, "sink_logits": sink_logits, "query_sample": 5}
        return ATTENTION.measure(
            AttentionObservation(*arrays, scale=case.scale, mask=mask, tile=12, **options)
        )

    layout = observe(case).layout
    state = ATTENTION.merge(ATTENTION.init(layout, inputs[0]), increments(*inputs))
    found = finalised(state, layout)
    assert_same(found, {k: v for k, v in expected.items() if k not in ("logit_density", "logit_quantile")})


@pytest.mark.parametrize("name", ["causal", "left padding", "window", "bidirectional", "bool tensor"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_logits_that_the_model_made(name: str, dtype: Any) -> None:
    case = CASES[name]
    dense, allowed = dense_logits(case)
    fill = np.finfo(dtype).min if dtype == np.float16 else -np.inf
    given_logits = np.where(allowed, dense, fill).astype(dtype)
    expected = dense_outputs(case, given_logits.astype(np.float64), allowed)
    observation = AttentionObservation.from_logits(
        given_logits,
        case.value,
        case.strata,
        mask=AttentionMask(causal=case.causal),
        query_sample=None,
        tile=12,
    )
    found = finalised(ATTENTION.measure(observation), observation.layout)
    unknown = {
        "sink_logit_contribution",
        "sink_logit_channels_90",
        "query_key_channel_overlap",
        "sink_cosine",
        "query_norm",
        "sink_key_norm",
        "other_key_norm",
    }
    assert all(np.isnan(found[k]).all() for k in unknown)
    assert_same(found, {k: v for k, v in expected.items() if k not in unknown})


def test_learned_sinks_as_extra_columns() -> None:
    case = make_case(3, sink_logits=np.array([1.0, -1.0, 0.5, 4.0], np.float32))
    dense, allowed = dense_logits(case)
    column = np.broadcast_to(case.sink_logits[None, :, None, None], (*dense.shape[:3], 1))
    logits = np.concatenate([np.where(allowed, dense, -np.inf), column], axis=-1).astype(np.float32)
    observation = AttentionObservation.from_logits(
        logits, None, case.strata, extra_columns=1, query_sample=None, tile=12
    )
    found = finalised(ATTENTION.measure(observation), observation.layout)
    expected = dense_outputs(case)
    for name in ("extra_sink_mass", "key_mass_share", "first_token_attention", "key_mass", "sink_rate"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
    total = found["key_mass_share"][:, 0] + found["extra_sink_mass"]
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
    assert np.isnan(found["value_drain"]).all()


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_huge_logits(backend: str) -> None:
    case = make_case(5, size=5000.0)
    logits, _ = dense_logits(case)
    assert np.abs(logits).max() > 1e4
    assert_same(run(case, backend), dense_outputs(case), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    case = make_case(6, size=200.0 if dtype == torch.float16 else 1.5)
    half = {n: torch.as_tensor(getattr(case, n)).to(dtype) for n in ("query", "key", "value")}
    rounded = replace(case, **{n: a.float().numpy() for n, a in half.items()})
    observation = observe(replace(case, **half), lambda a: a if torch.is_tensor(a) else torch.as_tensor(a))
    found = finalised(ATTENTION.measure(observation), observation.layout)
    expected = dense_outputs(rounded)
    if dtype == torch.bfloat16:
        return assert_same(found, expected)
    del expected["sink_rate"]  # saturated: α is exactly 2/20 and the like, on either side of ε
    return assert_same(found, expected, rtol=2e-3, atol=2e-4)


def test_bfloat16_mask_fill_counts_as_not_allowed() -> None:
    case = CASES["additive fill"]
    bias = torch.as_tensor(causal_fill(23)).to(torch.bfloat16).clamp(min=torch.finfo(torch.bfloat16).min)
    mask = AttentionMask(causal=False, tensor=bias)
    arrays = [torch.as_tensor(a) for a in (case.query, case.key, case.value, case.strata)]
    observation = AttentionObservation(*arrays, scale=case.scale, mask=mask, query_sample=None)
    _, allowed = dense_logits(case)
    softmax = observation.softmax
    np.testing.assert_allclose(softmax.key_mass.sum(dim=-1), allowed.shape[-1], rtol=1e-5)
    assert softmax.key_mass[..., -1].max() < 1  # only the last query sees the last key


def test_autocast_does_not_lower_the_products() -> None:
    case = CASES["causal"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, "torch")
    assert_same(found, dense_outputs(case))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_non_finite_tokens_are_left_out_and_counted(bad: float, where: str) -> None:
    case = make_case(8, right=(4, 0, 0))
    spoiled = {name: getattr(case, name).copy() for name in ("query", "key")}
    spoiled[where][0, 0, 5, 2] = bad
    spoiled[where][1, 0, 20, :] = bad
    spoiled[where][0, 0, 22, 0] = bad  # padding: not counted
    found = run(replace(case, **spoiled))
    strata, keys = case.strata.copy(), case.keys.copy()
    for b, t in ((0, 5), (1, 20)):
        strata[:, b, t], keys[b, t] = 0, False
    assert found["nonfinite_query_key_tokens"] == 2
    assert_same(found, dense_outputs(replace(case, strata=strata, keys=keys)))


def test_a_non_finite_sink_key_takes_its_sequence_with_it() -> None:
    case = make_case(8)
    key = case.key.copy()
    key[1, :, 0] = np.nan
    found = run(replace(case, key=key))
    assert found["nonfinite_query_key_tokens"] == 1
    whole = sub_batch(case, slice(0, 3, 2))
    assert_same(found, dense_outputs(whole))


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_non_finite_logits_are_left_out_by_head(backend: str) -> None:
    case = CASES["causal"]
    dense, allowed = dense_logits(case)
    logits = np.where(allowed, dense, -np.inf).astype(np.float32)
    logits[0, 1, 9, 3] = np.nan
    logits[0, 2, 9, 3] = np.inf
    logits[2, 0, 12, 0] = np.nan
    to = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}[backend]

    def increments(*arrays: Any) -> dict[str, Any]:
        return ATTENTION.measure(AttentionObservation.from_logits(*arrays, query_sample=None, tile=23))

    layout = AttentionObservation.from_logits(logits, case.value, case.strata).layout
    if backend == "jax":
        increments = jax.jit(increments)
    found = finalised(increments(to(logits), to(case.value), to(case.strata)), layout)
    assert found["nonfinite_query_key_tokens"] == 2
    for b, h, i in ((0, 1, 9), (0, 2, 9), (2, 0, 12)):
        allowed[b, h, i] = False
    expected = dense_outputs(case, dense, allowed)
    for name in ("first_token_attention", "key_mass", "key_mass_share", "max_logit", "delta_logit"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_non_finite_values_do_not_reach_the_norms() -> None:
    case = make_case(9)
    value = case.value.copy()
    value[0, 1, 7, 0] = np.inf
    found = run(replace(case, value=value))
    strata = case.strata.copy()
    strata[:, 0, 7] = 0
    expected = dense_outputs(replace(case, strata=strata))
    for name in ("value_norm", "value_drain"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


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
    logits[..., 2] = -5e4
    strata = np.zeros((4, 1, 4), np.float32)
    strata[0], strata[3, :, 1:], strata[1, :, 0] = 1, 1, 1
    observation = AttentionObservation.from_logits(logits, None, strata, mask=AttentionMask(causal=False))
    found = finalised(ATTENTION.measure(observation), observation.layout)
    other = found["logit_density"][0, 1] * np.diff(LogitGrid().edges)
    assert other[0] == pytest.approx(1 / 3)
    assert other[-1] == pytest.approx(2 / 3)
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


@pytest.mark.parametrize("sample", [None, 64])
def test_no_array_has_the_size_of_attention(sample: int | None) -> None:
    tokens, tile = 512, 64
    case = make_case(
        1, batch=1, heads=1, groups=1, tokens=tokens, channels=4, additive=alibi(1, tokens)[..., :1]
    )

    def increments(*arrays: Any) -> dict[str, Any]:
        mask = AttentionMask(tensor=arrays[4])
        options: dict[str, Any] = {"query_sample": sample, "tile": tile}
        observation = AttentionObservation(*arrays[:4], scale=0.5, mask=mask, **options)
        return ATTENTION.measure(observation)

    inputs = (case.query, case.key, case.value, case.strata, np.zeros((1, 1, 1, tokens), np.float32))
    largest = 0
    pending = [jax.make_jaxpr(increments)(*inputs).jaxpr]
    while pending:
        jaxpr = pending.pop()
        for equation in jaxpr.eqns:
            largest = max(largest, *(variable.aval.size for variable in equation.outvars))
            pending += [p.jaxpr for p in equation.params.values() if hasattr(p, "jaxpr")]
    assert tokens * tile <= largest
    assert largest <= 3 * tokens * tile, "scatter indices of a histogram are the largest thing allowed"
    assert largest < tokens * tokens


def bad_inputs() -> dict[str, tuple[Callable[[], Any], str]]:
    case = make_case(1)
    logits = np.zeros((3, 4, 23, 24), np.float32)
    return {
        "heads": (lambda: observe(replace(case, key=case.key[:, [0, 1, 1]])), "do not fit"),
        "strata": (
            lambda: observe(replace(case, strata=case.strata[:3])),
            "expected \\(stratum, batch, token\\)",
        ),
        "value": (lambda: observe(replace(case, value=case.value[:, :, :5])), "value has shape"),
        "mask shape": (lambda: observe(replace(case, additive=alibi(4, 30))), "does not broadcast"),
        "integer mask": (
            lambda: observe(replace(case, additive=np.ones((1, 1, 23, 23), np.int64))),
            "pass bool .* or a floating dtype",
        ),
        "keys": (lambda: observe(replace(case, keys=np.ones((3, 4)))), "the padding mask has shape"),
        "sinks": (lambda: observe(replace(case, sink_logits=np.ones(3, np.float32))), "one logit a head"),
        "tile": (lambda: observe(case, tile=0), "at least 1"),
        "sample": (lambda: observe(case, query_sample=0), "query_sample=None takes every query"),
        "window": (lambda: AttentionMask(window=0), "the attention window is 0"),
        "columns": (
            lambda: AttentionObservation.from_logits(logits, None, case.strata),
            "say how many learned sink columns come last",
        ),
        "additive twice": (
            lambda: AttentionObservation.from_logits(
                logits, None, case.strata, extra_columns=1, mask=AttentionMask(tensor=alibi(4, 23))
            ),
            "already hold the additive mask",
        ),
        "heads strata": (lambda: HeadsObservation(case.query, case.strata[:, :1]), "for x of shape"),
    }


@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_refused_with_a_message(name: str) -> None:
    make, message = bad_inputs()[name]
    with pytest.raises(EstimatorError, match=message):
        make()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_metadata_is_complete(estimator: type[Estimator]) -> None:
    made = estimator()
    assert made.identifier.endswith("/1")
    assert made.__doc__
    assert all((made.title, made.formula, made.range, made.floor, made.ceiling, made.sources))
    assert made.observes in ("attention", "heads")
    assert made.sites
    assert made == estimator()


HEADS = Suite([HeadChannelNorm(), MassiveValues()])


def heads_reference(x: np.ndarray, valid: np.ndarray, threshold: float = 5.0) -> dict[str, np.ndarray]:
    norms = np.sqrt((x.astype(np.float64) ** 2 * valid[:, None, :, None]).sum(axis=2))
    present = valid.any(axis=1)
    massive = norms > threshold * norms.mean(axis=(1, 2), keepdims=True)
    return {
        "head_channel_norm": norms[present].mean(axis=0),
        "massive_value_count": massive[present].sum(axis=-1).mean(axis=0),
        "massive_value_fraction": massive[present].mean(),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_massive_values_in_queries_and_keys(backend: str) -> None:
    case = make_case(2, left=(3, 0, 0), right=(0, 23, 5), channels=16)
    x = case.query.copy()
    x[0, 1, :, 3] *= 60
    x[:, 2, :, 14] += 40
    x[0, 0, 0] = 1e4  # padding
    to = {"numpy": np.asarray, "jax": jnp.asarray}.get(backend, torch.as_tensor)
    measure: Callable = lambda x, s: HEADS.measure(HeadsObservation(x, s))  # noqa: E731
    if backend == "jax":
        measure = jax.jit(measure)
    if backend == "torch-compiled":
        measure = torch.compile(measure, fullgraph=True, backend="aot_eager")
    layout = HeadsObservation(x, case.strata).layout
    found = finalised(measure(to(x), to(case.strata)), layout, HEADS)
    expected = heads_reference(x, case.strata[0])
    assert expected["massive_value_count"].sum() > 0
    assert_same(found, expected, rtol=1e-5)


def test_massive_values_merge_and_leave_non_finite_tokens_out() -> None:
    case = make_case(2, channels=16)
    x = case.query.copy()
    x[:, 2, :, 14] += 40
    x[1, 0, 4, 0] = np.nan
    valid = case.strata[0].copy()
    valid[1, 4] = 0
    parts = [HeadsObservation(x[i : i + 1], case.strata[:, i : i + 1]) for i in range(3)]
    state = HEADS.init(parts[0].layout, x)
    for part in parts:
        state = HEADS.update(state, part)
    expected = heads_reference(np.nan_to_num(x), valid)
    assert_same(finalised(state, parts[0].layout, HEADS), expected, rtol=1e-5)


def test_norms_of_huge_and_tiny_channels_neither_overflow_nor_vanish() -> None:
    case = make_case(2)
    for size in (1e30, 1e-30):
        x = case.key * np.float32(size)
        observation = HeadsObservation(x, case.strata)
        found = finalised(HEADS.measure(observation), observation.layout, HEADS)
        expected = heads_reference(x, case.strata[0])
        np.testing.assert_allclose(found["head_channel_norm"], expected["head_channel_norm"], rtol=1e-5)
        np.testing.assert_allclose(found["massive_value_count"], expected["massive_value_count"])


@pytest.mark.parametrize("sample", [None, 5])
def test_nothing_leaves_the_device_or_is_made_on_another(sample: int | None) -> None:
    """The meta device holds no numbers: reading one, or mixing in an array of the host, raises."""
    case = replace(CASES["ALiBi, soft cap, sinks"], window=9, function=lambda b, h, q, k: k % 5 != 1)
    with torch.device("cpu"):
        observation = observe(case, lambda array: torch.as_tensor(array).to("meta"), query_sample=sample)
        added = ATTENTION.measure(observation)
        heads = HEADS.measure(HeadsObservation(observation.query, observation.raw_strata))
    assert all(array.device.type == "meta" for array in (added | heads).values())
