"""The attention site's outputs against dense attention in float64, on every backend, and what is refused."""

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

from osp_diag.errors import EstimatorError
from osp_diag.estimators.attention import AttentionMask, AttentionObservation
from osp_diag.estimators.attention_mask import is_fill
from osp_diag.estimators.attention_tiles import LogitGrid
from osp_diag.estimators.base import Estimator, Suite
from osp_diag.estimators.query_key import HeadsObservation
from tests.attention_cases import (
    ATTENTION,
    BACKENDS,
    CASES,
    ESTIMATORS,
    HEADS,
    NOT_DENSE,
    alibi,
    assert_same,
    causal_fill,
    described,
    finalised,
    observe,
    run,
)
from tests.dense_attention import dense_logits, dense_outputs, make_case, sub_batch


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_every_output_equals_dense_attention(name: str, backend: str) -> None:
    with np.errstate(all="ignore"):
        expected = dense_outputs(described(name))
    found = run(CASES[name], backend)
    assert set(found) == set(expected) | NOT_DENSE
    assert_same(found, expected)


TRACED = {
    "window, ALiBi, soft cap, sinks, left padding": replace(CASES["ALiBi, soft cap, sinks"], window=9),
    "bidirectional, function": replace(CASES["function"], causal=False),
}
"""Everything that a mask can be, in as few graphs as may be: tracing takes longer than what is traced."""


@pytest.mark.parametrize("backend", ["jax", "torch-compiled"])
@pytest.mark.parametrize("name", TRACED)
def test_traced_equals_numpy(name: str, backend: str) -> None:
    expected = run(TRACED[name], query_sample=5)
    found = run(TRACED[name], backend, query_sample=5)
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
    names = ("sink_rate", "key_mass", "max_logit", "attention_entropy")
    suite = Suite([estimator for estimator in ATTENTION.estimators if estimator.name in names])
    inputs = [torch.as_tensor(a) for a in (case.query, case.key, case.value, case.strata)]
    bias, keys, sink_logits = (torch.as_tensor(a) for a in (case.additive, case.keys, case.sink_logits))

    @functools.partial(torch.compile, fullgraph=True)
    def increments(*arrays: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = AttentionMask(tensor=bias, keys=keys)
        options: dict[str, Any] = {"softcap": case.softcap, "sink_logits": sink_logits, "query_sample": 5}
        return suite.measure(AttentionObservation(*arrays, scale=case.scale, mask=mask, tile=23, **options))

    layout = observe(case).layout
    state = suite.merge(suite.init(layout, inputs[0]), increments(*inputs))
    assert_same(finalised(state, layout, suite), {name: expected[name] for name in names})


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


@pytest.mark.parametrize("fill", [-1e4, -1e9])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_fills_of_any_size_are_masks(fill: float, backend: str) -> None:
    case = make_case(4, left=(5, 0, 11))
    to = np.asarray if backend == "numpy" else torch.as_tensor
    keys = np.where(case.keys, 0, fill)[:, None, None].astype(np.float32)
    later = np.where(causal_fill(23) < 0, fill, 0).astype(np.float32)
    filled = replace(case, keys=None, additive=keys + later)
    assert_same(run(filled, backend), run(case))
    dense = dense_logits(case)[0].astype(np.float32) + keys + later
    observation = AttentionObservation.from_logits(
        to(dense), to(case.value), to(case.strata), query_sample=None, tile=12
    )
    found = finalised(ATTENTION.measure(observation), observation.layout)
    expected = run(case)
    assert_same(
        {k: v for k, v in found.items() if not np.isnan(v).all()},
        {k: expected[k] for k, v in found.items() if not np.isnan(v).all()},
    )


def test_a_bias_that_falls_far_is_no_fill() -> None:
    # What a query sees of itself may lie far below keys that it must not see.
    bias = np.linspace(-20000, 0, 5)[None]
    assert is_fill(bias, np.tril(np.ones((5, 5), bool))).tolist() == [
        [key < query - 1 for key in range(5)] for query in range(5)
    ]
    assert not is_fill(np.array([[np.inf, 0.0], [np.nan, 0.0]]), np.ones((2, 2), bool)).any()


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


@pytest.mark.parametrize("sample", [None, 5])
def test_nothing_leaves_the_device_or_is_made_on_another(sample: int | None) -> None:
    """The meta device holds no numbers: reading one, or mixing in an array of the host, raises."""
    case = replace(CASES["ALiBi, soft cap, sinks"], window=9, function=lambda b, h, q, k: k % 5 != 1)
    with torch.device("cpu"):
        observation = observe(case, lambda array: torch.as_tensor(array).to("meta"), query_sample=sample)
        added = ATTENTION.measure(observation)
        heads = HEADS.measure(HeadsObservation(observation.query, observation.raw_strata))
    assert all(array.device.type == "meta" for array in (added | heads).values())
