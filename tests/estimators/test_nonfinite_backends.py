"""A NaN is found wherever it stands, on every backend: XLA's maximum over an axis can lose one on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osp_diag.estimators._arrays import float32_matmul
from osp_diag.estimators.activation import ActivationObservation

BACKENDS = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jnp.asarray}


@pytest.mark.parametrize(
    ("backend", "jitted"), [("numpy", False), ("torch", False), ("jax", False), ("jax", True)]
)
def test_a_nan_is_found_in_any_channel_of_any_width(backend: str, jitted: bool) -> None:
    def finite(x: Any, strata: Any) -> Any:
        return ActivationObservation(x, strata).finite_token

    run = jax.jit(finite) if jitted else finite
    strata = BACKENDS[backend](np.ones((4, 2, 5), np.float32))
    for width in (3, 16, 100, 768, 2049):
        for channel in {0, 1, width // 2, width - 1}:
            for value in (np.nan, np.inf, -np.inf):
                x = np.random.default_rng(0).normal(size=(2, 5, width)).astype(np.float32)
                x[1, 3, channel] = value
                found = np.asarray(run(BACKENDS[backend](x), strata))
                assert not found[1, 3], (width, channel, value)
                assert found.sum() == 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_product_keeps_float32_in_any_region(backend: str) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    expected = first.astype(np.float64) @ second.astype(np.float64)
    make = BACKENDS[backend]
    with torch.autocast("cpu", dtype=torch.bfloat16), jax.default_matmul_precision("bfloat16"):
        found = np.asarray(float32_matmul(make(first), make(second)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
