"""The figure of a training: its numbers through the backend ``none``, and what it says of odd runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osp_diag import figures
from osp_diag.errors import StoreError, UsageError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.figures import kurtosis_dynamics
from osp_diag.figures._colours import tint
from osp_diag.figures.backend import none
from osp_diag.figures.styles import load_style
from tests.recipe_runs import RECIPES, training_run
from tests.synthetic_runs import synthetic_run, with_attrs, without

ADAM = [0.15, 0.4, 2.0, 13.0]
OSP = [0.15, 0.0, 0.12]


def data(runs, **options):
    return figures.draw("kurtosis_dynamics", runs, backend="none", **options)


def recording(runs, width: str = "two-column", **options) -> none.Canvas:
    prepared = kurtosis_dynamics.prepare(runs, **options)
    canvas: none.Canvas = kurtosis_dynamics.draw(prepared, none, style=load_style("paper"), width=width)
    return canvas


def lines(panel) -> list[dict]:
    return [call for name, call in panel.calls if name == "line"]


@pytest.fixture(scope="module")
def runs():
    return [training_run("Adam", ADAM), training_run("OSP", OSP, every=5)]


def test_it_holds_each_runs_own_numbers_at_its_own_steps(runs):
    found = data(runs)
    assert found["run"].values.tolist() == ["Adam", "OSP"]
    np.testing.assert_allclose(found["kurtosis"].sel(run="Adam"), ADAM)
    np.testing.assert_array_equal(found["kurtosis_step"].sel(run="Adam"), [0, 10, 20, 30])
    np.testing.assert_allclose(found["kurtosis"].sel(run="OSP"), [*OSP, np.nan])
    np.testing.assert_array_equal(found["kurtosis_step"].sel(run="OSP"), [0, 5, 10, np.nan])
    losses = runs[1].series["loss"].values
    np.testing.assert_array_equal(found["loss"].sel(run="OSP")[: len(losses)], losses)
    assert np.isnan(found["loss"].sel(run="OSP")[len(losses) :]).all()
    assert found["floor"].values.tolist() == [gaussian_floor(128)] * 2
    assert found["tokens_per_step"].values.tolist() == [2048, 2048]
    assert "osp_excess_kurtosis/1, mean over hidden states" in found.attrs["caption"]
    first = data(runs, stratum="first")
    np.testing.assert_allclose(first["kurtosis"].sel(run="Adam"), np.multiply(10, ADAM))
    assert "Tokens of the kurtosis: first" in first.attrs["caption"]


def test_the_kurtosis_is_the_mean_over_the_scripts_hidden_states():
    """Embedding, outputs of all blocks but the last, final norm: as `osp_diag.analyses.summary.summary` takes
    it."""
    from osp_diag.runs.headline import headline_kurtosis

    run = synthetic_run(steps=(0, 7, 20))
    found = data(run).isel(run=0)
    for index, step in enumerate((0, 7, 20)):
        assert found["kurtosis"][index].item() == pytest.approx(headline_kurtosis(run, step=step)["all"])


def test_it_draws_two_panels_with_one_legend_and_the_floor(runs):
    canvas = recording(runs)
    assert canvas.shape == (1, 2)
    loss, kurtosis = canvas.panels[0, 0], canvas.panels[0, 1]
    assert kurtosis.labels["y_scale"] == "log"
    assert kurtosis.labels["subtitle"] == "dotted: Gaussian noise, 0.141"
    assert [call["value"] for name, call in kurtosis.calls if name == "level"] == [gaussian_floor(128)]
    assert [call["label"] for call in lines(loss)] == ["", "", "Adam", "OSP"]
    assert [call["label"] for call in lines(kurtosis)] == ["Adam", "OSP"]
    assert [call["colour"] for call in lines(loss)[2:]] == [call["colour"] for call in lines(kurtosis)]
    assert ("legend", {}) in loss.calls
    limits = next(call for name, call in kurtosis.calls if name == "limits")
    assert limits["low"] < gaussian_floor(128) < 13.0 < limits["high"]
    # The clamp of the formula gives 0, which a logarithmic axis has no place for.
    assert lines(kurtosis)[1]["y"][1] == limits["low"]
    assert recording(runs, width="one-column").shape == (2, 1)


def test_the_axis_is_tokens_where_every_run_says_how_many(runs):
    def axis(canvas):
        return canvas.panels[0, 1].labels["x_label"], lines(canvas.panels[0, 1])[0]["x"].tolist()

    said, places = axis(recording(runs))
    assert said == "tokens seen (thousands)"
    assert places == [0, 20.48, 40.96, 61.44]
    assert axis(recording(runs, against="steps")) == ("step", [0, 10, 20, 30])
    million = [with_attrs(run, tokens_per_step=2**20) for run in runs]
    assert axis(recording(million))[0] == "tokens seen (millions)"
    foreign = with_attrs(training_run("Muon", ADAM), tokens_per_step=None, model_name="theirs")
    assert axis(recording([*runs, foreign])) == ("step", [0, 10, 20, 30])
    with pytest.raises(
        StoreError, match=r"run of theirs does not say how many tokens a step takes; draw against"
    ):
        data([*runs, foreign], against="tokens")


def test_six_recipes_keep_their_names_and_get_colours_of_their_own():
    six = [training_run(recipe, ADAM) for recipe in RECIPES]
    canvas = recording(six)
    drawn = lines(canvas.panels[0, 1])
    assert [call["label"] for call in drawn] == list(RECIPES)
    assert len({call["colour"] for call in drawn}) == 6
    seeds = data([training_run("OSP", OSP), training_run("OSP", OSP, seed=1)])
    assert seeds["run"].values.tolist() == ["OSP, seed 0", "OSP, seed 1"]
    assert data([six[0], synthetic_run()])["run"].values.tolist() == ["Adam", "made-up-60M"]


@given(
    values=st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=40),
    share=st.floats(0, 0.99),
)
def test_smoothing_is_the_mean_of_a_window(values, share):
    loss = np.array(values)
    found = kurtosis_dynamics._smoothed(loss, share)
    reach = round(share * len(loss)) // 2
    for index, value in enumerate(loss):
        window = loss[max(0, index - reach) : index + reach + 1]
        expected = np.mean(window[~np.isnan(window)]) if not np.isnan(value) else np.nan
        np.testing.assert_allclose(found[index], expected, atol=1e-9)
    if share == 0:
        np.testing.assert_allclose(found, loss, atol=1e-9)


def test_no_smoothing_draws_each_loss_once(runs):
    assert len(lines(recording(runs, smoothing=0.0).panels[0, 0])) == 2
    assert "lighter tint" not in data(runs, smoothing=0.0).attrs["caption"]


def test_tints_are_between_the_colour_and_white():
    assert tint("#204060", 0) == "#204060"
    assert tint("#204060", 1) == "#ffffff"
    assert tint("#000000", 0.5) == "#808080"


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_a_run_that_diverged_is_drawn(suffix, tmp_path):
    run = training_run("Adam", [0.15, 2.0, float("nan")])
    run.tree["series"]["loss"][-3:] = float("nan")
    figures.draw("fig3", run, out=tmp_path / f"figure.{suffix}")


def test_what_is_refused(runs):
    with pytest.raises(StoreError, match=r"needs the series `loss`, which the run of llama does not hold"):
        data(without(runs[0], ["series"]))
    with pytest.raises(StoreError, match=r"run of llama osp_excess_kurtosis was not measured at embedding"):
        data(without(runs[0], ["embedding"]))
    with pytest.raises(UsageError, match=r"against is tokens or steps, not 'hours'"):
        data(runs, against="hours")
    with pytest.raises(UsageError, match=r"smoothing is a share from 0 to below 1, not 3"):
        data(runs, smoothing=3)
    with pytest.raises(UsageError, match=r"stratum is one of all, first, delimiter, rest, not 'last'"):
        data(runs, stratum="last")
