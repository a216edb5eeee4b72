"""Massive values and norms of queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osp_diag.estimators.query_key import HeadsObservation
from tests.attention_cases import BACKENDS, HEADS, assert_same, finalised
from tests.dense_attention import make_case


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
