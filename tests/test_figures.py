"""Figures: their numbers through the ``none`` backend, every format, and what they say of bad input."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from osp_diag import figures
from osp_diag.cli.figure import run as figure_verb
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._colours import ColourScale, colour_table
from osp_diag.figures._decimate import bin_starts, max_pool, spread
from osp_diag.figures._placement import InGallery, InReport
from osp_diag.figures._registry import default_width, figure_module, in_gallery, in_report, summaries
from osp_diag.figures._runs import token_label
from osp_diag.figures.backend import none
from osp_diag.figures.styles import load_style
from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run, without

PLAN = Plan()


@pytest.fixture(scope="module")
def run():
    return synthetic_run(PLAN)


@pytest.fixture(scope="module")
def clean():
    return synthetic_run(OUTLIER_FREE)


def data(name: str, runs, **options) -> xr.Dataset:
    return figures.draw(name, runs, backend="none", **options)


def recording(name: str, runs, **options) -> none.Canvas:
    """What the figure draws, primitive by primitive."""
    module = figure_module(name)
    prepared = module.prepare(runs if isinstance(runs, list) else [runs], **options)
    canvas: none.Canvas = module.draw(prepared, none, style=load_style("paper"), width="two-column")
    return canvas


# -- decimation and colours ------------------------------------------------------------------------------


@given(
    size=st.integers(1, 300), bins=st.integers(1, 64), where=st.integers(0, 299), height=st.floats(1.5, 1e6)
)
def test_a_single_spike_survives_decimation(size, bins, where, height):
    values = np.ones((2, size))
    values[1, where % size] = height
    pooled = max_pool(values, 1, bins)
    assert pooled.shape == (2, min(size, bins))
    assert pooled.max() == height
    column = int(np.searchsorted(bin_starts(size, bins), where % size, side="right")) - 1
    assert pooled[1, column if size > bins else where % size] == height


def test_pooling_ignores_nan_where_a_number_is_near():
    pooled = max_pool(np.array([[np.nan, 3.0, np.nan, np.nan]]), 1, 2)
    np.testing.assert_array_equal(pooled, [[3.0, np.nan]])


@given(wanted=st.lists(st.floats(0, 100), min_size=1, max_size=12), gap=st.floats(0.1, 20))
def test_labels_keep_their_order_and_distance(wanted, gap):
    places = spread(wanted, gap, 0, 100)
    assert min(places) >= -1e-9
    assert max(places) <= 100 + 1e-9
    ordered = [place for _, _, place in sorted(zip(wanted, range(len(wanted)), places, strict=True))]
    distances = np.diff(ordered)
    least = gap if gap * (len(wanted) - 1) < 100 else 0
    assert (distances >= least - 1e-6).all()


def test_colour_scales_agree_on_ends_and_ticks():
    scale = ColourScale.over(np.array([0.0, 0.02, 25_805.0]), kind="log")
    assert (scale.low, scale.high) == (0.02, 25_805.0)
    np.testing.assert_allclose(scale.fraction(np.array([0.0, 0.02, 25_805.0])), [0, 0, 1])
    assert scale.ticks() == [0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0]
    assert ColourScale(0.0, 1.0).ticks() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    symmetric = ColourScale(-50.0, 50.0, "symlog", threshold=1.0)
    np.testing.assert_allclose(symmetric.fraction(np.array([-50.0, 0.0, 50.0])), [0, 0.5, 1])
    assert symmetric.ticks() == [-10.0, -1.0, 0.0, 1.0, 10.0]
    assert len(ColourScale.over(np.array([3.0, 4.5]), kind="log").ticks()) >= 2
    assert ColourScale.over(np.full(3, np.nan)) == ColourScale(0.0, 1.0)


def test_colour_maps_are_read_without_matplotlib_and_can_be_cut_and_reversed():
    whole = colour_table("batlow")
    assert whole.shape == (256, 3)
    np.testing.assert_array_equal(colour_table("batlow_r"), whole[::-1])
    np.testing.assert_array_equal(colour_table("batlow:0.5:1"), whole[128:])
    with pytest.raises(UsageError, match=r"no colour map is named 'batlo'; did you mean batlow"):
        colour_table("batlo")
    with pytest.raises(UsageError, match=r"linear, log, symlog, not 'cubic'"):
        ColourScale(0, 1, "cubic")  # type: ignore[arg-type]


def test_tokens_are_shown_so_that_one_can_read_them():
    assert token_label(" cost") == "cost"
    assert token_label("\u0120day") == "day"
    assert token_label("\n") == "\\n"
    assert token_label("  ") == "\u2423\u2423"
    assert token_label("") == "''"
    assert token_label("incomprehensibilities") == "incomprehen\u2026"


# -- the registry ----------------------------------------------------------------------------------------


def test_every_file_is_a_figure_and_the_paper_gave_some_their_numbers():
    assert {"depth_profile", "sink_map", "sink_implementation"} <= set(figures.names())
    assert {*(f"fig{number}" for number in range(1, 12)), "table2"} <= set(figures.aliases())
    assert figures.aliases()["fig2"] == "activation_surface"
    assert figures.aliases()["fig3"] == figures.aliases()["fig7"] == "kurtosis_dynamics"
    assert figures.aliases()["fig5"] == "qk_magnitude"


def test_every_alias_is_of_one_figure():
    stated = [alias for name in figures.names() for alias in getattr(figure_module(name), "ALIASES", ())]
    assert len(set(stated)) == len(stated)
    assert set(stated).isdisjoint(figures.names())


def test_the_help_of_the_verb_says_what_every_figure_is():
    text = figure_verb.__doc__ or ""
    for name, summary in summaries().items():
        assert summary.aliases == tuple(getattr(figure_module(name), "ALIASES", ()))
        assert f"{', '.join((name, *summary.aliases))}\n          {summary.line}\n" in text
        assert 20 < len(summary.line) < 110, name


def test_a_figure_may_say_nothing_of_its_place(new_figure):
    new_figure("brand_new", '"""Nothing but a line."""\n')
    assert "brand_new" in figures.names()
    assert summaries()["brand_new"] == ("Nothing but a line", ())
    assert in_report("brand_new") == InReport()
    assert in_gallery("brand_new") == InGallery()
    assert default_width("brand_new") == "two-column"


def test_a_place_of_the_wrong_kind_is_refused(new_figure):
    new_figure("brand_new", '"""Nothing."""\nREPORT = "first"\n')
    with pytest.raises(UsageError, match=r"the figure brand_new: REPORT is an InReport of .*, not 'first'"):
        in_report("brand_new")


# -- depth profile ---------------------------------------------------------------------------------------


def test_depth_profile_holds_the_runs_own_numbers(run):
    found = data("depth_profile", run)
    site = run.at("residual_post").isel(step=-1)
    np.testing.assert_array_equal(
        found["top_magnitude"].isel(run=0), site["top_magnitude"].sel(stratum="all")
    )
    np.testing.assert_array_equal(found["median_magnitude"].isel(run=0), site["median_magnitude"])
    np.testing.assert_array_equal(found["kurtosis"].isel(run=0), site["osp_excess_kurtosis"])
    assert found["ceiling"].item() == PLAN.channels - 3
    assert found["floor"].item() == pytest.approx(np.sqrt(24 / (2 * np.pi * PLAN.channels)))


def test_depth_profile_draws_floor_ceiling_and_the_estimators_name(run):
    canvas = recording("depth_profile", run)
    kurtosis = canvas.panels[0, 1]
    assert kurtosis.labels["y_label"] == "osp_excess_kurtosis/1"
    assert "top_magnitude/1" in canvas.panels[0, 0].labels["y_label"]
    assert canvas.panels[0, 0].labels["y_scale"] == "log"
    levels = [call["text"] for name, call in kurtosis.calls if name == "level"]
    assert levels == ["Gaussian floor 0.244", "ceiling 61"]
    strata = [call["label"] for name, call in kurtosis.calls if name == "line"]
    assert strata == ["all tokens", "first", "delimiter", "rest"]


def test_depth_profile_leaves_out_strata_without_tokens():
    canvas = recording("depth_profile", synthetic_run(protocol="osp-published"))
    assert [call["label"] for name, call in canvas.panels[0, 1].calls if name == "line"] == [
        "all tokens",
        "first",
    ]


def test_depth_profile_takes_another_kurtosis_and_steps(run):
    stepped = synthetic_run(steps=(0, 100))
    early, late = data("depth_profile", stepped, step=0), data("depth_profile", stepped)
    assert early["top_magnitude"].max() < 20 < late["top_magnitude"].max()
    assert "step 100" in late.attrs["caption"]
    fisher = data("depth_profile", run, estimator="fisher_kurtosis")
    assert fisher.attrs["estimator"] == "fisher_kurtosis/1"
    assert np.isnan(fisher["floor"].item())
    figures.draw("depth_profile", run, estimator="fisher_kurtosis", backend="plotly")


def test_depth_profile_of_several_runs(run, clean):
    small = synthetic_run(layers=5, channels=32, massive_channels=(17, 21), model_name="smaller")
    beside = recording("depth_profile", [run, clean, small])
    assert beside.shape == (2, 3)
    overlaid = recording("depth_profile", [run, clean, small], arrange="overlaid")
    assert overlaid.shape == (1, 2)
    levels = [call["value"] for name, call in overlaid.panels[0, 1].calls if name == "level"]
    assert len(levels) == 4  # two widths, each with its floor and ceiling
    found = data("depth_profile", [run, small])
    assert np.isnan(found["kurtosis"].sel(run="smaller", layer=5)).all()


def test_depth_profiles_beside_each_other_share_one_legend_above_all(run, clean):
    drawn = figures.draw("depth_profile", [run, clean, run], backend="plotly")
    labelled = [trace for trace in drawn.data if trace.showlegend]
    assert len({trace.legend for trace in labelled}) == 1
    names = ["top 1", "top 2", "top 3", "median", "all tokens", "first", "delimiter", "rest"]
    assert [trace.name for trace in labelled] == names


# -- activation surface ----------------------------------------------------------------------------------


def test_surface_takes_the_layer_with_the_largest_maximum_and_keeps_the_spike(run):
    found = data("fig2", run, sites=("residual_post",), channels=8, tokens=5)
    raw = np.abs(run.snapshot("residual_post")["activation"])
    layer = int(np.argmax(raw.max(("token", "channel")).values))
    assert found["layer"].item() == layer >= PLAN.emergence_layer
    assert found["magnitude"].shape == (1, 1, 5, 8)
    assert found["magnitude"].max().item() == pytest.approx(float(raw.sel(layer=layer).max()))
    assert found["peak_channel"].item() == PLAN.massive_channels[0]
    assert found["peak_token"].item() == 0


def test_surface_of_a_chosen_layer_on_its_own_or_a_shared_scale(run, clean):
    own = recording("activation_surface", [run, clean], layer=5)
    assert own.shape == (2, 2)
    assert own.options["three_dimensional"]
    tops = [call["high"] for panel in own.panels.values() for name, call in panel.calls if name == "limits"]
    assert len(set(tops)) == 4
    shared = recording("activation_surface", [run, clean], layer=5, z_scale="shared")
    tops = [
        call["high"] for panel in shared.panels.values() for name, call in panel.calls if name == "limits"
    ]
    assert len(set(tops)) == 1


def test_surface_names_tokens_only_where_they_are_few(run):
    few = recording("activation_surface", synthetic_run(tokens=6))
    texts = [call["texts"] for name, call in few.panels[0, 0].calls if name == "ticks"]
    assert texts == [["<s>", "The", "cost", "$5", "of", "day"]]
    assert not [1 for name, _ in recording("activation_surface", run).panels[0, 0].calls if name == "ticks"]


# -- channel map -----------------------------------------------------------------------------------------


def test_channel_map_names_the_planted_channels_and_pools_by_maximum(run):
    found = data("channel_map", run, pixels=16)
    hot = found["hot_channel"].values[0]
    assert set(hot[:3].astype(int)) == {*PLAN.massive_channels, PLAN.everyday_channel}
    assert np.isnan(hot[3:]).all()
    site = run.at("residual_post").isel(step=-1)["channel_rms"].sel(stratum="all")
    pooled = site.values.reshape(PLAN.layers, 16, 4).max(-1)
    np.testing.assert_array_equal(found["value"].isel(run=0), pooled)
    assert "maximum over neighbouring channels" in found.attrs["caption"]
    assert "neighbouring" not in data("channel_map", run).attrs["caption"]


def test_channel_map_marks_and_another_statistic(run):
    canvas = recording("channel_map", run, statistic="channel_absolute_maximum", stratum="rest")
    marks = next(call for name, call in canvas.panels[0, 0].calls if name == "marks")
    assert marks == {"x": [5.0], "texts": ["5"]}
    assert canvas.colour_bars[0]["label"] == "channel_absolute_maximum (channel_moments/1)"
    assert canvas.colour_bars[0]["scale"].kind == "log"


# -- sink map --------------------------------------------------------------------------------------------


def test_sink_map_holds_rate_and_attention_and_says_epsilon_length_and_bos(run):
    found = data("sink_map", run)
    site = run.at("attention").isel(step=-1)
    np.testing.assert_array_equal(
        found["sink_rate"].isel(run=0), site["sink_rate"].sel(epsilon=0.3, sink_position=0)
    )
    np.testing.assert_array_equal(
        found["first_token_attention"].isel(run=0), site["first_token_attention"].sel(stratum="all")
    )
    for said in ("\u03b5 = 0.3", "T = 24", "BOS no", "sink_rate/1", "first_token_attention/1"):
        assert said in found.attrs["caption"]
    higher = data("sink_map", run, epsilon=0.8)
    assert (higher["sink_rate"] <= found["sink_rate"]).all()


def test_sink_map_refuses_an_epsilon_that_was_not_measured(run):
    with pytest.raises(UsageError, match=r"has no epsilon 0\.25; it has 0\.1, 0\.2, 0\.3, 0\.8"):
        data("sink_map", run, epsilon=0.25)
    with pytest.raises(UsageError, match=r"has no sink_position 7; it has 0, 1"):
        data("sink_map", run, sink_position=7)


# -- queries and keys ------------------------------------------------------------------------------------


def test_qk_magnitude_takes_the_strongest_sink_head(run):
    found = data("fig5", run)
    layer, head = PLAN.sink_head
    assert (found["layer"].item(), found["head"].item()) == (layer, head)
    assert found["key_head"].item() == head * PLAN.key_value_heads // PLAN.heads
    query = np.abs(run.snapshot("query_post_rope")["activation"].values[layer, head])
    np.testing.assert_allclose(found["query"].isel(run=0), query)
    assert found["sink_rate"].item() == pytest.approx(1.0, abs=1e-3)


def test_qk_magnitude_of_a_chosen_head_needs_no_attention_statistics(run):
    bare = without(run, ["attention"])
    found = data("qk_magnitude", bare, layer=2, head=3, tokens=6)
    assert found["key"].shape == (1, 6, PLAN.head_channels)
    assert found["key_head"].item() == 1
    with pytest.raises(
        StoreError, match=r"qk_magnitude needs the site 'attention', which the run of made-up-60M"
    ):
        data("qk_magnitude", bare)
    within = data("qk_magnitude", run, layer=5)
    assert within["layer"].item() == 5
