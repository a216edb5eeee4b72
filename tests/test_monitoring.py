"""The monitor's rules on made-up runs: what is told, and what is not."""

import numpy as np
import pytest
import xarray as xr

from osp_diag.analyses.summary.numbers import hidden_state_kurtosis, sink_rate_at, sink_rates
from osp_diag.errors import UsageError
from osp_diag.monitoring import RunMonitor, forecasts, judge
from osp_diag.monitoring.rules.growing_kurtosis import Rule as Growing
from osp_diag.monitoring.steady_growth import crossing, growth, share_rising
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.headline import headline_kurtosis
from osp_diag.runs.run import open_run
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.config import MonitorConfig
from osp_diag.trainer.monitoring import TrainingMonitor
from tests.growing_runs import ATTRIBUTES, FLOOR, followed, groups, record, scalars, written


def test_growth_is_that_of_an_exponential_and_one_odd_probe_does_not_turn_it():
    course = 1.2 ** np.arange(6.0)
    assert growth(course) == pytest.approx(1.2**5)
    course[3] *= 40
    assert growth(course) == pytest.approx(1.2**5, rel=0.25)
    assert growth(np.full(6, 7.0)) == pytest.approx(1.0)
    assert np.isnan(growth(np.array([np.nan, 0.0, 3.0])))


@pytest.mark.parametrize(
    ("course", "told"),
    [
        pytest.param([12.0] * 12, False, id="high, and no more"),
        pytest.param(1.2 ** np.arange(12), False, id="grows, and is low"),
        pytest.param(12 * 1.2 ** np.arange(12), True, id="high and growing"),
        pytest.param(50 * 0.8 ** np.arange(12), False, id="high and falling"),
        pytest.param(12 * 1.2 ** np.arange(9), False, id="too few probes"),
        pytest.param(50 + 20.0 * (np.arange(12) > 5), False, id="a step up, not steadily"),
    ],
)
def test_high_and_growing_kurtosis_is_told(tmp_path, course, told):
    found = judge(written(tmp_path / "run.zarr", [np.ones(len(course)), course]))
    assert [alert.rule for alert in found] == (["growing_kurtosis"] if told else [])
    if told:
        (alert,) = found
        assert (alert.severity, alert.step) == ("watch", 9)
        assert alert.value == pytest.approx(12 * 1.2**9 * FLOOR)
        assert alert.sentence == (
            "OSP kurtosis at residual_post, layer 1 is 62 times its floor at step 9, having grown 5.16-fold "
            "over the last 10 probes"
        )


def test_a_wobbling_plateau_is_not_told(tmp_path):
    wobble = np.exp(0.1 * np.random.default_rng(0).standard_normal((24, 60)))
    run = written(tmp_path / "run.zarr", 100 * wobble)
    kurtosis = hidden_state_kurtosis(run).values[1:25]
    rules, window = Growing(), 10
    windows = [kurtosis[:, at : at + window] for at in range(50)]
    told = sum(
        growth(w) >= rules.growth and share_rising(w) >= rules.rising for part in windows for w in part
    )
    assert told == 0, "of 1,200 windows"


def test_the_first_nonfinite_activation_is_placed(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0, 10])
        record(writer, [20], bad_layer=2)
        record(writer, [30], bad_layer=0)
    (alert,) = judge(followed(path))
    assert (alert.rule, alert.severity, alert.step) == ("nonfinite_activations", "bad", 20)
    assert alert.sentence == ("NaN or Inf in 3 tokens at step 20, first at residual_post, layer 2")


def test_a_scalar_that_was_not_recorded_is_not_nan(tmp_path):
    """Step 0 has no loss; steps that are not probed have no held-out loss; the last row is not complete."""
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, series_block=1) as writer:
        record(writer, [0, 10])
        for step in (11, 12):
            writer.append_series(step, scalars(step))
        writer.append_series(13, {"probe_seconds": 1.0})
        assert judge(followed(path)) == ()
        writer.append_series(13, {"held_out_loss": 5.0})
        writer.append_series(14, scalars(14) | {"gradient_norm": np.inf})
        writer.append_series(15, scalars(15) | {"loss": np.nan})
        writer.append_series(16, scalars(16) | {"loss": np.nan})
        found = judge(followed(path))
    assert [alert.sentence for alert in found] == [
        "gradient_norm is inf at step 14",
        "loss is nan at step 15 and 1 later step",
    ]


def loop_of_a_user(path, rows):
    """What is told of a run of which nothing says what its loop records when."""
    attributes = {key: value for key, value in ATTRIBUTES.items() if key != "config"}
    with RunWriter(path, attributes) as writer:
        for step, values in enumerate(rows):
            writer.append_series(step, values)
    texts, opened = ([alert.sentence for alert in judge(run)] for run in (followed(path), open_run(path)))
    assert texts == opened
    return texts


LOSS, NORM, RATE, BAD = {"loss": 3.0}, {"gradient_norm": 1.0}, {"learning_rate": 0.1}, {"loss": float("nan")}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        pytest.param([LOSS] * 4, [], id="loss alone"),
        pytest.param([LOSS | NORM] * 4, [], id="two of them"),
        pytest.param([{"probe_seconds": 0.1}] * 4, [], id="none, and a probe"),
        pytest.param([LOSS | RATE, RATE, RATE] * 3, [], id="now and then"),
        pytest.param(
            [LOSS] * 3 + [BAD] * 2, ["loss is nan at step 3 and 1 later step"], id="NaN from a step on"
        ),
        pytest.param([LOSS | RATE] * 3 + [BAD | RATE], ["loss is nan at step 3"], id="NaN beside a number"),
        pytest.param([LOSS, {"loss": float("inf")}, LOSS], ["loss is inf at step 1"], id="Inf"),
    ],
)
def test_what_a_loop_of_ones_own_records_is_judged_as_such(tmp_path, rows, told):
    assert loop_of_a_user(tmp_path / "run.zarr", rows) == told


def test_kurtosis_and_sinks_by_step_are_those_of_the_summary(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0, 10, 20])
    run, opened = followed(path), open_run(path)
    xr.testing.assert_identical(hidden_state_kurtosis(run), hidden_state_kurtosis(opened))
    xr.testing.assert_identical(sink_rates(run), sink_rates(opened))
    rates = sink_rate_at(opened.at("attention")["sink_rate"])
    np.testing.assert_allclose(sink_rates(run).T, rates.mean("head"))
    # The headline is their mean without the last block's output.
    states = hidden_state_kurtosis(run).drop_sel(hidden_state="layer 2")
    assert states.isel(step=-1).mean().item() == pytest.approx(headline_kurtosis(opened)["all"])


def test_steps_that_the_trainer_passed_over_are_told(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        for step in range(1, 6):
            bad = {"skipped_step": 1.0} if step in (2, 4) else {}
            writer.append_series(step, scalars(step) | bad)
    (alert,) = judge(followed(path))
    assert alert.sentence == "the trainer passed over 2 diverged steps, the last is 4"


def test_rules_that_cannot_be_meant_are_refused():
    with pytest.raises(UsageError, match=r"rising is a share; got 1, 1\.25 and 0\.9$"):
        Growing(times_floor=1)


def test_a_jump_is_placed_first_in_network_order_and_bracketed(tmp_path):
    """Layer 1 jumps, and layer 2, which reads it, by more."""
    courses = 20 * np.exp(0.05 * np.random.default_rng(0).standard_normal((3, 9)))
    courses[1, 7:] *= 6
    courses[2, 7:] *= 40
    (finding,) = judge(written(tmp_path / "run.zarr", courses))
    assert (finding.rule, finding.site, finding.layer) == ("jump", "residual_post", 1)
    assert (finding.last_good_step, finding.first_bad_step) == (6, 7)
    assert finding.size >= 4
    assert " at residual_post, layer 1 went from " in finding.sentence


def test_noise_does_not_jump(tmp_path):
    wobble = np.exp(0.3 * np.random.default_rng(1).standard_normal((12, 60)))
    assert judge(written(tmp_path / "run.zarr", 20 * wobble)) == ()


def test_what_is_judged_in_looks_is_what_is_judged_at_once(tmp_path):
    courses = 20 * np.exp(0.05 * np.random.default_rng(0).standard_normal((2, 12)))
    courses[0, 8:] *= 9
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        monitor = RunMonitor(FollowedRun(path))
        for step, over in enumerate(courses.T):
            writer.append(step, groups(over))
            writer.append_series(step, {"held_out_loss": 9.0 if step == 10 else 5.0})
            monitor.run.refresh()
            monitor.look()
    monitor.run.refresh()
    looks = monitor.look()
    assert looks == judge(open_run(path))
    assert {finding.rule for finding in looks} == {"jump", "loss_rise"}


def test_losses_are_judged(tmp_path):
    rows = [{"loss": 5.0 + 0.02 * (-1) ** step} for step in range(30)]
    rows[25] = {"loss": 9.0}
    rows[29] |= {"held_out_loss": 6.0}
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        for step, values in enumerate(rows):
            writer.append_series(step, values)
    spike, gap = judge(open_run(path))
    assert (spike.rule, spike.last_good_step, spike.first_bad_step) == ("loss_spike", 24, 25)
    assert (gap.rule, gap.step) == ("held_out_gap", 29)


def test_a_run_is_judged_against_a_good_one(tmp_path):
    good = written(tmp_path / "good.zarr", np.full((2, 6), 20.0))
    courses = np.full((2, 6), 20.0)
    courses[1, 3:] *= 5
    (finding,) = judge(written(tmp_path / "bad.zarr", courses), against=good)
    assert (finding.rule, finding.layer, finding.last_good_step, finding.step) == ("reference", 1, 2, 3)
    short = written(tmp_path / "short.zarr", np.full((2, 2), 20.0))
    with pytest.raises(UsageError, match="a reference needs three probes after step 0"):
        judge(good, against=short)


def test_an_exponential_is_carried_on_to_its_limit():
    steps = np.arange(10.0, 110.0, 10.0)
    when = crossing(steps, 2.0 ** (steps / 20), 64.0)
    assert when.step == pytest.approx(120)
    assert when.earliest <= when.step <= when.latest
    assert crossing(steps, 2.0 ** (-steps / 20), 64.0) is None


@pytest.mark.parametrize(
    ("course", "at_step"),
    [
        pytest.param(230 * 1.05 ** np.arange(12.0), 15, id="grows, and is near"),
        pytest.param(23 * 1.05 ** np.arange(12.0), None, id="grows, and is far"),
        pytest.param(400 + np.arange(12.0) % 2, None, id="near, and does not grow"),
        pytest.param(230 * 1.08 ** np.arange(12.0), None, id="passed, which a rule says"),
    ],
)
def test_a_forecast_is_given_on_request_and_is_no_finding(tmp_path, course, at_step):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        for step, largest in enumerate(course, start=1):
            parts = groups([1.0])
            kurtosis = parts["residual_post"]["osp_excess_kurtosis"]
            parts["residual_post"]["absolute_maximum"] = (kurtosis.dims, np.full(kurtosis.shape, largest))
            writer.append(step, parts)
    run = open_run(path)
    assert [finding.rule for finding in judge(run)] == (["limit"] if course[-1] > 448 else [])
    found = forecasts(run)
    assert [one.at_step for one in found] == ([] if at_step is None else [at_step])
    if found:
        assert (found[0].site, found[0].layer, found[0].limit) == ("residual_post", 0, 448)
        sentence = found[0].as_dict()["sentence"]
        assert sentence.startswith("absolute_maximum at residual_post, layer 0, 393.4 at step 12, would pass")
        assert "extrapolation" in sentence


@pytest.mark.parametrize("address", ["ftp://host/x", "file:///etc/passwd", "host", "http://"])
def test_a_webhook_that_is_no_web_address_is_refused(address):
    with pytest.raises(UsageError, match="is no address to post to"):
        MonitorConfig(webhook=address)


def test_a_hook_that_fails_stops_nothing():
    def hook(finding):
        raise OSError("gone")

    monitor = TrainingMonitor(MonitorConfig(), hook)
    with pytest.warns(RuntimeWarning, match=r"hook failed at step 3: OSError\('gone'\); training goes on"):
        monitor.scalars(3, {"loss": float("nan")})
    (finding,) = monitor.take()
    assert finding.sentence == "loss is nan at step 3"
