"""Attention statistics where masks hide keys: fills, padding, sliding windows, and logits before any mask."""

from __future__ import annotations

import numpy as np
import pytest

from osp_diag.estimators import Suite, default_estimators, get_estimator
from osp_diag.estimators.attention import AttentionMask, AttentionObservation

RNG = np.random.default_rng(11)


def strata_of(tokens: int, place: slice) -> np.ndarray:
    """One sequence whose valid tokens are at ``place``."""
    strata = np.zeros((4, 1, tokens), np.float32)
    strata[0, 0, place] = 1
    strata[1, 0, place.start] = 1
    strata[3] = strata[0] - strata[1]
    return strata


def outputs(observation: AttentionObservation, *names: str) -> dict[str, np.ndarray]:
    estimators = [get_estimator(name) for name in names] or default_estimators(observes="attention")
    suite = Suite(list(estimators))
    state = suite.update(suite.init(observation.layout, observation.valid), observation)
    with np.errstate(all="ignore"):
        finals = suite.finalise(state, observation.layout)
    return {name: np.asarray(output.values) for name, output in finals.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [5, 64, 90])
def test_padding_changes_nothing(count: int, side: str) -> None:
    width = 150
    place = slice(0, count) if side == "right" else slice(width - count, width)
    query, key, value = (RNG.standard_normal((1, 2, width, 4)).astype(np.float32) for _ in range(3))
    padded = AttentionObservation(
        query,
        key,
        value,
        strata_of(width, place),
        scale=0.5,
        mask=AttentionMask(keys=strata_of(width, place)[0]),
    )
    alone = AttentionObservation(
        query[:, :, place],
        key[:, :, place],
        value[:, :, place],
        strata_of(count, slice(0, count)),
        scale=0.5,
    )
    names = ("delta_logit", "logit_distribution", "guo_delta_logit", "visible_sink_rate", "sink_rate")
    found, expected = outputs(padded, *names), outputs(alone, *names)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=1e-6, err_msg=name)
    assert np.isfinite(expected["delta_logit"]).all()


@pytest.mark.parametrize("fill", [-1e4, -1e9, -1e9 / 16, np.finfo(np.float32).min])
def test_a_mask_may_fill_with_any_large_number(fill: float) -> None:
    """Causality and padding in logits that the model made itself."""
    tokens, padding = 40, 6
    logits = RNG.standard_normal((1, 2, tokens, tokens)).astype(np.float32)
    hidden = np.triu(np.ones((tokens, tokens), bool), 1)
    hidden[:, :padding] = True
    value = RNG.standard_normal((1, 2, tokens, 4)).astype(np.float32)
    both = [
        AttentionObservation.from_logits(
            np.where(hidden, filled, logits).astype(np.float32),
            value,
            strata_of(tokens, slice(padding, tokens)),
            mask=AttentionMask(causal=True),
        )
        for filled in (fill, -np.inf)
    ]
    found, expected = (outputs(one) for one in both)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("fill", [-1e4, -1e9, np.finfo(np.float32).min])
def test_an_additive_mask_may_fill_with_any_large_number(fill: float) -> None:
    tokens = 30
    query, key, value = (RNG.standard_normal((1, 2, tokens, 4)).astype(np.float32) for _ in range(3))
    near = np.tri(tokens, dtype=bool) & ~np.tri(tokens, k=-7, dtype=bool)
    masks = [
        AttentionMask(tensor=np.where(near, 0, fill).astype(np.float32)[None, None]),
        AttentionMask(window=7),
    ]
    found, expected = (
        outputs(
            AttentionObservation(query, key, value, strata_of(tokens, slice(0, tokens)), scale=0.5, mask=mask)
        )
        for mask in masks
    )
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_window_caps_the_sink_rate_but_not_that_of_the_queries_that_see() -> None:
    tokens, window = 96, 24
    query, key = np.ones((1, 1, tokens, 4), np.float32), np.zeros((1, 1, tokens, 4), np.float32)
    key[:, :, 0] = 40  # all attention goes to the first token, where it is seen
    for width, rate in ((None, 1.0), (window, 0.0)):
        found = outputs(
            AttentionObservation(
                query,
                key,
                None,
                strata_of(tokens, slice(0, tokens)),
                scale=1.0,
                mask=AttentionMask(window=width),
            ),
            "sink_rate",
            "visible_sink_rate",
        )
        assert found["sink_rate"][0, 2, 0] == rate
        np.testing.assert_array_equal(found["visible_sink_rate"][0], np.ones(5))
        np.testing.assert_allclose(found["visible_first_token_attention"], 1, rtol=1e-6)
        np.testing.assert_allclose(found["sink_key_visibility"], 1 if width is None else window / tokens)


def test_where_every_query_sees_it_both_rates_are_one_number() -> None:
    query, key = (RNG.standard_normal((1, 3, 20, 4)).astype(np.float32) * 3 for _ in range(2))
    found = outputs(
        AttentionObservation(query, key, None, strata_of(20, slice(0, 20)), scale=1.0),
        "sink_rate",
        "visible_sink_rate",
        "key_mass",
    )
    np.testing.assert_array_equal(found["visible_sink_rate"], found["sink_rate"][..., 0])
    np.testing.assert_allclose(found["visible_first_token_attention"], found["key_mass"][:, 0], rtol=1e-6)


def test_guos_logits_are_before_the_mask() -> None:
    tokens, place = 18, slice(4, 18)
    query = RNG.standard_normal((1, 4, tokens, 6)).astype(np.float32)
    key = RNG.standard_normal((1, 2, tokens, 6)).astype(np.float32)
    strata = strata_of(tokens, place)
    for mask in (AttentionMask(keys=strata[0]), AttentionMask(causal=False, window=None, keys=strata[0])):
        found = outputs(
            AttentionObservation(query, key, None, strata, scale=0.3, softcap=2.0, mask=mask),
            "guo_delta_logit",
        )
        keys = np.repeat(key.astype(np.float64), 2, axis=1)[0, :, place]
        logits = 0.3 * np.einsum("hic,hkc->hik", query[0, :, place].astype(np.float64), keys)
        expected = (logits[:, :, 0] - logits.mean(axis=-1)).mean(axis=-1)
        np.testing.assert_allclose(found["guo_delta_logit"], expected, rtol=1e-5)
