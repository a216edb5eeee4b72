"""The live page without a browser: what is small enough to send, and what its pictures hold."""

import json

import numpy as np
import pytest

from osp_diag.figures.live._data import MOST_BINS, Choice, chosen, curve, extremes, of_layers, offered, sinks
from osp_diag.figures.live._layout import labels_of
from osp_diag.figures.live._page import pictures
from tests.growing_runs import FLOOR, WIDTH, followed, grown_run, written

# -- small enough to send --------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_extremes_and_its_ends():
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000)
    values[[1234, 8765]] = 50.0, -50.0
    steps, kept = curve(np.arange(10_000), values)
    assert len(kept) <= 2 * MOST_BINS + 2
    assert steps[kept.argmax()] == 1234
    assert steps[kept.argmin()] == 8765
    assert (steps[0], steps[-1]) == (0, 9999)
    assert (np.diff(steps) > 0).all()


def test_a_gap_stays_a_gap():
    values = np.ones(5000)
    values[2000:3000] = np.nan
    kept = extremes(values, 100)
    assert np.isnan(values[kept]).any()
    assert len(extremes(np.ones(7), 100)) == 7


def test_a_spike_of_one_step_is_in_the_map_and_in_the_curve(tmp_path):
    courses = np.ones((2, 700))
    courses[1, 333] = 90.0
    run = written(tmp_path / "run.zarr", courses)
    drawn = pictures([run], Choice((0,)))
    z = np.array(drawn["kurtosis-maps"]["data"][0]["customdata"])
    assert z.shape == (2, MOST_BINS)
    assert z.max() == pytest.approx(90 * FLOOR, rel=1e-4)
    line = drawn["kurtosis-curves"]["data"][0]
    assert max(line["y"]) == pytest.approx(90 * FLOOR, rel=1e-4)
    assert line["x"][int(np.argmax(line["y"]))] == 333


def test_what_is_sent_does_not_grow_with_the_run(tmp_path):
    sizes = [
        len(json.dumps(pictures([written(tmp_path / f"{count}.zarr", np.ones((4, count)))], Choice((0,)))))
        for count in (650, 1300)
    ]
    assert sizes[1] < 1.2 * sizes[0]


# -- what the pictures hold ------------------------------------------------------------------------------


def test_curves_are_of_the_chosen_layer_tokens_and_statistic(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))

    def line(**changes):
        return pictures([run], Choice((0,), **changes))["kurtosis-curves"]["data"][0]["y"]

    assert line(layer="0")[-1] == pytest.approx(1.5 * FLOOR, rel=1e-4)
    assert line(layer="largest")[-1] == pytest.approx(4.5 * FLOOR, rel=1e-4)
    assert line(layer="mean")[-1] == pytest.approx(3.0 * FLOOR, rel=1e-4)
    assert line(layer="2", stratum="first")[-1] == pytest.approx(9.0 * FLOOR, rel=1e-4)
    assert line(statistic="max_median_ratio")[-1] == pytest.approx(3 + 4.5 * FLOOR, rel=1e-4)
    assert line(site="embedding")[-1] == pytest.approx(FLOOR, rel=1e-4)
    assert line(layer="17") == [None] * 6


def test_maps_of_several_runs_share_one_scale_of_colours(tmp_path):
    low, high = (
        written(tmp_path / f"{name}.zarr", [[1.0, 1.0], [1.0, top]], attributes={"model_name": name})
        for name, top in (("low", 2.0), ("high", 300.0))
    )
    drawn = pictures([low, high], Choice((0, 1)))["kurtosis-maps"]
    assert [trace["coloraxis"] for trace in drawn["data"]] == ["coloraxis", "coloraxis"]
    assert drawn["layout"]["coloraxis"]["cmin"] == pytest.approx(np.log10(FLOOR))
    assert drawn["layout"]["coloraxis"]["cmax"] == pytest.approx(np.log10(300 * FLOOR))
    assert [note["text"] for note in drawn["layout"]["annotations"]] == ["low", "high"]
    bottoms = [drawn["layout"][f"yaxis{suffix}"]["domain"] for suffix in ("", "2")]
    assert bottoms[0][0] > bottoms[1][1], "the first on top"


def test_a_statistic_that_falls_with_outliers_is_not_cut_off_at_what_noise_scores(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))
    drawn = pictures([run], Choice((0,), statistic="participation_ratio", layer="2"))
    expected = WIDTH / (1 + 4.5 * FLOOR)
    assert drawn["kurtosis-curves"]["data"][0]["y"][-1] == pytest.approx(expected, rel=1e-4)
    assert drawn["kurtosis-curves"]["layout"]["shapes"] == []
    assert drawn["kurtosis-maps"]["data"][0]["z"][2][-1] == pytest.approx(np.log10(expected), rel=1e-3)


def test_sinks_are_the_mean_over_heads(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))
    assert sinks(run).dims == ("step", "layer")
    np.testing.assert_allclose(sinks(run).values, 0.25)
    drawn = pictures([run], Choice((0,)))
    assert drawn["sink-curves"]["layout"]["yaxis"]["range"] == [0, 1.02]
    np.testing.assert_allclose(of_layers(sinks(run), "mean"), 0.25)


def test_a_run_that_lacks_the_choice_leaves_the_others_on_view(tmp_path):
    whole = followed(grown_run(tmp_path / "whole.zarr"))
    waiting = followed(tmp_path / "waiting.zarr")
    drawn = pictures([waiting, whole], Choice((0, 1)))
    assert len(drawn["kurtosis-maps"]["data"]) == 1
    assert pictures([waiting], Choice((0,)))["loss"]["data"] == []
    assert chosen(whole, Choice((0,), site="attention", statistic="sink_rate")) is None


def test_what_can_be_chosen_is_what_the_runs_hold(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))
    offer = offered([run], Choice((0,)))
    assert offer.sites == ["embedding", "residual_post", "final_norm"]
    names = ["osp_excess_kurtosis", "max_median_ratio", "nonfinite_token_count", "participation_ratio"]
    assert offer.statistics == names
    assert offer.strata == ["all", "first", "delimiter", "rest"]
    assert offer.layers == [0, 1, 2]
    assert offered([], Choice(())).sites == []


def test_runs_are_told_apart(tmp_path):
    runs = [
        followed(grown_run(tmp_path / folder / "run.zarr"))
        for folder in ("a", "b")
        if _made(tmp_path / folder)
    ]
    assert labels_of(runs) == [f"grown ({run.path})" for run in runs]
    other = followed(grown_run(tmp_path / "other.zarr", model_name="other"))
    assert labels_of([runs[0], other]) == ["grown", "other"]


def _made(folder):
    folder.mkdir()
    return True


def test_a_name_that_is_markup_is_text(tmp_path):
    name = "<b>bold</b><img src=x onerror=alert(1)>"
    run = followed(grown_run(tmp_path / "run.zarr", model_name=name))
    drawn = json.dumps(pictures([run], Choice((0,))))
    assert "<b>" not in drawn
    assert "<img" not in drawn
    assert "&lt;b&gt;bold" in drawn
