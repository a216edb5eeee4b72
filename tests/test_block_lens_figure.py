"""The figure of the block lens: what it takes from a run, what it draws, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from osp_diag import Run, figures
from osp_diag.errors import StoreError, UsageError

FORMATS = ["nvfp4", "mxfp4"]
STRATA = ["all", "first", "delimiter", "rest"]


def made_up_run(*sites: str) -> Run:
    """By layer, stratum and format: 0.01 · (layer + 1), doubled in MXFP4, and 4 − layer bits."""
    shape = (3, 4, 2)
    loss = np.broadcast_to(0.01 * np.arange(1, 4)[:, None, None] * [1, 2], shape)
    bits = np.broadcast_to(4.0 - np.arange(3)[:, None, None], shape)
    dims = ("layer", "stratum", "block_format")
    floor = ("layer", "block_format")
    group = xr.Dataset(
        {
            "collateral_loss": (dims, loss, {"estimator": "collateral_loss/1"}),
            "effective_bits": (dims, bits, {"estimator": "effective_bits/1"}),
            "collateral_loss_on_noise": (floor, np.full((3, 2), 0.012)),
            "effective_bits_on_noise": (floor, np.full((3, 2), 3.39)),
        },
        {"layer": [0, 1, 2], "stratum": STRATA, "block_format": FORMATS},
    )
    return Run.in_memory([(0, dict.fromkeys(sites, group))], {}, {"model_name": "made-up"})


def test_it_takes_the_sites_that_were_looked_at() -> None:
    run = made_up_run("mlp_hidden", "attention_input", "residual_post")
    data = figures.draw("block_lens", [run, run], backend="none", block_format="mxfp4", stratum="rest")
    assert data["site"].values.tolist() == ["attention_input", "mlp_hidden"]
    found = data["collateral_loss"].sel(site="mlp_hidden").isel(run=1)
    np.testing.assert_allclose(found, [0.02, 0.04, 0.06])
    np.testing.assert_allclose(data["effective_bits"].isel(run=0, site=0), [4, 3, 2])
    assert (data["collateral_loss_on_noise"] == 0.012).all()
    assert "collateral_loss/1, effective_bits/1" in data.attrs["caption"]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="no block_format 'fp4' at mlp_input; it has nvfp4, mxfp4"):
        figures.draw("block_lens", made_up_run("mlp_input"), backend="none", block_format="fp4")
    with pytest.raises(UsageError, match="no stratum 'cls' at mlp_input; it has all, first"):
        figures.draw("block_lens", made_up_run("mlp_input"), backend="none", stratum="cls")
    with pytest.raises(StoreError, match="block_lens needs the site 'attention_input'"):
        figures.draw("block_lens", made_up_run("residual_post"), backend="none")
