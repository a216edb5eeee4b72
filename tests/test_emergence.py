"""When outliers emerge, by whom and where: planted answers, refusals, and one real training."""

from __future__ import annotations

import re

import numpy as np
import pytest

from osp_diag.analyses.channels.hot import hot_channels
from osp_diag.analyses.emergence.history import log_kurtosis, onsets, trace_emergence
from osp_diag.analyses.emergence.onset import emergence_of_series, first_rise
from osp_diag.analyses.emergence.writers import outlier_writers
from osp_diag.errors import StoreError, UsageError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.runs.run import Run, open_run
from tests.emerging_runs import FLOOR, HOT, Course, Training, emerging_run
from tests.synthetic_runs import synthetic_run, without


@pytest.fixture(scope="module")
def run():
    return emerging_run()


@pytest.fixture(scope="module")
def found(run):
    return trace_emergence(run, draws=50)


# -- one series ------------------------------------------------------------------------------------------

STEPS = np.arange(0.0, 500, 10)


def series(onset: float, doubling: float, plateau: float = np.inf, wobble: float = 0.1, seed: int = 0):
    course = Course(onset, doubling, plateau)
    noise = wobble * np.random.default_rng(seed).standard_normal(len(STEPS))
    return np.maximum(np.log([course.at(step) for step in STEPS]) + noise, 0)


@pytest.mark.parametrize(("onset", "doubling"), [(100, 15), (200, 40), (40, 30), (300, 10)])
def test_the_intervals_hold_what_was_planted(onset, doubling):
    """90% intervals over ten series. An onset has to be seen, which takes half a doubling."""
    hits = []
    for seed in range(10):
        result = emergence_of_series(STEPS, series(onset, doubling, seed=seed), draws=60, seed=seed)
        assert result.state == "onset"
        assert result.raised_at_end
        assert result.onset[0] == pytest.approx(onset, abs=doubling + 10)
        assert result.doubling[0] == pytest.approx(doubling, rel=0.15)
        assert result.start[0] == pytest.approx(onset, abs=doubling / 2)
        assert np.isnan(result.plateau[0])
        assert result.agreement == 1
        hits.append(
            (
                result.onset[1] <= onset + doubling / 2 and result.onset[2] >= onset,
                result.doubling[1] <= doubling <= result.doubling[2],
            )
        )
    onset_hits, doubling_hits = np.sum(hits, axis=0)
    assert onset_hits >= 8
    assert doubling_hits >= 6


def test_a_plateau_ends_growth():
    result = emergence_of_series(STEPS, series(100, 20, 64), draws=60)
    assert np.exp(result.plateau[0]) == pytest.approx(64, rel=0.1)
    assert np.exp(result.plateau[1]) < 66
    assert np.exp(result.plateau[2]) > 62
    assert result.plateau_step == pytest.approx(100 + 6 * 20, abs=20)
    assert result.doubling[0] == pytest.approx(20, rel=0.1)


def test_noise_has_no_onset():
    for seed in range(20):
        noise = np.maximum(0.3 * np.random.default_rng(seed).standard_normal(len(STEPS)), 0)
        assert emergence_of_series(STEPS, noise, draws=0).state == "noise"


def test_a_single_probe_is_no_onset_and_a_bump_ends():
    spike = np.zeros(50)
    spike[20] = 4
    assert emergence_of_series(STEPS, spike).state == "noise"
    bump = np.zeros(50)
    bump[20:30] = 4
    result = emergence_of_series(STEPS, bump, draws=10)
    assert result.onset[0] == 200
    assert not result.raised_at_end
    assert np.isnan(result.doubling[0])


def test_what_was_there_before_the_first_probe():
    result = emergence_of_series(STEPS, np.full(50, 3.0), draws=10)
    assert result.state == "from the start"
    assert result.onset == (0, 0, 0)


def test_onsets_do_not_depend_on_even_probes_and_gaps_are_left_out():
    steps = np.array([0.0, 10, 20, 30, 40, 60, 80, 100, 120, 160, 200, 240, 280, 320, 400])
    y = np.maximum((steps - 90) / 40 * np.log(2), 0)
    result = emergence_of_series(steps, y, draws=30)
    assert result.onset[0] in (100, 120)
    assert result.onset[1] < result.onset[0] <= result.onset[2]
    assert result.doubling[0] == pytest.approx(40, rel=0.02)
    holes = np.insert(y, 4, np.nan)
    again = emergence_of_series(np.insert(steps, 4, 35.0), holes, draws=30)
    assert again.onset[0] == result.onset[0]
    assert emergence_of_series(steps[:4], y[:4]).state == "unknown"


def test_the_rise_begins_where_the_segments_leave_the_noise():
    y = np.repeat([0.0, 0.6, 1.4, 2.0], 5)
    assert first_rise(y, sigma=0.05, departure=3.0) == (5, True)
    assert first_rise(np.repeat([0.5, 0.0, 2.0], 5), sigma=0.05, departure=3.0) == (10, True)


# -- a whole run -----------------------------------------------------------------------------------------


def test_onset_and_doubling_time_of_each_layer(found):
    blocks = found.onsets.sel(site="residual_post", stratum="rest")
    assert blocks["state"].values.tolist() == ["noise", "onset", "onset", "onset"]
    np.testing.assert_allclose(blocks["onset"][1:], [100, 160, 160], atol=30)
    np.testing.assert_allclose(blocks["doubling_time"][1:], [20, 30, 30], rtol=0.12)
    assert float(blocks["plateau"].sel(layer=1)) == pytest.approx(60 * FLOOR, rel=0.1)
    assert np.isnan(blocks["plateau"].sel(layer=[0, 2, 3])).all()
    assert (blocks["onset_low"] <= blocks["onset"])[1:].all()
    assert set(found.onsets["state"].sel(stratum="delimiter", site="residual_post").values) == {"unknown"}
    assert found.onsets["state"].sel(site="final_norm", layer=0, stratum="rest") == ""
    assert all("definition" in variable.attrs for variable in found.onsets.values())


def test_the_first_place_to_depart(found):
    first = found.first.sel(stratum="rest")
    assert (first["site"].item(), first["layer"].item()) == ("residual_post", 1)
    assert first["rivals"].item() == ""
    assert found.first["site"].sel(stratum="delimiter").item() == ""


def test_a_tie_goes_by_the_way_of_the_data_and_names_the_rivals():
    courses = {("mlp_contribution", 1): Course(100, 10), ("residual_post", 1): Course(100, 10)}
    first = trace_emergence(emerging_run(Training(courses=courses, wobble=0.0)), draws=10).first.sel(
        stratum="all"
    )
    assert (first["site"].item(), first["rivals"].item()) == ("mlp_contribution", "residual_post 1")


@pytest.mark.parametrize(("share", "writer"), [(0.1, "MLP"), (0.9, "attention"), (0.5, "both")])
@pytest.mark.parametrize("method", ["contributions", "stream"])
def test_who_wrote_them(share, writer, method):
    sites = Training().sites if method == "contributions" else ("embedding", "residual_mid", "residual_post")
    writers = outlier_writers(emerging_run(Training(attention_writes=share, sites=sites)))
    assert writers.attrs["method"] == method
    late = writers.sel(step=200, stratum="rest")
    assert late["writer"].values.tolist()[1:] == [writer, "earlier", "earlier"]
    assert float(late["attention_share"].sel(layer=1)) == pytest.approx(share, abs=0.03)
    assert np.isnan(writers["attention_share"].sel(stratum="delimiter")).all()


def test_where_it_cannot_be_told_it_says_so(run):
    blind = emerging_run(Training(sites=("residual_post",)))
    found = trace_emergence(blind, draws=0)
    assert set(np.unique(found.writers["writer"])) == {""}
    assert "whether attention or the MLP wrote them can't be told: the run holds neither both of" in str(
        found.notes
    )
    assert "Not answered: whether attention" in found.as_text()
    no_channels = without(blind, ["residual_post/channel_rms"])
    assert trace_emergence(no_channels, draws=0).channels is None
    with pytest.raises(StoreError, match="hot_channels needs channel_rms by step at 'residual_post'"):
        hot_channels(no_channels)


def test_birth_and_death_of_hot_channels(run):
    channels = hot_channels(run).sel(stratum="rest")
    layer = channels.sel(layer=2)
    born = layer["birth"].dropna("channel")
    assert born["channel"].values.tolist() == sorted(HOT)
    assert {int(c): float(born.sel(channel=c)) for c in HOT} == {9: 0, 33: 100, 50: 60, 51: 0}
    assert float(layer["death"].sel(channel=50)) == 250
    assert np.isnan(layer["death"].sel(channel=[9, 33, 51])).all()
    assert layer["hot_steps"].sel(channel=50) == 19
    assert np.isnan(channels["birth"].sel(layer=0)).all()
    assert layer["hot_count"].sel(step=[0, 60, 100, 250]).values.tolist() == [2, 3, 4, 3]


def test_overlap_of_the_largest_channels(run):
    channels = hot_channels(run, top=4).sel(stratum="rest")
    overlap = channels["top_overlap"].sel(layer=2)
    assert np.isnan(overlap[0])
    assert (overlap.sel(step=slice(110, 240)) == 1).all()
    assert float(overlap.sel(step=250)) == pytest.approx(3 / 5)
    assert float(channels["top_overlap"].sel(layer=0).mean()) < 0.2
    assert channels.attrs["chance"] == pytest.approx(0.25 / 7.75)
    assert np.isnan(hot_channels(run)["top_overlap"].sel(stratum="delimiter")).all()


def test_in_words(found):
    said = " ".join(found.as_text().split())
    assert "made-up: osp_excess_kurtosis/1, steps 0 to 390." in said
    assert re.search(
        r"On other tokens: residual_post of layer 1 leaves the noise first, at step 1\d0 \(\d+ to", said
    )
    assert "3 of 4 block outputs depart" in said
    assert re.search(r"The fastest, layer 1, doubles every (19|20|21)[.\d]* \(", said)
    assert "the MLP wrote its 4 largest channels (90% of what the block added there)" in said
    assert "4 channels are hot at some step and layer, 3 at the last probe (hottest: 51, 33, 9)" in said
    quiet = trace_emergence(emerging_run(Training(courses={})), draws=0).as_text()
    assert "On other tokens: no site leaves the noise." in " ".join(quiet.split())


def test_the_noise_of_an_mlps_product_is_its_initialisation():
    run = emerging_run(Training(courses={("mlp_hidden", 2): Course(-100)}, sites=("mlp_hidden",), wobble=0))
    ratio = log_kurtosis(run, sites=["mlp_hidden"])
    assert ratio.sel(site="mlp_hidden", layer=2, step=0, stratum="all").item() == 0
    assert float(ratio["noise"].sel(site="mlp_hidden", layer=1)) == pytest.approx(gaussian_floor(64))


def test_thinned_runs_are_answered_in_their_own_steps():
    courses = {("residual_post", 1): Course(4000, 300)}
    run = emerging_run(Training(courses=courses, steps=range(0, 8000, 10), sites=("residual_post",)))
    found = onsets(run, strata=["rest"], draws=5).sel(site="residual_post", layer=1, stratum="rest")
    assert float(found["onset"]) == pytest.approx(4000, abs=300)
    assert float(found["onset"]) in run.steps
    assert float(found["doubling_time"]) == pytest.approx(300, rel=0.05)


# -- refused ---------------------------------------------------------------------------------------------


def test_refusals(run):
    short = synthetic_run(steps=(0, 10, 20))
    with pytest.raises(StoreError, match="holds 3 probed steps, and a change over training takes 5"):
        trace_emergence(short)
    with pytest.raises(UsageError, match=r"departure is above 1, level between 0 and 1.*got 0\.5"):
        onsets(run, departure=0.5)
    with pytest.raises(UsageError, match="there is no stratum bos; there are all, first"):
        onsets(run, strata=["bos"])
    with pytest.raises(StoreError, match="holds no osp_excess_kurtosis at 'residual_pre'; it has the sites"):
        onsets(run, sites=["residual_pre"])
    bare = Run.in_memory([(step, {}) for step in range(6)], {}, run.attrs)
    with pytest.raises(StoreError, match="holds osp_excess_kurtosis at none of embedding, attention_contr"):
        onsets(bare)
    with pytest.raises(UsageError, match="top is from 1 to 63 and times above 1, not 64 and 5"):
        hot_channels(run, top=64)


# -- a real training -------------------------------------------------------------------------------------


def test_a_real_training(tmp_path):
    from osp_diag.trainer.loop import train
    from osp_diag.trainer.presets import with_recipe
    from tests.training_runs import minute

    config = with_recipe(minute(steps=8, probe__every=2, checkpoint__every=0, probe__sites=()), "adam")
    train(config, tmp_path / "run.zarr")
    run = open_run(tmp_path / "run.zarr")
    found = trace_emergence(run, draws=10)
    assert found.onsets.sizes == {"site": 6, "layer": 2, "stratum": 4}
    assert set(found.onsets["state"].sel(site="residual_post").values.ravel()) <= {
        "noise",
        "onset",
        "from the start",
        "unknown",
    }
    assert found.writers is not None
    assert found.writers.attrs["method"] == "contributions"
    assert found.channels is not None
    assert found.channels["top_overlap"].sizes["step"] == len(run.steps)
    assert not found.notes
    assert "On other tokens:" in found.as_text()
