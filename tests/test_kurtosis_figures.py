"""Kurtosis by stratum, and by every definition: the runs' own numbers, floors and ceilings."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from osp_diag import Probe
from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.run import Run
from tests.families import FAMILIES
from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run, without
from tests.test_figures import data, recording

PLAN = Plan()
KURTOSES = (
    "fisher_kurtosis/1",
    "neuron_kurtosis/1",
    "neuron_kurtosis_variance/1",
    "osp_excess_kurtosis/1",
    "pearson_kurtosis/1",
    "pooled_kurtosis/1",
)


@pytest.fixture(scope="module")
def run():
    return synthetic_run(PLAN)


@pytest.fixture(scope="module")
def tiny():
    family = FAMILIES["llama"]
    probe = Probe(family.build())
    with probe.step(0):
        probe.model(**family.inputs())
    return probe.run


def calls(panel, primitive: str) -> list[dict]:
    return [call for name, call in panel.calls if name == primitive]


# -- strata ----------------------------------------------------------------------------------------------


def test_strata_hold_the_runs_own_numbers(run):
    found = data("stratum_comparison", run)
    site = run.at("residual_post").isel(step=-1)
    for name, own in (("kurtosis", "osp_excess_kurtosis"), ("ratio", "max_median_ratio")):
        np.testing.assert_array_equal(found[name].isel(run=0), site[own])
    spiked = found.sel(layer=5).isel(run=0)["ratio"]
    assert spiked.sel(stratum="first") > 100 * spiked.sel(stratum="rest")
    assert found["kurtosis_ceiling"].item() == PLAN.channels - 3
    assert np.isnan(found["ratio_ceiling"].item())
    for said in ("osp_excess_kurtosis/1, max_median_ratio/1", "all is their union", "step 0"):
        assert said in found.attrs["caption"]


def test_strata_of_one_run_stand_beside_each_other_of_several_above(run):
    one = recording("strata", run)
    assert one.shape == (1, 2)
    assert [call["label"] for call in calls(one.panels[0, 0], "line")] == [
        "all tokens",
        "first",
        "delimiter",
        "rest",
    ]
    assert [call["text"] for call in calls(one.panels[0, 0], "level")] == ["floor 0.244", "ceiling 61"]
    several = recording("stratum_comparison", [run, synthetic_run(OUTLIER_FREE)])
    assert several.shape == (2, 2)
    assert several.panels[0, 1].labels["title"] == "made-up-osp-60M"
    assert several.panels[1, 0].labels["y_label"] == "max_median_ratio/1"
    limits = [calls(several.panels[0, column], "limits")[0]["high"] for column in (0, 1)]
    assert limits[0] == limits[1]


def test_a_stratum_without_tokens_is_left_out_and_a_signed_kurtosis_is_linear():
    alone = recording("stratum_comparison", synthetic_run(protocol="osp-published"))
    assert [call["label"] for call in calls(alone.panels[0, 0], "line")] == ["all tokens", "first"]
    signed = recording("stratum_comparison", synthetic_run(OUTLIER_FREE), estimator="fisher_kurtosis")
    assert signed.panels[0, 0].labels["y_scale"] == "linear"
    assert signed.panels[0, 1].labels["y_scale"] == "log"


def test_a_statistic_without_strata_is_refused(run):
    with pytest.raises(UsageError, match="median_magnitude has the dimensions layer; give a statistic by"):
        data("stratum_comparison", run, ratio="median_magnitude")
    with pytest.raises(
        StoreError, match="stratum_comparison needs pooled_kurtosis at 'residual_post', which"
    ):
        data("stratum_comparison", run, estimator="pooled_kurtosis")


# -- definitions -----------------------------------------------------------------------------------------


def test_every_kurtosis_that_a_probe_measures_is_found(tiny):
    found = data("estimator_disagreement", tiny).isel(run=0)
    assert tuple(found["estimator"].values) == KURTOSES
    site = tiny.at("residual_post").isel(step=0).sel(stratum="all")
    for estimator in KURTOSES:
        name = estimator.partition("/")[0]
        own = found.sel(estimator=estimator)
        np.testing.assert_array_equal(own["kurtosis"], site[name])
        for end in ("floor", "ceiling"):
            bound = site[name].attrs.get(end, np.nan)
            np.testing.assert_array_equal(own[end], np.full(2, bound))
    assert all(estimator in found.attrs["caption"] for estimator in KURTOSES)


def test_a_kurtosis_added_later_is_found_by_its_title():
    values = xr.DataArray(
        np.ones((2, 4)),
        dims=("layer", "stratum"),
        coords={"layer": [0, 1], "stratum": ["all", "first", "delimiter", "rest"]},
    )
    told = {"estimator": "tail_weight/3", "long_name": "Kurtosis of somebody"}
    groups = {
        "residual_post": xr.Dataset(
            {
                "tail_weight": values.assign_attrs(told),
                "tail_weight_max": values.assign_attrs(told),
                "spread": values.assign_attrs(estimator="spread/1", long_name="Spread"),
            }
        )
    }
    found = data("disagreement", Run.in_memory([(0, groups)], {}, {}))
    assert list(found["estimator"].values) == ["tail_weight/3"]


def test_sites_keep_the_order_of_the_network_and_their_own_widths(tiny):
    found = data("estimator_disagreement", [tiny, tiny], by="site", stratum="rest").isel(run=1)
    places = list(found["place"].values)
    assert places == [site for site in tiny.sites if "osp_excess_kurtosis" in tiny.at(site)]
    own = tiny.at("mlp_hidden")["osp_excess_kurtosis"].isel(step=0).sel(stratum="rest")
    hidden = found.sel(place="mlp_hidden", estimator="osp_excess_kurtosis/1")
    assert hidden["kurtosis"].item() == pytest.approx(float(own.mean()))
    assert hidden["ceiling"].item() == 48 - 3
    assert found.sel(place="value", estimator="osp_excess_kurtosis/1")["ceiling"].item() == 16 - 3
    ticks = calls(recording("estimator_disagreement", tiny, by="site").panels[0, 0], "ticks")
    assert ticks[0]["texts"] == places


def test_floor_and_ceiling_are_drawn_beside_the_values(tiny):
    canvas = recording("estimator_disagreement", tiny)
    ranges = canvas.panels[0, 1]
    assert calls(ranges, "ticks")[0]["texts"][3] == "osp_excess_kurtosis"
    width = calls(ranges, "limits")[1]
    lines = calls(ranges, "line")
    osp, pooled = lines[3]["x"], lines[5]["x"]
    assert osp.tolist() == pytest.approx([tiny.at("residual_post")["osp_excess_kurtosis"].attrs["floor"], 29])
    assert pooled[1] == width["high"]  # it has no ceiling
    dots = calls(ranges, "scatter")[1]
    assert dots["texts"] == ["layer 0", "layer 1"]


def test_what_cannot_be_shown_is_refused(run):
    with pytest.raises(UsageError, match="by is layer or site, not 'head'"):
        data("estimator_disagreement", run, by="head")
    with pytest.raises(UsageError, match="stratum is one of all, first, delimiter, rest, not 'last'"):
        data("estimator_disagreement", run, stratum="last")
    with pytest.raises(StoreError, match="holds no site 'value'; it has embedding"):
        data("estimator_disagreement", run, site="value")
    bare = without(run, ["residual_post/osp_excess_kurtosis", "residual_post/fisher_kurtosis"])
    with pytest.raises(StoreError, match="holds no kurtosis at 'residual_post'; probe again with osp_excess"):
        data("estimator_disagreement", bare)
