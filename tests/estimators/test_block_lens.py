"""The block lens: its numbers against float64, its floors, and what a hot channel does to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from block_oracle import FORMATS, WIDTHS, Rounded, bits, crests, largest, mean, slices, smallest

from osp_diag.errors import EstimatorError
from osp_diag.estimators import ActivationObservation, Suite, estimators_named
from osp_diag.estimators.block_gaussian import on_gaussian_noise
from osp_diag.estimators.block_lens import CollateralLoss

LENS = Suite([e for e in estimators_named("block_lens") if e.observes == "activation"])


def expected(oracle) -> dict[str, np.ndarray]:
    """Every output by name: the tests of all backends and of hostile inputs ask for it."""
    counted = oracle.keep[0]
    tokens = oracle.x[counted]
    peaks = np.array([np.abs(x[k]).max(initial=0.0) for x, k in zip(oracle.x, counted, strict=True)])
    peak = np.broadcast_to(peaks[:, None], counted.shape)[counted]
    strata = [keep[counted] for keep in oracle.keep]
    return _of_formats(tokens, peak, strata) | _of_crests(tokens, strata)


def _of_crests(tokens: np.ndarray, strata: list[np.ndarray]) -> dict[str, np.ndarray]:
    outputs, means, tops = {}, [], []
    for width in (16, 32, 128):
        crest = np.stack([crests(tokens[:, s]) for s in slices(tokens.shape[1], width)], axis=1)
        outputs[f"block_crest_{width}"] = np.array([[mean(c) for c in crest[rows].T] for rows in strata])
        means.append([mean(crest[rows]) for rows in strata])
        tops.append([largest(crest[rows]) for rows in strata])
    means, tops = np.transpose(means), np.transpose(tops)
    noise = np.array([2.110, 2.366, 2.834])
    return outputs | {"block_crest": means, "block_crest_max": tops, "block_crest_on_noise": noise}


def _of_formats(tokens: np.ndarray, peak: np.ndarray, strata: list[np.ndarray]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}
    by_format: dict[str, list] = {}
    nonzero = (tokens != 0).sum(-1)
    for name in FORMATS:
        blocks = [Rounded(name, tokens[:, s], peak) for s in slices(tokens.shape[1], WIDTHS[name])]
        loss, headroom, zero, small, zeroed = (
            np.stack([getattr(b, key) for b in blocks], axis=1)
            for key in ("loss", "headroom", "is_zero", "is_small", "zeroed")
        )
        above = np.where(np.isnan(loss), np.nan, loss > 0.1)
        every = {
            "collateral_loss": (loss, mean),
            "collateral_loss_max": (loss, largest),
            "collateral_loss_above_tenth": (above, mean),
            "effective_bits_min": (bits(blocks), smallest),
            "scale_headroom": (headroom, mean),
            "scale_headroom_min": (headroom, smallest),
            "scale_underflow_fraction": (np.where(zero, np.nan, small), mean),
        }
        for key, (values, reduce) in every.items():
            by_format.setdefault(key, []).append([reduce(values[rows]) for rows in strata])
        share = [zeroed[rows].sum() / (nonzero[rows].sum() or np.nan) for rows in strata]
        by_format.setdefault("zeroed_fraction", []).append(share)
        if WIDTHS[name]:
            outputs[f"{name}_block_collateral_loss"] = np.array(
                [[mean(c) for c in loss[rows].T] for rows in strata]
            )
    for key in ("collateral_loss", "effective_bits", "zeroed_fraction", "scale_headroom"):
        outputs[f"{key}_on_noise"] = np.array(
            [on_gaussian_noise(key, name, tokens.shape[1]) for name in FORMATS]
        )
    return outputs | {key: np.transpose(values) for key, values in by_format.items()}


def observed(x, suite: Suite = LENS) -> dict[str, np.ndarray]:
    """Outputs of ordinary tokens, by format where there is one."""
    strata = np.zeros((4, *x.shape[:2]), np.float32)
    strata[[0, 3]] = 1
    strata = torch.as_tensor(strata) if isinstance(x, torch.Tensor) else strata
    observation = ActivationObservation(x, strata)
    state = suite.update(suite.init(observation.layout, x), observation)
    outputs = suite.finalise(state, observation.layout)
    return {
        name: np.asarray(out.values)[0] if out.dims[0] == "stratum" else np.asarray(out.values)
        for name, out in outputs.items()
    }


@pytest.fixture(scope="module")
def noise() -> dict[str, np.ndarray]:
    return observed(torch.randn(1, 192, 2048, generator=torch.Generator().manual_seed(1)))


def test_gaussian_floors(noise) -> None:
    for statistic in ("collateral_loss", "effective_bits", "zeroed_fraction"):
        np.testing.assert_allclose(
            noise[statistic], noise[f"{statistic}_on_noise"], rtol=0.04, atol=1e-5, err_msg=statistic
        )
    np.testing.assert_allclose(noise["scale_headroom"], noise["scale_headroom_on_noise"], atol=0.01)
    np.testing.assert_allclose(noise["block_crest"], [2.11, 2.366, 2.834], rtol=0.005)
    nvfp4, mxfp4, mxfp8, _, int4, _ = noise["effective_bits"]
    assert (nvfp4, mxfp4, mxfp8, int4) == pytest.approx((3.39, 3.12, 5.09, 3.09), abs=0.01)
    assert noise["collateral_loss"][0] == pytest.approx(0.012, abs=5e-4)


def decibels(x: torch.Tensor, factor: float = 1.0) -> float:
    """Signal to noise of a whole tensor in NVFP4, its channel 21 multiplied by a factor."""
    x = x.numpy().astype(np.float64)[0]
    x[:, 21] *= factor
    peak = np.full(len(x), np.abs(x).max())
    blocks = [Rounded("nvfp4", x[:, s], peak) for s in slices(x.shape[1], 16)]
    signal, noise = (sum((getattr(b, key) * b.peak**2).sum() for b in blocks) for key in ("signal", "noise"))
    return 10 * np.log10(signal / noise)


def test_a_hot_channel_raises_the_tensor_and_halves_its_neighbours(noise) -> None:
    x = torch.randn(1, 192, 2048, generator=torch.Generator().manual_seed(1))
    x[..., 21] *= 40

    assert (decibels(x, 1 / 40), decibels(x)) == pytest.approx((20.4, 21.4), abs=0.1)
    hot = observed(x, Suite([CollateralLoss()]))
    blocks = hot["nvfp4_block_collateral_loss"]
    assert blocks.argmax() == 1
    assert blocks[1] == pytest.approx(0.49, abs=0.03)
    np.testing.assert_allclose(np.delete(blocks, 1), 0.0124, atol=2e-3)
    assert hot["collateral_loss_max"][0] > 0.9
    assert hot["collateral_loss"][0] > 1.2 * noise["collateral_loss"][0]


def test_a_massive_activation_takes_the_scales_of_its_sequence_alone() -> None:
    x = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(2))
    x[0, 0, 3] = 1e6
    whole = observed(x)
    assert whole["scale_underflow_fraction"].tolist()[1:] == [0] * 5
    assert whole["scale_underflow_fraction"][0] == pytest.approx(0.5, abs=0.01)
    other = observed(x[1:])
    assert other["scale_underflow_fraction"][0] == 0
    # The other sequence is what it is without this one beside it, whatever the batch.
    parts = [observed(x[:1]), other]
    for name in ("collateral_loss", "zeroed_fraction"):
        np.testing.assert_allclose(whole[name], np.mean([p[name] for p in parts], axis=0), rtol=1e-6)


def test_the_median_is_within_a_bin() -> None:
    x = np.random.default_rng(3).standard_t(3, (2, 33, 96))
    found = observed(x.astype(np.float32))["effective_bits"]
    tokens, peak = x.reshape(-1, 96), np.repeat(np.abs(x).max((1, 2)), 33)
    for name, value in zip(FORMATS, found, strict=True):
        exact = bits([Rounded(name, tokens[:, s], peak) for s in slices(96, WIDTHS[name])])
        assert value == pytest.approx(np.median(exact), abs=1 / 32)


def test_refusals() -> None:
    with pytest.raises(EstimatorError, match=r"no block format is named 'fp4'; there are nvfp4, mxfp4"):
        CollateralLoss(("fp4",))
    with pytest.raises(EstimatorError, match="give one block format or more, each once; got nvfp4, nvfp4"):
        CollateralLoss(("nvfp4", "nvfp4"))
    with pytest.raises(EstimatorError, match="each once; got none"):
        CollateralLoss(())
