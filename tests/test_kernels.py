"""The Triton kernels equal the generic reductions.

They run here in Triton's interpreter (see conftest.py), which needs no GPU;
``benchmarks/probe_overhead.py --check`` compares them on one.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from osp_diag.capture.collector import Collector
from osp_diag.estimators import _arrays, default_estimators
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.base import Layout, State, Suite

pytest.importorskip("triton", reason="Triton exists for Linux alone")

BITS = {torch.bfloat16: 15, torch.float16: 18, torch.float32: 31}


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    return importlib.import_module("osp_diag.capture.fused")


def observe(fused: ModuleType, x: torch.Tensor, strata: torch.Tensor) -> ActivationObservation:
    bits = BITS[x.dtype]
    found = fused.site_statistics(x, fused.part_of_tokens(strata), bits)
    return fused.FusedObservation(x, strata, found, significant_bits=bits)


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
def test_kernels_equal_the_generic_reductions(fused: ModuleType, dtype: torch.dtype, channels: int) -> None:
    x, strata = activations(dtype, channels)
    expected = ActivationObservation(x, strata)
    found = observe(fused, x, strata)
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


def test_every_default_statistic_is_the_same(fused: ModuleType) -> None:
    x, strata = activations(torch.bfloat16, 48)
    suite = Suite(default_estimators(observes="activation", site="residual_post"))
    expected = suite.measure(ActivationObservation(x, strata))
    found = suite.measure(observe(fused, x, strata))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=1e-5,
            atol=1e-6,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_the_range_of_bfloat16(fused: ModuleType, factor: float) -> None:
    x, strata = activations(torch.float32, 48)
    x = (x * factor).to(torch.bfloat16)
    expected, found = ActivationObservation(x, strata), observe(fused, x, strata)
    for name, value in expected.channels._asdict().items():
        torch.testing.assert_close(getattr(found.channels, name), value, rtol=1e-4, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e5])
def test_a_mean_of_many_deviations_is_not_taken_for_spread(fused: ModuleType, mean: float) -> None:
    """Centred moments against float64, where a mean taken off once leaves its own rounding (2% at 1e5)."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(2, 8, 320, generator=generator) + mean) * 1.7
    strata = torch.zeros(4, 2, 8)
    strata[0] = strata[3] = 1
    moments = observe(fused, x, strata).moments
    z = x.double() / x.double().abs().amax(-1, keepdim=True)
    centred = z - z.mean(-1, keepdim=True)
    for power, name in ((2, "central_second"), (4, "central_fourth")):
        expected = (centred**power).mean(-1)
        torch.testing.assert_close(getattr(moments, name).double(), expected, rtol=2e-5, atol=0.0)
    deviation = (centred**2).mean(-1) ** 1.5
    skewness = (centred**3).mean(-1) / deviation
    torch.testing.assert_close(moments.central_third.double() / deviation, skewness, rtol=0.0, atol=2e-5)
    torch.testing.assert_close(moments.mean.double(), z.mean(-1), rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("site", ["residual_post", "attention_input", "mlp_hidden"])
def test_folding_many_sites_at_once(fused: ModuleType, monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    """What is put off and done for several sites together equals each site on its own."""
    monkeypatch.setattr(fused, "AT_ONCE", 2)
    monkeypatch.setattr(fused, "compile_once", lambda name, function: function)
    x, strata = activations(torch.bfloat16, 48)
    suite = Suite(default_estimators(observes="activation", site=site))
    states: dict[int, State] = {}

    def merge(keys: tuple[int, ...], suite: Suite, layout: Layout, increments: State) -> None:
        for index, key in enumerate(keys):
            states[key].update({name: value[index] for name, value in increments.items()})

    folding = fused.FusedFolding(merge)
    with monkeypatch.context() as on_gpu:  # NumPy's selection is for hosts, and cannot be vmapped
        on_gpu.setattr(_arrays, "runs_on_host", lambda *_: False)
        for layer in range(5):
            states[layer] = {}
            states[layer].update(folding.fold(layer, suite, x * (layer + 1), strata))
        folding.finish()
    for layer in range(5):
        expected = suite.measure(ActivationObservation(x * (layer + 1), strata))
        assert states[layer].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                states[layer][name].double(),
                value.double(),
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_a_site_in_two_stacks_is_one_site(fused: ModuleType) -> None:
    x, strata = activations(torch.bfloat16, 48)
    collector = Collector(lambda site: True)
    suite = collector.suites_at("attention_input")["activation"]
    key, other = ("attention_input", 0, "activation"), ("attention_input", 1, "activation")
    layout = Layout(channels=48, tokens=x.shape[1])
    later = Suite(
        [e for e in suite.estimators if not any(measurement.reads_elements for measurement in e.measurements)]
    )
    increment = later.measure(observe(fused, x, strata))
    stacked = {name: torch.stack([value, value]) for name, value in increment.items()}
    collector._sites.merge_stack((key, other), suite, layout, stacked)
    collector._sites.merge_stack((key, key), suite, layout, stacked)
    assert torch.equal(collector.states[key]["token.count"], 3 * increment["token.count"])
    assert torch.equal(collector.states[other]["token.count"], increment["token.count"].double())
    assert torch.equal(collector.states[key]["channel.maximum"], increment["channel.maximum"].double())
