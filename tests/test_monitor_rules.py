"""What the monitor tells of faults that come early, one after another, or in a later segment."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.errors import UsageError
from osp_diag.monitoring import RunMonitor, judge
from osp_diag.monitoring.grain import grain
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.run import Run, open_run
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.config import MonitorConfig
from osp_diag.trainer.headline import HeadlineLog
from osp_diag.trainer.monitoring import TrainingMonitor
from tests.growing_runs import ATTRIBUTES, groups


def in_memory(courses, steps=None):
    """A run whose layers take these courses, as multiples of the floor; (layer, step)."""
    courses = np.asarray(courses, float)
    steps = range(courses.shape[1]) if steps is None else steps
    probed = [(step, groups(over)) for step, over in zip(steps, courses.T, strict=True)]
    return Run.in_memory(probed, {}, ATTRIBUTES)


def courses(*faults, probes=16):
    """Three layers in calm noise; of each fault (layer, first probe, last probe, factor)."""
    course = 20 * np.exp(0.02 * np.random.default_rng(0).standard_normal((3, probes)))
    for layer, first, last, factor in faults:
        course[layer, first : last + 1] *= factor
    return course


def jumps(run):
    return [(finding.step, finding.layer) for finding in judge(run) if finding.rule == "jump"]


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        pytest.param([(1, 3, 15, 20)], [], id="before anything is known"),
        pytest.param([(1, 3, 15, 20), (0, 12, 15, 20)], [(12, 0)], id="one that can't be known, and another"),
        pytest.param([(1, 3, 3, 20), (1, 12, 15, 20)], [(12, 1)], id="an early spike, and another fault"),
        pytest.param([(2, 10, 15, 20), (0, 11, 15, 20)], [(10, 2), (11, 0)], id="neighbouring probes"),
        pytest.param([(2, 10, 15, 20), (0, 10, 15, 20), (1, 11, 15, 20)], [(10, 0), (11, 1)], id="three"),
        pytest.param([(1, 10, 10, 20)], [(10, 1)], id="a spike is told once"),
        pytest.param([(1, 8, 8, 20), (1, 10, 10, 20)], [(8, 1), (10, 1)], id="and the next one too"),
    ],
)
def test_every_jump_is_told_by_its_first_place(faults, told):
    assert jumps(in_memory(courses(*faults))) == told


def test_the_way_back_from_an_odd_probe_does_not_jump():
    """Up before enough is known, and back when it is."""
    assert jumps(in_memory(courses((1, 5, 5, 3)))) == []


@pytest.mark.parametrize(
    ("times_floor", "told"),
    [pytest.param(5, [], id="growth that noise had hidden"), pytest.param(30, [(10, 1)], id="high at once")],
)
def test_out_of_the_noise_only_what_is_high_at_once_jumps(times_floor, told):
    course = courses((1, 10, 15, times_floor)).T / 20
    probed = [
        (step, {"residual_post": groups(over)["residual_post"][["osp_excess_kurtosis"]]})
        for step, over in enumerate(course)
    ]
    assert jumps(Run.in_memory(probed, {}, ATTRIBUTES)) == told


@given(
    count=st.integers(1, 2000), numbers=st.lists(st.integers(0, 4000), min_size=1), kind=st.sampled_from("fd")
)
def test_the_grain_of_shares_is_one_part_of_what_is_counted(count, numbers, kind):
    values = np.array([1, *numbers, np.nan]).astype(kind) / np.array(count, kind)
    assert grain(values) == pytest.approx(1 / count, rel=1e-3)


def test_a_share_of_few_sequences_changes_by_chance():
    """Doubling after a still past: of 8 sequences by chance, of 8,000 or what is no count it jumps."""

    def jumping(still, changed):
        probed = []
        for step in range(12):
            share = {"share": ("layer", still if step < 10 else changed, {"units": "1"})}
            probed.append((step, {"mlp_input": xr.Dataset(share, coords={"layer": range(3)})}))
        return jumps(Run.in_memory(probed, {}, ATTRIBUTES))

    assert jumping([1 / 8, 2 / 8, 3 / 8], [1 / 8, 4 / 8, 3 / 8]) == []
    assert jumping([1 / 8000, 0.25, 0.375], [1 / 8000, 0.5, 0.375]) == [(10, 1)]
    assert jumping([0.1234567, 0.25, 0.375], [0.1234567, 0.5, 0.375]) == [(10, 1)]


def gains(names, value):
    values = {"norm_gain_mean": ("matrix", np.full(len(names), float(value)), {"units": "1"})}
    return {"weights/norm_gain": xr.Dataset(values, coords={"matrix": list(names)})}


def test_what_changes_after_a_segment_began_is_judged_while_it_is_written(tmp_path):
    path = tmp_path / "run.zarr"
    calm = [groups(over) for over in courses(probes=14).T]
    with RunWriter(path, ATTRIBUTES) as writer:
        for step in range(8):
            writer.append(step, calm[step] | gains("xyz", 1), partial=True)
    monitor = RunMonitor(FollowedRun(path).refresh())
    assert monitor.look() == ()
    later = ATTRIBUTES | {"config": {"steps": 1000, "optimizer.lr": 1}}
    with RunWriter(path, later, resume=True, segment_after=7) as writer:
        writer.truncate_after(7)
        for step in range(8, 14):
            writer.append(step, calm[step] | gains("yzw", 1 if step < 9 else 9), partial=True)
    monitor.run.refresh()
    (finding,) = monitor.look()
    assert (finding.rule, finding.site, finding.step) == ("jump", "weights:norm_gain", 9)
    assert (finding,) == judge(open_run(path))


def test_a_reference_with_nothing_in_common_is_refused(tmp_path):
    good = in_memory(courses(probes=6), range(0, 60, 10))
    with pytest.raises(
        UsageError,
        match=r"probed at no step in common after step 0: 0, 5, 15, 25.* 0, 10, 20, 30.* \(probe\.every",
    ):
        judge(in_memory(courses(probes=6), (0, *range(5, 55, 10))), good)
    others = [(step, {"value": groups([20, 20])["residual_post"]}) for step in range(0, 60, 10)]
    with pytest.raises(
        UsageError, match=r"share no number of a site and layer: value here, .*; name a run of the same model"
    ):
        judge(Run.in_memory(others, {}, ATTRIBUTES), good)
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        writer.append(5, groups([20, 20, 20]))
        monitor = RunMonitor(FollowedRun(path).refresh(), good)
        assert monitor.look() == (), "it may come to a step of the reference"
    with pytest.raises(UsageError, match="at no step in common"):
        judge(FollowedRun(path).refresh(), good)


def test_the_trainer_judges_the_sites_that_a_user_named():
    course = courses((1, 10, 15, 20))
    latest: dict[str, xr.Dataset] = {}
    probe = SimpleNamespace(
        latest=latest, deferred=False, absent={}, attributes={"sites": {"my_site": "mine"}}
    )
    monitor = TrainingMonitor(MonitorConfig())
    log = HeadlineLog(probe, None, monitor)
    for step, over in enumerate(course.T):
        latest["my_site"] = groups(over)["residual_post"]
        log.after_probe(step, {})
    (finding,) = monitor.take()
    assert (finding.rule, finding.site, finding.layer, finding.step) == ("jump", "my_site", 1, 10)
