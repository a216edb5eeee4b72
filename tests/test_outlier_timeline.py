"""The timeline of outliers: its numbers, its onsets, and what it says of odd runs."""

from __future__ import annotations

import numpy as np
import pytest

from osp_diag import figures
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures import outlier_timeline
from osp_diag.figures.backend import none
from osp_diag.figures.styles import load_style
from tests.emerging_runs import FLOOR, Course, Training, emerging_run
from tests.recipe_runs import training_run
from tests.synthetic_runs import synthetic_run

SITES = ("residual_post", "embedding")


def data(runs, **options):
    return figures.draw("outlier_timeline", runs, backend="none", **options)


@pytest.fixture(scope="module")
def run():
    return emerging_run(Training(sites=SITES))


def test_values_are_multiples_of_the_noise_at_the_probed_steps(run):
    found = data(run, stratum="rest", draws=10).isel(run=0)
    assert found["step"].values.tolist() == list(range(0, 400, 10))
    kurtosis = run.at("residual_post")["osp_excess_kurtosis"].sel(stratum="rest").transpose("layer", "step")
    np.testing.assert_allclose(found["value"].transpose("layer", "column"), kurtosis / FLOOR)
    assert found.attrs["quantity"] == "osp_excess_kurtosis/1\n\u00f7 noise"


def test_onsets_are_marked_in_columns(run):
    found = data(run, stratum="rest", draws=20).isel(run=0)
    assert np.isnan(found["onset"][0])
    np.testing.assert_allclose(found["onset"][1:], [10, 16, 16], atol=3)  # steps 100 and 160, every 10
    assert (found["onset_low"] < found["onset"])[1:].all()
    assert "Dots: onset, the first probed step told from noise" in found.attrs["caption"]


def test_what_is_drawn(run):
    prepared = outlier_timeline.prepare([run, emerging_run(Training(courses={}, sites=SITES))], draws=5)
    canvas = outlier_timeline.draw(prepared, none, style=load_style("paper"), width="two-column")
    first, second = canvas.panels.values()
    calls = [name for name, _ in first.calls]
    assert calls.count("line") == 3
    assert calls.count("scatter") == 1
    assert "scatter" not in [name for name, _ in second.calls]
    scales = {call["scale"] for panel in (first, second) for name, call in panel.calls if name == "heat_map"}
    assert len(scales) == 1
    assert next(iter(scales)).low == 1.0


def test_runs_of_several_lengths_and_widths_of_step_keep_their_own_columns(run):
    short = emerging_run(
        Training(steps=(0, 5, 50), sites=SITES, courses={("residual_post", 3): Course(0, 10)})
    )
    found = data([run, short], draws=5)
    assert found["run"].values.tolist() == ["made-up, step 390", "made-up, step 50"]
    assert found["marked"].values.tolist() == [True, False]
    assert np.isnan(found["step"].isel(run=1)[3:]).all()
    assert found["step"].isel(run=1)[:3].values.tolist() == [0, 5, 50]
    assert "No onsets for made-up, step 50: fewer than 5 probed steps" in found.attrs["caption"]


def test_long_runs_are_pooled_and_keep_their_spikes():
    training = Training(
        steps=range(0, 900, 10), sites=SITES, courses={("residual_post", 2): Course(405, 1, 500)}, wobble=0
    )
    run = emerging_run(training)
    found = data(run, stratum="rest", pixels=30, draws=5).isel(run=0)
    assert found.sizes["column"] == 30
    assert found["step"].values[:3].tolist() == [0, 30, 60]
    assert float(found["value"].max()) == pytest.approx(500)
    assert float(found["onset"].sel(layer=2)) == 13  # step 410 lies in the column from 390 on
    assert "the maximum over neighbouring probed steps, 30 in all" in found.attrs["caption"]


@pytest.mark.parametrize(("width", "rotation"), [("two-column", 0), ("one-column", 90)])
def test_long_steps_are_turned_only_where_they_would_touch(width, rotation):
    run = emerging_run(Training(steps=range(0, 90000, 1500), courses={}, sites=SITES))
    figure = figures.draw("outlier_timeline", run, backend="matplotlib", width=width, draws=0)
    assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {rotation}


def test_it_has_the_recipes_names():
    runs = [training_run("Adam", [0.1, 0.2, 1, 4, 8, 16]), training_run("OSP", [0.1] * 6)]
    found = data(runs, draws=5)
    assert found["run"].values.tolist() == ["Adam", "OSP"]
    assert np.isfinite(found["onset"].sel(run="Adam")).all()
    assert np.isnan(found["onset"].sel(run="OSP")).all()


def test_refusals(run):
    with pytest.raises(UsageError, match="stratum is one of all, first, delimiter, rest, not 'bos'"):
        data(run, stratum="bos")
    with pytest.raises(UsageError, match="pixels must be at least 1, not 0"):
        data(run, pixels=0)
    with pytest.raises(StoreError, match="holds no osp_excess_kurtosis at 'attention'; it has the sites"):
        data(synthetic_run(), site="attention")
