"""The operations that the Array API lacks, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from activation_cases import converter
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from osp_diag.estimators._arrays import (
    _kth_by_bits,
    counts_by_bin,
    kth_magnitude,
    namespace_of,
    top_entries,
    weighted_row_sum,
)
from osp_diag.estimators._histogram import LogHistogram

BACKENDS = ("numpy", "torch", "jax", "strict")
MAGNITUDES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.floats(0, np.finfo(np.float32).max.item(), width=32, allow_subnormal=True),
)


@given(MAGNITUDES, st.data())
def test_kth_magnitude_is_exact(magnitude: np.ndarray, data: st.DataObject) -> None:
    rows, length = magnitude.shape
    one = data.draw(st.integers(0, length - 1))
    each = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=rows, max_size=rows)))
    ordered = np.sort(magnitude, -1)
    bitwise = _kth_by_bits(
        namespace_of(torch.zeros(1)), torch.as_tensor(magnitude), torch.as_tensor(each), 31
    )
    np.testing.assert_array_equal(bitwise.numpy(), ordered[np.arange(rows), each])
    for to in (np.asarray, torch.as_tensor):
        np.testing.assert_array_equal(np.asarray(kth_magnitude(to(magnitude), one)), ordered[:, one])
        found = np.asarray(kth_magnitude(to(magnitude), to(each)))
        np.testing.assert_array_equal(found, ordered[np.arange(rows), each])


@pytest.mark.parametrize("backend", BACKENDS)
def test_kth_magnitude_on_each_backend(backend: str) -> None:
    to = converter(backend)
    magnitude = np.abs(np.random.default_rng(1).standard_cauchy((3, 101)).astype(np.float32))
    magnitude[1, :40] = 0
    ranks = np.array([0, 60, 100], np.int32)
    ordered = np.sort(magnitude, -1)
    np.testing.assert_array_equal(np.asarray(kth_magnitude(to(magnitude), 50)), ordered[:, 50])
    found = np.asarray(kth_magnitude(to(magnitude), to(ranks)))
    np.testing.assert_array_equal(found, ordered[[0, 1, 2], ranks])


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 15), (torch.float16, 18)])
def test_half_precision_needs_fewer_bits(dtype: torch.dtype, bits: int) -> None:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).abs().to(dtype).float()
    exact = np.sort(values.numpy(), -1)[:, 31]
    found = jax.jit(lambda m: kth_magnitude(m, 31, significant_bits=bits))(jnp.asarray(values.numpy()))
    np.testing.assert_array_equal(np.asarray(found), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_entries(backend: str) -> None:
    values = np.random.default_rng(2).permutation(60).reshape(3, 20).astype(np.float32)
    found, index = (np.asarray(part) for part in top_entries(converter(backend)(values), 4))
    np.testing.assert_array_equal(found, np.sort(values, -1)[:, ::-1][:, :4])
    np.testing.assert_array_equal(np.take_along_axis(values, index, -1), found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_and_counts(backend: str) -> None:
    to, generator = converter(backend), np.random.default_rng(3)
    weights = generator.random((3, 50)).astype(np.float32)
    values = generator.standard_normal((50, 8)).astype(np.float32)
    found = np.asarray(weighted_row_sum(to(weights), to(values)))
    np.testing.assert_allclose(found, weights.astype(float) @ values.astype(float), atol=1e-5)
    index = generator.integers(0, 6, 50).astype(np.int32)
    counted = np.asarray(counts_by_bin(to(index), to(weights), 6))
    expected = [[row[index == b].sum() for b in range(6)] for row in weights]
    np.testing.assert_allclose(counted, expected, rtol=1e-5)


def test_the_ends_of_a_histogram_take_what_lies_beyond() -> None:
    histogram = LogHistogram(low=1.0, high=16.0, bins=4)
    values = np.array([0.0, 1.0, 1.9, 2.0, 15.9, 16.0, 1e30])
    counts = histogram.counts(values, np.ones((1, 7)))
    np.testing.assert_array_equal(counts, [[3, 1, 0, 3]])
    np.testing.assert_allclose(histogram.quantiles(counts, (1.0,)), [[16.0]])
    assert np.isnan(histogram.quantiles(0 * counts, (0.5,))).all()
