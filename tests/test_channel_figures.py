"""The figures that compare channels, on runs whose channels are known."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from osp_diag.errors import UsageError
from osp_diag.figures.backend import none
from osp_diag.figures.styles import load_style
from tests.channel_runs import channel_run, profile


def recording(name: str, runs: list, **options) -> tuple[xr.Dataset, none.Canvas]:
    from osp_diag.figures._registry import figure_module

    module = figure_module(name)
    prepared = module.prepare(runs, **options)
    return prepared, module.draw(prepared, none, style=load_style("paper"), width="two-column")


@pytest.fixture(scope="module")
def planted():
    """1,000 channels: 3 is hot in both, 500 in the first, 501 in the second."""
    both = [
        channel_run({"residual_post": np.stack([profile(1000), profile(1000, hot)])}, model_name=name)
        for name, hot in (("one", {3: 10.0, 500: 100.0}), ("two", {3: 10.0, 501: 1000.0}))
    ]
    return both


def test_spikes_of_either_run_survive_in_maps_and_difference(planted):
    found, canvas = recording("channel_map_comparison", planted, pixels=10)
    assert found["value"].sel(run="one", layer=1, column=5).item() == 100
    assert found["value"].sel(run="two", layer=1, column=5).item() == 1000
    expected = np.zeros((2, 10))
    expected[1, 5] = -3  # both spikes lie in one column; the farthest from 0 stays
    np.testing.assert_allclose(found["difference"], expected, atol=1e-6)
    assert found["hot_channel"].sel(run="one").values[:2].tolist() == [500, 3]
    assert np.isnan(found["hot_channel"].values[:, 2:]).all()
    assert "channels matched by index" in found.attrs["caption"]
    assert [bar["scale"].kind for bar in canvas.colour_bars] == ["log", "linear"]
    assert canvas.colour_bars[1]["scale"].low == -canvas.colour_bars[1]["scale"].high
    fine, _ = recording("channel_map_comparison", planted, pixels=1000)
    assert fine["difference"].max().item() == pytest.approx(2)
    assert fine["difference"].min().item() == pytest.approx(-3)


def test_other_widths_are_compared_by_profile(planted):
    narrow = channel_run(
        {"residual_post": np.stack([profile(64), profile(64, {9: 10.0})])}, model_name="narrow"
    )
    found, canvas = recording("channel_map_comparison", [planted[0], narrow])
    assert found.attrs["match"] == "profile"
    assert found["difference"].sel(difference_layer=1).values[0] == pytest.approx(1)  # 100 against 10
    assert found["difference"].sel(difference_layer=1).values[-1] == pytest.approx(0)
    ticks = next(call for name, call in canvas.panels[2, 0].calls if name == "ticks")
    assert ticks["texts"] == ["0.1%", "1%", "10%", "100%"]
    with pytest.raises(UsageError, match="residual_post has 1000 and 64 channels, which no index matches"):
        recording("channel_map_comparison", [planted[0], narrow], match="index")


def test_one_run_is_compared_with_itself_at_another_step(planted):
    run = channel_run({"residual_post": profile(20, {4: 10.0})}, earlier={"residual_post": profile(20)})
    found, _ = recording("channel_map_comparison", [run])
    assert list(found["run"].values) == ["made-up, step 0", "made-up, step 7"]
    assert found["difference"].values[0, 4] == pytest.approx(-1)
    with pytest.raises(UsageError, match="needs two runs, or two steps of one; of the run of one there is"):
        recording("channel_map_comparison", planted[:1])
    with pytest.raises(UsageError, match="takes two runs, or one; it was given 3"):
        recording("channel_map_comparison", [*planted, run])
    with pytest.raises(UsageError, match="match is index or profile, not 'name'"):
        recording("channel_map_comparison", planted, match="name")


def test_concentration_curves_are_those_of_the_channels(planted):
    found, canvas = recording("concentration_curves", planted)
    first = found.sel(run="one", layer=1).isel(point=0)
    assert first["count"].item() == 1
    assert first["energy_share"].item() == pytest.approx(1e4 / (1e4 + 100 + 998))
    np.testing.assert_allclose(found["energy_share"].sel(layer=0), found["count"] / 1000)
    assert float(found["energy_share"].isel(point=-1).min()) == pytest.approx(1)
    lines = [call["label"] for name, call in canvas.panels[0, 0].calls if name == "line"]
    assert lines == ["layer 0", "layer 1", "equal channels"]
    with pytest.raises(UsageError, match="concentration_curves: no stratum is named 'last'; there are all"):
        recording("concentration_curves", planted, stratum="last")


def test_depths_that_differ_are_named_by_their_share(planted):
    deep = channel_run({"residual_post": np.stack([profile(30)] * 5)}, model_name="deep")
    _, canvas = recording("concentration_curves", [planted[0], deep])
    lines = [call["label"] for name, call in canvas.panels[0, 1].calls if name == "line"]
    assert lines == ["depth 0%", "depth 25%", "depth 50%", "depth 75%", "depth 100%", "equal channels"]
