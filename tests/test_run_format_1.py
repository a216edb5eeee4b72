"""A run that an earlier version wrote (``run_of_format_1.zip``, by commit 4f48a49) is read and continued."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from osp_diag import open_run
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import ATTRIBUTES, check_run, groups

STORED = Path(__file__).parent / "run_of_format_1.zip"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with zipfile.ZipFile(STORED) as archive:
        archive.extractall(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def test_it_is_read(path: Path) -> None:
    assert check_run(path, every=10) == [0, 10, 20]
    run = open_run(path)
    assert run.sites == ["residual_post", "linear_input:mlp.down_proj"]
    # 100·step + 10·layer + stratum
    assert run.at("residual_post")["osp_excess_kurtosis"].sel(step=10, layer=2, stratum="rest") == 1023.0
    assert (
        run.at("residual_post")["osp_excess_kurtosis"].attrs["long_name"] == "excess kurtosis, OSP's formula"
    )
    assert run.raw("residual_post")["moments.fourth"].sel(step=20).values.tolist() == [[20.1] * 4] * 3
    np.testing.assert_array_equal(run.series["loss"], [0.0, 2.5, 5.0, 7.5, 10.0, 12.5])
    assert run.snapshot("residual_post")["token_text"].values.tolist() == ["The", " café", "\n", "<script>"]


def test_it_is_followed(path: Path) -> None:
    followed = FollowedRun(path)
    followed.refresh()
    assert followed.steps.tolist() == [0, 10, 20]
    values = followed.values("residual_post", "osp_excess_kurtosis", {"stratum": "all"})
    assert values.sel(step=20, layer=1) == 2010.0


def test_it_is_continued(path: Path) -> None:
    with RunWriter(path, ATTRIBUTES, resume=True) as writer:
        assert writer.last_step == 20
        writer.append(30, groups(30))
    assert check_run(path, every=10) == [0, 10, 20, 30]


def test_packed_it_is_read_too() -> None:
    with zipfile.ZipFile(STORED) as archive:
        assert archive.testzip() is None
    run = open_run(STORED)
    xr.testing.assert_equal(
        run.at("residual_post").isel(step=1, drop=True).load(), groups(10)["residual_post"]
    )
