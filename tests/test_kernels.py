"""The Triton kernels equal the generic reductions.

They run here in Triton's interpreter (see conftest.py), which needs no GPU; ``benchmarks/probe_overhead.py --check`` compares
them on one.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from osp_diag.estimators import default_estimators
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.base import Suite

pytest.importorskip("triton", reason="Triton exists for Linux alone")

BITS = {torch.bfloat16: 15, torch.float16: 18, torch.float32: 31}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("osp_diag.capture.kernels")


def activations(dtype: torch.dtype, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heavy tails, a massive first token, padding, a constant token, one of zeros, a NaN and an Inf."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens = 2, 21
    x = torch.randn(batch, tokens, channels, generator=generator) + 0.3
    x[:, 0, 3] = 25_800
    x[0, 5] = 0.0
    x[0, 6] = 2.5
    x[1, 7, 2] = float("nan")
    x[1, 8, 1] = float("inf")
    strata = torch.zeros(4, batch, tokens)
    strata[0] = 1
    strata[0, 1, -4:] = 0
    strata[1, :, 0] = 1
    strata[2, :, 4::5] = 1
    strata[2] *= strata[0]
    strata[3] = strata[0] - strata[1] - strata[2]
    return x.to(dtype), strata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [48, 65])
def test_kernels_equal_the_generic_reductions(kernels: ModuleType, dtype: torch.dtype, channels: int) -> None:
    x, strata = activations(dtype, channels)
    expected = ActivationObservation(x, strata)
    found = kernels.FusedObservation(x, strata, significant_bits=BITS[dtype])
    assert torch.equal(found.finite_token | (strata[0] == 0), expected.finite_token | (strata[0] == 0))
    assert torch.equal(found.strata, expected.strata)
    assert torch.equal(found.median, expected.median)
    assert torch.equal(found.x, expected.x)
    for name, value in expected.moments._asdict().items():
        torch.testing.assert_close(getattr(found.moments, name), value, rtol=1e-5, atol=1e-6)
    for name, value in expected.channels._asdict().items():
        torch.testing.assert_close(getattr(found.channels, name), value, rtol=1e-5, atol=1e-6)
    threshold, centre = torch.tensor([1.0, 100.0]), torch.tensor([0.3, 0.0])
    for middle in (None, centre):
        left, right = found.beyond(threshold, middle), expected.beyond(threshold, middle)
        counted = expected.strata[0] > 0
        assert torch.equal(left.token[counted], right.token[counted])
        assert torch.equal(left.channel, right.channel.to(left.channel.dtype))


def test_every_default_statistic_is_the_same(kernels: ModuleType) -> None:
    x, strata = activations(torch.bfloat16, 48)
    suite = Suite(default_estimators(observes="activation", site="residual_post"))
    expected = suite.measure(ActivationObservation(x, strata))
    found = suite.measure(kernels.FusedObservation(x, strata, significant_bits=15))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=1e-5,
            atol=1e-6,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
