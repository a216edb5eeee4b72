"""Following a run: only what is new is read, and no fate of the run leaves a wrong number behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.runs import following, format
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.lock import LOCK_NAME, writer_state
from osp_diag.runs.run import open_run, open_tree
from osp_diag.runs.writer import RunWriter
from tests.growing_runs import ATTRIBUTES, FLOOR, groups, grown_run, record, scalars
from tests.run_fixtures import groups as site_groups
from tests.run_fixtures import write_run

ROOT = Path(__file__).parents[1]


def kurtosis(run):
    return run.values("residual_post", "osp_excess_kurtosis", {"stratum": "all"})


def assert_as_opened(run, path):
    """What was followed is what opening the run now gives."""
    opened = open_run(path)
    np.testing.assert_array_equal(run.steps, opened.steps)
    expected = opened.at("residual_post")["osp_excess_kurtosis"].sel(stratum="all")
    np.testing.assert_array_equal(kurtosis(run).values, expected.values)
    rates = opened.at("attention")["sink_rate"].sel(epsilon=0.3, sink_position=0).mean("head")
    found = run.values("attention", "sink_rate", {"epsilon": 0.3, "sink_position": 0}, ("head",))
    np.testing.assert_allclose(found.values, rates.values)
    xr.testing.assert_identical(run.series, opened.series.load())


def changed(run):
    """Whether a look shows anything else."""
    before = run.version
    assert run.refresh() is run
    return run.version != before


# -- growing ---------------------------------------------------------------------------------------------


def test_a_followed_run_is_the_opened_one_at_every_moment(tmp_path):
    path = tmp_path / "run.zarr"
    run = FollowedRun(path)
    with RunWriter(path, ATTRIBUTES, chunk_steps=4) as writer:
        for step in range(0, 110, 10):
            record(writer, [step])
            assert changed(run)
            writer.flush()
            run.refresh()
            assert_as_opened(run, path)
    assert run.generation == 1
    assert kurtosis(run).sel(step=50, layer=1).item() == pytest.approx(2 * 1.5 * FLOOR)


def test_only_chunks_with_new_steps_are_read(tmp_path, monkeypatch):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, chunk_steps=4) as writer:
        record(writer, range(0, 100))
        run = FollowedRun(path)
        run.refresh()
        kurtosis(run)
        read = []
        original = format.read_plain
        monkeypatch.setattr(
            format, "read_plain", lambda file, most: (read.append(file), original(file, most))[1]
        )
        record(writer, [100])
        run.refresh()
        names = [str(file.relative_to(path)) for file in read]
        expected = [f"residual_post/osp_excess_kurtosis/c.{index}.0.0" for index in (24, 25)]
        assert [name for name in names if name.startswith("residual_post/osp")] == expected
        read.clear()
        assert not changed(run)
        assert not read


def test_a_scalar_that_begins_later_is_nan_before(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, series_block=1) as writer:
        run = FollowedRun(path)
        for step in range(1, 5):
            writer.append_series(step, {"loss": step} | ({"skipped_step": 1.0} if step == 4 else {}))
            run.refresh()
            assert len(run.series["loss"]) == step
        np.testing.assert_array_equal(run.series["skipped_step"], [np.nan, np.nan, np.nan, 1.0])
        assert "never" not in run.series
        # The last row may be completed after it was seen; nothing is read anew for that.
        before = run.generation
        writer.append_series(4, {"held_out_loss": 9.0})
        run.refresh()
        assert run.series["held_out_loss"][-1] == 9.0
        assert run.generation == before


# -- the fates of a run ----------------------------------------------------------------------------------


def test_a_run_that_does_not_exist_yet_is_awaited(tmp_path):
    path = tmp_path / "run.zarr"
    run = FollowedRun(path)
    assert not changed(run)
    assert (run.state, run.problem, run.age) == ("absent", "", None)
    path.mkdir()
    (path / LOCK_NAME).touch()
    run.refresh()
    assert run.state == "absent"
    (path / LOCK_NAME).unlink()
    with RunWriter(path, ATTRIBUTES) as writer:
        run.refresh()
        assert (run.state, run.writer) == ("empty", "writing")
        record(writer, [0])
        assert changed(run)
        assert run.state == "recording"
    run.refresh()
    assert run.writer == "closed"
    assert run.age < 60


def test_steps_that_were_taken_back_and_trained_again_are_read_again(tmp_path):
    path = grown_run(tmp_path / "run.zarr")
    run = FollowedRun(path)
    run.refresh()
    assert_as_opened(run, path)
    before = run.generation
    # Resumed from step 20, with other numbers, and past where it was: no length tells.
    with RunWriter(path, ATTRIBUTES | {"created": "later"}, resume=True) as writer:
        writer.truncate_after(20)
        for step in range(30, 90, 10):
            writer.append(step, groups([7.0, 7.0, 7.0 + step]))
            writer.append_series(step, scalars(step) | {"loss": 1.0})
    assert changed(run)
    assert run.generation == before + 1
    assert_as_opened(run, path)


def test_the_same_attributes_and_length_do_not_hide_other_numbers(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, range(0, 60, 10))
        run = FollowedRun(path)
        run.refresh()
        assert_as_opened(run, path)
        writer.truncate_after(20)
        record(writer, range(30, 60, 10), sink=0.25)
        for step in (60, 70):
            writer.append(step, groups([9.0, 9.0, 9.0]))
        run.refresh()
        assert_as_opened(run, path)


def test_a_shorter_run_is_seen_at_once(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, range(0, 60, 10))
        run = FollowedRun(path)
        run.refresh()
        assert len(kurtosis(run)) == 6
        writer.truncate_after(20)
        run.refresh()
        assert kurtosis(run)["step"].values.tolist() == [0, 10, 20]


def test_a_run_deleted_and_begun_anew_is_another_one(tmp_path):
    path = grown_run(tmp_path / "run.zarr")
    run = FollowedRun(path)
    run.refresh()
    kurtosis(run)
    shutil.rmtree(path)
    assert changed(run)
    assert run.state == "absent"
    assert not run.steps.size
    grown_run(path, range(0, 100, 5), created="2026-02-02T00:00:00+00:00")
    run.refresh()
    assert_as_opened(run, path)


def test_a_step_that_was_not_committed_is_not_there(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, block=3) as writer:
        record(writer, range(0, 60, 10))
        run = FollowedRun(path)
        record(writer, [60])
        writer._axis.write(path)  # its chunks are on disk, the commit is not
        run.refresh()
        assert kurtosis(run)["step"].values.tolist() == [0, 10, 20, 30, 40, 50]


def test_a_damaged_chunk_is_a_problem_that_passes(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, range(0, 60, 10))
        run = FollowedRun(path)
        run.refresh()
        assert len(kurtosis(run)) == 6
        record(writer, [60])
        chunk = path / "residual_post/osp_excess_kurtosis/c.0.0.0"
        whole = chunk.read_bytes()
        chunk.write_bytes(whole[:-9])
        run.refresh()
        assert run.state == "unreadable"
        assert "is damaged" in run.problem
        assert len(kurtosis(run)) == 6  # what was read stays on view
        chunk.write_bytes(whole)
        run.refresh()
        assert (run.state, run.problem) == ("recording", "")
        assert_as_opened(run, path)


def test_what_is_no_run_is_said(tmp_path):
    run = FollowedRun(tmp_path)
    (tmp_path / "notes.txt").touch()
    run.refresh()
    assert run.state == "unreadable"
    assert "is not a run: it has no zarr.json" in run.problem


def test_following_writes_and_locks_nothing(tmp_path):
    path = grown_run(tmp_path / "run.zarr")

    def everything():
        return {file: file.stat().st_mtime_ns for file in path.rglob("*")}

    before = everything()
    run = FollowedRun(path)
    run.refresh()
    assert_as_opened(run, path)
    assert everything() == before
    with RunWriter(path, ATTRIBUTES, resume=True) as writer:
        record(writer, [60])


# -- the writer ------------------------------------------------------------------------------------------


def test_asking_for_the_writer_does_not_take_its_lock_away(tmp_path):
    """A record lock falls when its process closes any descriptor of the file."""
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES):
        assert writer_state(path) == "writing"
        code = f"from osp_diag.runs.writer import RunWriter; RunWriter({str(path)!r}, {{}}, resume=True)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert "is being written by process" in done.stderr
    assert writer_state(path) == "closed"


def test_a_writer_that_was_killed_is_told_from_one_that_closed(tmp_path):
    path = tmp_path / "run.zarr"
    code = (
        "import time; from osp_diag.runs.writer import RunWriter; from tests.growing_runs import *\n"
        f"writer = RunWriter({str(path)!r}, ATTRIBUTES); record(writer, [0]); print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            process.stdout.readline()
            run = FollowedRun(path)
            run.refresh()
            assert run.writer == "writing"
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert changed(run)
    assert run.writer == "died"


# -- as any run ------------------------------------------------------------------------------------------

ASKED = [
    ("residual_post", "osp_excess_kurtosis", {"stratum": "all"}, ()),
    ("residual_post", "osp_excess_kurtosis", {}, ("layer",)),
    ("residual_post", "token_count", {"layer": 2}, ()),
    ("linear_input:mlp.down_proj", "channel_rms", {}, ("layer", "channel")),
]


def assert_the_same_run(one, other):
    assert (one.sites, one.beside, one.attrs) == (other.sites, other.beside, other.attrs)
    assert (one.absent_sites, one.declared_absent) == (other.absent_sites, other.declared_absent)
    for site in one.sites:
        xr.testing.assert_identical(one.at(site).load(), other.at(site).load())
        assert one.statistics_at(site) == other.statistics_at(site)
        assert one.labels(site, "layer").tolist() == other.labels(site, "layer").tolist()
    xr.testing.assert_identical(one.snapshot("residual_post").load(), other.snapshot("residual_post").load())
    xr.testing.assert_identical(one["token_count"].load(), other["token_count"].load())
    xr.testing.assert_identical(one.series.load(), other.series.load())
    assert one.sites_with("token_count") == other.sites_with("token_count")
    for asked in ASKED:
        xr.testing.assert_identical(one.values(*asked), other.values(*asked))


def test_a_followed_run_answers_as_the_opened_one(tmp_path):
    path = write_run(tmp_path / "run.zarr")
    run = FollowedRun(path).refresh()
    assert_the_same_run(run, open_run(path))
    with RunWriter(path, resume=True, attributes=dict(open_run(path).attrs)) as writer:
        writer.append(30, site_groups(30))
        writer.append_series(30, {"loss": 2.0})
        assert run.at("residual_post").sizes["step"] == 3  # the moment that was looked at
    assert_the_same_run(run.refresh(), open_run(path))


def test_a_run_is_opened_once_a_look_and_only_when_asked(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(following, "open_tree", lambda path: (opened.append(path), open_tree(path))[1])
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0, 10])
        run = FollowedRun(path).refresh()
        assert run.sites == ["embedding", "attention", "residual_post", "final_norm"]
        kurtosis(run), run.series, run.refresh()
        assert opened == []
        run.at("attention"), run.at("residual_post"), run.refresh(), run["sink_rate"]
        assert len(opened) == 1
        record(writer, [20])
        assert run.at("attention").sizes["step"] == 2
        writer.flush()
        assert run.refresh().at("attention").sizes["step"] == 3
        assert len(opened) == 2


def test_steps_that_came_after_the_look_are_not_shown(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0, 10])
        run, second = FollowedRun(path).refresh(), FollowedRun(path).refresh()
        second.steps  # noqa: B018 - read, as a page does
        record(writer, [20])
        writer.flush()
        assert run.at("residual_post")["step"].values.tolist() == run.steps.tolist() == [0, 10]
        writer.truncate_after(0)
    with pytest.raises(StoreError, match=r"was begun anew while it was read; look again$"):
        second.at("residual_post")


def test_where_there_is_no_run_it_holds_nothing(tmp_path):
    run = FollowedRun(tmp_path / "run.zarr").refresh()
    assert (run.sites, run.beside, run.attrs, run.series.sizes["step"]) == ([], [], {}, 0)
    assert repr(run) == f"<osp_diag.FollowedRun {run.path}: absent>"
    with pytest.raises(StoreError, match="has no site 'attention'; there are none"):
        run.at("attention")
    (tmp_path / "run.zarr").touch()
    with pytest.raises(StoreError, match="is a file; a run is a folder"):
        run.refresh().at("attention")


# -- asking ----------------------------------------------------------------------------------------------


def test_it_says_what_there_is(tmp_path):
    run = FollowedRun(grown_run(tmp_path / "run.zarr"))
    run.refresh()
    assert run.sites_with("osp_excess_kurtosis") == ["embedding", "residual_post", "final_norm"]
    assert run.statistics_at("attention") == {"sink_rate": ("layer", "head", "epsilon", "sink_position")}
    assert run.labels("residual_post", "stratum").tolist() == ["all", "first", "delimiter", "rest"]
    assert not run.labels("residual_post", "channel").size


def test_asking_for_what_is_not_there_names_it(tmp_path):
    run = FollowedRun(grown_run(tmp_path / "run.zarr"))
    run.refresh()
    with pytest.raises(StoreError, match=r"has no 'nonsense' at 'residual_post' by step$"):
        run.values("residual_post", "nonsense")
    with pytest.raises(StoreError, match=r"no stratum 'last' at 'residual_post'; it has all, first, delimi"):
        run.values("residual_post", "osp_excess_kurtosis", {"stratum": "last"})


def test_a_new_step_does_not_copy_the_history(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, block=100) as writer:
        record(writer, range(0, 400))
        writer.flush()
        run = FollowedRun(path)
        run.refresh()
        before = kurtosis(run).values
        record(writer, [400])
        writer.flush()
        run.refresh()
        after = kurtosis(run).values
    assert len(after) == 401
    assert np.shares_memory(before, after)


def matrices(names, value):
    """A group beside the sites with a number of each of these matrices, and a side of each."""
    values = {"norm_gain_mean": (("matrix",), np.arange(len(names)) + float(value), {"units": "1"})}
    sides = {"share": (("matrix", "side"), np.full((len(names), 2), float(value)))}
    return xr.Dataset(values | sides, coords={"matrix": list(names), "side": ["in", "out"]})


def test_groups_whose_labels_change_are_followed_in_one_piece(tmp_path):
    path = tmp_path / "run.zarr"
    run = FollowedRun(path)

    def assert_joined():
        run.refresh()
        opened = open_run(path)
        assert run.beside == opened.beside
        assert run.statistics_at("weights:gains") == opened.statistics_at("weights:gains")
        np.testing.assert_array_equal(
            run.labels("weights:gains", "matrix"), opened.labels("weights:gains", "matrix")
        )
        for statistic in ("norm_gain_mean", "share"):
            for ask in (
                lambda of, name: of.values("weights:gains", name),
                lambda of, name: of.rows("weights:gains", name, 2, 7),
            ):
                xr.testing.assert_identical(ask(run, statistic), ask(opened, statistic))
        at_x = {"matrix": "x", "side": "in"}
        xr.testing.assert_identical(*(of.values("weights:gains", "share", at_x) for of in (run, opened)))

    with RunWriter(path, ATTRIBUTES, chunk_steps=2) as writer:
        for step in range(6):
            writer.append(step, {"weights/gains": matrices("xy", step)}, partial=True)
    assert_joined()
    for after, names in ((3, "yz"), (6, "w")):
        changed = ATTRIBUTES | {"config": {"steps": 1000, "optimizer.lr": after}}
        with RunWriter(path, changed, resume=True, segment_after=after, chunk_steps=2) as writer:
            writer.truncate_after(after)
            for step in range(after + 1, after + 5):
                writer.append(step, {"weights/gains": matrices(names, 10 * step)}, partial=True)
        assert_joined()
