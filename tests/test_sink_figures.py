"""The figures of sinks: logit densities, one head's sink by channel and frequency, emergence by head."""

from __future__ import annotations

import numpy as np
import pytest

from osp_diag import figures
from osp_diag.analyses.sinks.implementation import logit_edges, sink_implementation
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures import logit_densities, sink_emergence
from osp_diag.figures import sink_implementation as head_figure
from osp_diag.figures.backend import none
from osp_diag.figures.styles import load_style
from tests.sink_runs import HOT, WIDTH, sink_run
from tests.synthetic_runs import without

PLANTED = ("negative infinity", "no sink", "balanced")


@pytest.fixture(scope="module")
def run():
    steps = {0: ("no sink",) * 3, 10: ("mixed", "no sink", "no sink"), 20: PLANTED, 40: PLANTED}
    return sink_run(steps, name="planted")


@pytest.fixture(scope="module")
def quiet():
    return sink_run({7: ("no sink",) * 3}, name="quiet")


def data(name, runs, **options):
    return figures.draw(name, runs, backend="none", **options)


def recording(module, runs, **options) -> none.Canvas:
    prepared = module.prepare(runs, **options)
    canvas: none.Canvas = module.draw(prepared, none, style=load_style("paper"), width="two-column")
    return canvas


def calls(panel, which: str) -> list:
    return [call for name, call in panel.calls if name == which]


# -- logit densities -------------------------------------------------------------------------------------


def test_densities_are_the_mean_over_sink_heads_or_over_all_where_none_sinks(run, quiet):
    found = data("fig6", [run, quiet])
    assert found["heads"].values.tolist() == ["4 sink heads of 12", "all 12 heads, none sinks"]
    own = run.at("attention")["logit_density"].sel(step=40, head=[0, 4]).mean(("layer", "head"))
    np.testing.assert_allclose(found["density"].sel(run="planted"), own, rtol=1e-6)
    widths = np.diff(logit_edges(found["logit_bin"].values))
    np.testing.assert_allclose((found["density"] * widths).sum("logit_bin"), 1, rtol=1e-6)
    assert found["median"].sel(run="quiet").values == pytest.approx([0, 0], abs=0.1)
    assert "logit_distribution/1, sink_rate/1" in found.attrs["caption"]
    assert "Mean over 4 sink heads of 12 / all 12 heads, none sinks" in found.attrs["caption"]


def test_one_head_or_one_layer_can_be_asked_for(run):
    one = data("logit_densities", run, layer=1, head=0)
    assert one["heads"].item() == "layer 1, head 0"
    assert one["median"].sel(key_class="sink").item() == pytest.approx(1, abs=0.1)
    assert one["median"].sel(key_class="other").item() == pytest.approx(-9, abs=0.2)
    assert data("logit_densities", run, layer=0)["heads"].item() == "2 sink heads of 6 of layer 0"
    assert data("logit_densities", run, step=0)["heads"].item() == "all 12 heads, none sinks"
    with pytest.raises(UsageError, match=r"the run of planted has no head 9; it has 0, 1, 2, 3, 4, 5"):
        data("logit_densities", run, layer=0, head=9)
    with pytest.raises(UsageError, match=r"which layer's head\? give layer too"):
        data("logit_densities", run, head=1)


def test_runs_share_an_axis_unless_told_otherwise_and_no_mass_is_lost(run, quiet):
    shared, own = (data("logit_densities", [run, quiet], axes=axes) for axes in ("shared", "own"))
    assert shared["low"][0] == shared["low"][1] == own["low"].min()
    assert own["low"][1] > own["low"][0]
    assert data("logit_densities", run, limit=10.0)["low"].item() == -10
    canvas = recording(logit_densities, [run, quiet])
    assert len(canvas.panels) == 2
    for panel in canvas.panels.values():
        for line in calls(panel, "line"):
            x, y = np.asarray(line["x"]), np.asarray(line["y"])
            assert np.sum(y) * (x[1] - x[0]) == pytest.approx(0.99, abs=0.011)
    with pytest.raises(UsageError, match=r"axes is shared or own, not 'both'"):
        data("logit_densities", run, axes="both")
    with pytest.raises(UsageError, match=r"limit is -3; it is the largest logit drawn"):
        data("logit_densities", run, limit=-3.0)
    with pytest.raises(StoreError, match=r"logit_densities needs logit_density at 'attention'"):
        data("logit_densities", without(run, ["attention/logit_density"]))


# -- the sink of one head --------------------------------------------------------------------------------


def test_the_strongest_sink_is_shown_by_channel_and_frequency(run, quiet):
    found = data("sink_implementation", [run, quiet])
    strong = found.sel(run="planted")
    assert strong["head"].item() == 0
    assert strong["description"].item() == "negative infinity, concentrated, alignment"
    assert int(np.argmax(strong["channel"].values)) == HOT
    layer = int(strong["layer"].item())
    own = sink_implementation(run, steps=[40]).sel(step=40, layer=layer, head=0)
    np.testing.assert_array_equal(strong["channel"], own["sink_logit_contribution"])
    np.testing.assert_array_equal(strong["frequency"], own["frequency_contribution"])
    assert found["description"].sel(run="quiet").item() == "no sink"
    assert "Class: negative infinity, concentrated, alignment / no sink" in found.attrs["caption"]
    given = data("sink_implementation", run, layer=1, head=4)
    assert given["description"].item() == "balanced, spread, alignment"
    assert "the head given" in given.attrs["caption"]
    with pytest.raises(UsageError, match=r"the run of planted has no layer 5; it has 0, 1"):
        data("sink_implementation", run, layer=5)
    with pytest.raises(StoreError, match=r"sink_implementation needs sink_logit_contribution at 'attention'"):
        data("sink_implementation", without(run, ["attention/sink_logit_contribution"]))


def test_bars_hold_the_channels_and_name_those_that_carry_the_logit(run):
    canvas = recording(head_figure, [run])
    left, right = canvas.panels.values()
    line = calls(left, "line")[0]
    values = data("sink_implementation", run)["channel"].isel(run=0).values
    np.testing.assert_array_equal(np.asarray(line["y"])[::2], values)
    assert len(line["x"]) == 2 * WIDTH
    assert [call["texts"] for call in calls(left, "marks")] == [[str(HOT)]]
    assert [call["texts"] for call in calls(right, "marks")] == [[str(HOT)]]


def test_a_model_without_rotary_embedding_has_no_frequencies(run):
    plain = without(run, ["query_pre_rope", "query_post_rope"])
    assert data("sink_implementation", plain).sizes["rotary_frequency"] == 0
    panel = list(recording(head_figure, [plain]).panels.values())[1]
    assert calls(panel, "annotate")[0]["text"] == "no rotary frequencies"
    both = recording(head_figure, [run, plain])
    assert len(both.panels) == 4


# -- emergence -------------------------------------------------------------------------------------------


def test_emergence_holds_every_heads_sink_rate_and_its_step(run, quiet):
    found = data("sink_emergence", [run, quiet])
    rate = run.at("attention")["sink_rate"].sel(epsilon=0.3, sink_position=0)
    np.testing.assert_array_equal(
        found["sink_rate"].sel(run="planted", step=[0, 10, 20, 40]).transpose("step", "layer", "head"), rate
    )
    assert np.isnan(found["sink_rate"].sel(run="quiet", step=10)).all()
    assert found["emergence_step"].sel(run="planted", layer=1, head=[0, 2, 4]).values.tolist()[::2] == [
        10,
        20,
    ]
    assert np.isnan(found["emergence_step"].sel(run="quiet")).all()
    first, second = recording(sink_emergence, [run, quiet]).panels.values()
    drawn = calls(first, "heat_map")[0]
    assert np.asarray(drawn["values"]).shape == (12, 4)
    dots = calls(first, "scatter")[0]
    np.testing.assert_array_equal(dots["x"], [1, 2, 1, 2])
    np.testing.assert_array_equal(dots["y"], [0, 4, 6, 10])
    assert calls(first, "ticks")[0]["texts"] == ["0", "10", "20", "40"]
    assert not calls(second, "scatter")
    assert calls(second, "ticks")[0]["texts"] == ["7"]
