"""Sinks at any position and An et al.'s attention outliers, against the whole of the attention in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osp_diag.errors import EstimatorError
from osp_diag.estimators import Suite
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.attention_outliers import AttentionOutliers
from osp_diag.estimators.sink_keys import SinkKeys
from osp_diag.schema import STRATA
from tests.attention_cases import finalised, observe
from tests.dense_attention import Case, dense_logits, make_case, sub_batch

EPSILONS, MINIMUM = (0.05, 0.1, 0.3), 5
SUITE = Suite([SinkKeys(EPSILONS, MINIMUM), AttentionOutliers(0.06)])
namespace_of(torch.zeros(1))  # a compiled function has to find the namespace already there
CASES = {
    "causal": make_case(1),
    "left padding": make_case(4, left=(5, 0, 11)),
    "right padding": make_case(5, right=(0, 9, 22)),
    "a sequence of padding": make_case(6, left=(0, 23, 2)),
    "window": make_case(9, window=5, left=(3, 0, 8)),
    "learned sinks": make_case(11, sink_logits=np.array([0.0, 3.0, -2.0, 8.0], np.float32)),
    "bidirectional": make_case(16, causal=False, left=(4, 0, 0), right=(0, 7, 2)),
    "one token": make_case(23, tokens=1),
}


def dense(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(A, whether a query sees any key), in float64."""
    logits, allowed = dense_logits(case)
    weights = np.where(allowed, np.exp(np.where(allowed, logits, 0)), 0)
    extra = 0 if case.sink_logits is None else np.exp(case.sink_logits.astype(float))[None, :, None, None]
    total = weights.sum(-1, keepdims=True) + extra
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), total[..., 0] > 0


def expected_sinks(case: Case) -> dict[str, np.ndarray]:
    p, usable = dense(case)
    batch, heads, tokens, _ = p.shape
    shape = (heads, len(EPSILONS), len(STRATA))
    keys, sequences = np.zeros(shape), np.zeros(shape)
    count, candidates = np.zeros(heads), np.zeros((heads, len(STRATA)))
    for b, h in np.ndindex(batch, heads):
        alphas = np.full(tokens, np.nan)
        for k in range(tokens):
            queries = (case.strata[0, b] > 0) & usable[b, h]
            queries &= (np.arange(tokens) >= k) if case.causal else True
            if case.strata[0, b, k] > 0 and queries.sum() >= MINIMUM:
                alphas[k] = p[b, h, queries, k].mean()
        count[h] += np.isfinite(alphas).any()
        for s in range(len(STRATA)):
            mine = alphas[(case.strata[s, b] > 0) & np.isfinite(alphas)]
            candidates[h, s] += len(mine)
            for e, epsilon in enumerate(EPSILONS):
                keys[h, e, s] += (mine > epsilon).sum()
                sequences[h, e, s] += (mine > epsilon).any()
    with np.errstate(invalid="ignore", divide="ignore"):
        known = np.where(candidates > 0, count[:, None], np.nan)[:, None]
        return {"sink_key_count": keys / known, "any_sink_rate": sequences / known}


def expected_outliers(case: Case) -> dict[str, np.ndarray]:
    p, usable = dense(case)
    keys, mass, tokens, sequences = np.zeros(4), np.zeros(4), np.zeros(4), 0
    for b in range(len(p)):
        valid = case.strata[0, b] > 0
        shares = [
            p[b, h, valid & usable[b, h]].mean(0) for h in range(p.shape[1]) if (valid & usable[b, h]).any()
        ]
        if not shares:
            continue
        received, sequences = np.mean(shares, axis=0), sequences + 1
        for s in range(4):
            mine = received[case.strata[s, b] > 0]
            tokens[s] += len(mine)
            keys[s] += (mine >= 0.06).sum()
            mass[s] += mine[mine >= 0.06].sum()
    known = np.where(tokens > 0, sequences, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"attention_outlier_count": keys / known, "attention_outlier_mass": mass / known}


def measured(case: Case, to: Any = np.asarray) -> dict[str, np.ndarray]:
    observation = observe(case, to)
    state = SUITE.update(SUITE.init(observation.layout, to(case.query)), observation)
    return finalised(state, observation.layout, SUITE)


@pytest.mark.parametrize("name", CASES)
def test_against_dense_attention(name: str) -> None:
    case = CASES[name]
    expected = {**expected_sinks(case), **expected_outliers(case)}
    for to in (np.asarray, torch.as_tensor):
        found = measured(case, to)
        assert set(found) == set(expected)
        for output, values in expected.items():
            np.testing.assert_allclose(found[output], values, rtol=1e-5, err_msg=output)
    if name == "causal":
        assert np.nanmax(expected["sink_key_count"][..., 2:]) > 0  # also away from the first token
        assert np.nanmax(expected["attention_outlier_count"][2:]) > 0


@pytest.mark.parametrize("name", ["left padding", "bidirectional"])
def test_traced(name: str) -> None:
    case, eager = CASES[name], measured(CASES[name])
    layout = observe(case).layout
    names = ("query", "key", "value", "strata", "keys")

    def increments(*arrays: Any) -> Any:
        return SUITE.measure(observe(replace(case, **dict(zip(names, arrays, strict=True))), lambda a: a))

    compiled = torch.compile(increments, fullgraph=True, backend="aot_eager")
    for traced, to in ((jax.jit(increments), jnp.asarray), (compiled, torch.as_tensor)):
        added = traced(*(to(getattr(case, n)) for n in names))
        found = finalised({key: np.asarray(value) for key, value in added.items()}, layout, SUITE)
        for output, values in eager.items():
            np.testing.assert_allclose(found[output], values, rtol=1e-5, err_msg=output)


def test_halves_are_one_whole_and_strata_add_up() -> None:
    case = CASES["left padding"]
    observation = observe(case)
    empty = SUITE.init(observation.layout, case.query)
    halves = [SUITE.update(empty, observe(sub_batch(case, part))) for part in (slice(0, 1), slice(1, 3))]
    together, whole = SUITE.merge(*halves), SUITE.update(empty, observation)
    for field, value in whole.items():
        np.testing.assert_allclose(together[field], value, rtol=1e-6, err_msg=field)
    outputs = finalised(whole, observation.layout, SUITE)
    for output in ("sink_key_count", "attention_outlier_count", "attention_outlier_mass"):
        np.testing.assert_allclose(
            np.nansum(outputs[output][..., 1:], -1), outputs[output][..., 0], rtol=1e-6
        )
    rate, count = outputs["any_sink_rate"], outputs["sink_key_count"]
    assert (rate[~np.isnan(rate)] <= count[~np.isnan(rate)] + 1e-6).all()


def test_heads_that_attend_to_themselves_have_no_sinks() -> None:
    """The last keys of a sequence get all the attention of few queries: those are no candidates."""
    tokens = 40
    eye = np.eye(tokens, dtype=np.float32)[None, None] * 50
    strata = np.zeros((4, 1, tokens), np.float32)
    strata[0], strata[1, :, 0], strata[3, :, 1:] = 1, 1, 1
    suite = Suite([SinkKeys()])
    observation = observe(Case(eye, eye, eye, strata, scale=1.0))
    state = suite.update(suite.init(observation.layout, eye), observation)
    assert np.nanmax(finalised(state, observation.layout, suite)["sink_key_count"]) == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SinkKeys(()), r"epsilons \(\) must be shares between 0 and 1"),
        (lambda: SinkKeys(minimum_queries=0), "minimum_queries is 0; a mean needs at least 1 query"),
        (lambda: AttentionOutliers(1.0), "share is 1.0; give a share between 0 and 1"),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    with pytest.raises(EstimatorError, match=message):
        build()
