"""Runs from a stranger, and damaged ones: nothing outside is touched, and what is wrong is named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from osp_diag.cli.main import main
from osp_diag.errors import StoreError
from osp_diag.probing import saving
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.packed import pack, unpack
from osp_diag.runs.replacing import exchange, replacement
from osp_diag.runs.run import open_run, open_whole_part
from osp_diag.runs.writer import RunWriter
from tests import run_fixtures
from tests.growing_runs import grown_run
from tests.hostile_files import refusal
from tests.run_fixtures import ATTRIBUTES, groups, write_run
from tests.warm_processes import forking

KURTOSIS = "residual_post/osp_excess_kurtosis"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("whole") / "run.zarr")


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run.zarr")


def change(run, edit):
    """Edit the root's metadata of a run; ``edit`` gets its groups and arrays."""
    file = run / "zarr.json"
    root = json.loads(file.read_text())
    edit(root["consolidated_metadata"]["metadata"])
    file.write_text(json.dumps(root))


def read_everything(path):
    for node in open_run(path).tree.subtree:
        node.to_dataset().load()


def refused(path, message):
    with pytest.raises(StoreError, match=message) as raised:
        read_everything(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What metadata say


@pytest.mark.parametrize(
    ("codecs", "name"),
    [
        ([{"name": "numcodecs.pickle", "configuration": {}}], "numcodecs.pickle"),
        ([{"name": "bytes"}, {"name": "numcodecs.zlib"}], "numcodecs.zlib"),
        (["sharding_indexed"], "sharding_indexed"),
        ([{"name": {"a": 1}}], re.escape("{'a': 1}")),
        (None, "None"),
    ],
)
def test_a_codec_that_a_run_has_not_is_refused_before_zarr_looks_it_up(run, codecs, name):
    change(run, lambda nodes: nodes[KURTOSIS].update(codecs=codecs))
    refused(run, f"{KURTOSIS}' is encoded by '?{name}'?, and nothing but bytes, vlen-utf8, zstd is decoded")


def test_nodes_of_zarr_2_with_object_filters_are_refused(run):
    old = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "filters": [{"id": "pickle"}]}
    change(run, lambda nodes: nodes.update({KURTOSIS: old}))
    refused(run, f"{KURTOSIS}' is not described as Zarr v3 does")


@pytest.mark.parametrize("name", ["../mine.zarr", "a/../../b", "/etc", "a//b", "a\\b", "a\x1b[2Jb", "\0"])
def test_a_name_that_leads_out_of_the_run_is_refused(run, name):
    change(run, lambda nodes: nodes.update({name: nodes[KURTOSIS]}))
    message = refused(run, "is no path within the run|has a name with signs that no name has")
    assert message.isprintable()
    assert FollowedRun(run).refresh().state == "unreadable"


BOMBS = {
    "an endless axis": ({"step": [10**12]}, "rows"),
    "an endless width": (
        {KURTOSIS: [3, 10**9, 4]},
        "declares 48,000,000,000 bytes, and its chunks on disk have",
    ),
    "a shape beyond counting": ({KURTOSIS: [3, 2**60, 4]}, "has the shape"),
    "no list": ({KURTOSIS: "many"}, "has the shape 'many'"),
    "a fraction": ({KURTOSIS: [3, 1.5, 4]}, "has the shape"),
}


@pytest.mark.parametrize(("shapes", "message"), BOMBS.values(), ids=BOMBS)
def test_what_an_array_declares_is_held_against_what_is_there(run, shapes, message):
    change(run, lambda nodes: [nodes[path].update(shape=shape) for path, shape in shapes.items()])
    refused(run, message)


def test_an_axis_longer_than_its_labels_on_disk_is_refused_at_once(run):
    def lengthen(nodes):
        for entry in nodes.values():
            if entry.get("dimension_names", [""])[:1] == ["logged_step"]:
                entry["shape"] = [10**9]

    change(run, lengthen)
    refused(run, r"series/\w+ declares 8,000,000,000 bytes, and its chunks on disk have")
    followed = FollowedRun(run).refresh()
    with pytest.raises(StoreError, match=r"chunk .*series/logged_step/c\.1 is missing"):
        followed.series  # noqa: B018


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 10**5, "it is nested too deep"),
        ('{"attributes": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"attributes": "\udc80"}', "utf-8"),
    ],
)
def test_metadata_that_are_no_json_are_one_sentence(run, text, reason):
    (run / "zarr.json").write_text(text, errors="surrogateescape")
    refused(run, rf"zarr\.json is damaged \(.*{reason}")


# What chunks say


def test_a_chunk_that_unpacks_to_more_than_its_array_has_takes_no_memory(run):
    chunk = run / KURTOSIS / "c.0.0.0"
    chunk.write_bytes(Zstd().encode(bytes(2**26)))
    refused(run, rf"{KURTOSIS}/c\.0\.0\.0 is damaged \(it declares 67,108,864 bytes, not 3,072\)")


def test_texts_that_declare_more_than_there_are_take_no_memory(run):
    chunk = run / "snapshot/token_text/c.0"
    chunk.write_bytes(Zstd().encode((2**32 - 1).to_bytes(4, "little")))
    refused(run, r"token_text/c\.0 is damaged \(it declares 4,294,967,295 texts, not 4\)")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_chunk_that_is_no_file_is_neither_followed_nor_waited_for(run, kind):
    chunk = run / KURTOSIS / "c.0.0.0"
    chunk.unlink()
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("/dev/zero", path)}[kind]
    make(chunk)
    refused(run, rf"{KURTOSIS}/c\.0\.0\.0 (cannot be read|is missing)")


@pytest.mark.parametrize(
    "path", ["step/c.0", f"{KURTOSIS}/c.0.0.0", "snapshot/token_id/c.0", "series/loss/c.0"]
)
def test_a_chunk_that_is_lost_does_not_read_as_numbers(run, path):
    """Zarr would make up NaN, or zeros of whole numbers."""
    (run / path).unlink()
    refused(run, rf"{re.escape(path)} is missing; restore the run from a copy")


def test_a_group_that_began_later_is_whole(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, chunk_steps=2) as writer:
        for step in range(6):
            late = {"final_norm": run_fixtures.site(step)} if step > 3 else {}
            writer.append(step, groups(step) | late, partial=True)
    values = open_run(path).at("final_norm")["osp_excess_kurtosis"]
    assert np.isnan(values[:4]).all()
    assert np.isfinite(values[4:]).all()
    assert (
        FollowedRun(path)
        .refresh()
        .values("final_norm", "osp_excess_kurtosis", {"stratum": "all"})
        .sizes["step"]
        == 6
    )
    (path / "final_norm/osp_excess_kurtosis/c.2.0.0").unlink()
    refused(path, r"final_norm/osp_excess_kurtosis/c\.\d\.0\.0 is missing")


def test_a_packed_run_that_unpacks_to_more_than_it_may_is_refused(whole, tmp_path):
    packed = pack(whole, tmp_path / "run.zip")
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            large = entry.filename == f"{KURTOSIS}/c.0.0.0"
            target.writestr(entry.filename, bytes(2**27) if large else source.read(entry))
    refused(bomb, f"{KURTOSIS}/c.0.0.0 declares 134,217,728 bytes and has")
    with pytest.raises(StoreError, match="would unpack to 134,217,728"):
        unpack(bomb, tmp_path / "again.zarr")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_damaged_anywhere_is_read_right_or_refused_in_one_sentence(whole, data, tmp_path_factory):
    path = shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "run.zarr")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from([path / "zarr.json", *files]))
    content = bytearray(file.read_bytes())
    if file.name == "zarr.json" and file.parent != path:
        return  # readers without consolidated metadata alone look at these
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    message = refusal(read_everything, path)
    assert not message or (str(path) in message and "\n" not in message)


# Writing into what a stranger made


@pytest.mark.parametrize("place", [".writer.lock", "zarr.json.partial", KURTOSIS, "a picture.png"])
@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_no_link_in_a_run_is_written_through(run, tmp_path, place, mode):
    secret = tmp_path / "mine"
    secret.mkdir()
    (secret / "zarr.json").write_text("mine")
    target = secret if place == KURTOSIS else secret / "zarr.json"
    if place == KURTOSIS:
        shutil.rmtree(run / place)
    os.symlink(target, run / place)
    with pytest.raises(StoreError, match=rf"cannot write to .*{re.escape(place)} is a link.*remove it"):
        RunWriter(run, ATTRIBUTES, **{mode: True})
    assert [file.name for file in secret.iterdir()] == ["zarr.json"]
    assert (secret / "zarr.json").read_text() == "mine"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_new_run_writes_through_no_link_that_waits_for_it(tmp_path, link):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    path = tmp_path / "run.zarr"
    path.mkdir()
    link(mine, path / "zarr.json.partial")
    with RunWriter(path, ATTRIBUTES) as writer:
        writer.append(0, groups(0))
    link(mine, path / ".writer.lock")
    with pytest.raises(StoreError, match=r"\.writer\.lock is a link"):
        RunWriter(path, ATTRIBUTES, resume=True)
    assert mine.read_text() == "mine"
    assert FollowedRun(path).refresh().state == "recording"


def test_a_node_beside_the_run_is_not_written(run, tmp_path):
    mine = write_run(tmp_path / "mine.zarr")
    before = (mine / "zarr.json").read_bytes()
    change(run, lambda nodes: nodes.update({"../mine.zarr": {"zarr_format": 3, "node_type": "group"}}))
    for mode in ("resume", "overwrite"):
        with pytest.raises(StoreError, match=r"mine\.zarr' is no path within the run"):
            RunWriter(run, ATTRIBUTES, **{mode: True})
    assert (mine / "zarr.json").read_bytes() == before


# Replacing


def replaced(path, step=7):
    saving.write_run(path, [(step, groups(step))], {}, ATTRIBUTES, {}, overwrite=True)


def test_replacing_leaves_the_new_run_and_what_was_none_of_a_run(run):
    (run / "notes.txt").write_text("mine")
    replaced(run)
    assert open_run(run).steps.tolist() == [7]
    assert "snapshot" not in open_run(run).tree.children
    assert (run / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in run.parent.iterdir()] == ["run.zarr"]


def dying(path, operation):
    """Replace a run in a process that is killed at its Nth change of the file system."""
    done = [0]

    def counted(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            done[0] += 1
            if done[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("replace", "unlink", "mkdir", "rmdir", "rename"):
        setattr(os, name, counted(name))
    replaced(path)


def test_killed_at_any_moment_the_old_run_or_the_new_one_is_there(whole, tmp_path):
    seen, operation = set(), 1
    while operation < 400:
        path = tmp_path / "run.zarr"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        process = forking().Process(target=dying, args=(path, operation))
        process.start()
        process.join()
        steps = open_run(path).steps.tolist()
        read_everything(path)
        seen.add(tuple(steps))
        if process.exitcode == 0:
            break
        operation += 23
    assert seen == {(0, 10, 20), (7,)}
    replaced(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.zarr"]


def test_a_disk_that_refuses_leaves_the_old_run(run, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "c.0.0.0")

    monkeypatch.setattr("osp_diag.runs.format.replace_file", full)
    with pytest.raises(
        StoreError, match=r"no space left .*; the run that is there is as it was\. Free space"
    ):
        replaced(run)
    monkeypatch.undo()
    assert open_run(run).steps.tolist() == [0, 10, 20]


def test_a_run_that_is_being_written_is_not_replaced(run, tmp_path):
    with RunWriter(run, ATTRIBUTES, resume=True), pytest.raises(StoreError, match="already open for writing"):
        replaced(run)
    assert open_run(run).steps.tolist() == [0, 10, 20]


def test_folders_change_places_also_without_a_system_call(tmp_path, monkeypatch):
    for with_call in (True, False):
        one, other = tmp_path / f"one {with_call}", tmp_path / f"other {with_call}"
        for folder in (one, other):
            folder.mkdir()
            (folder / folder.name).touch()
        if not with_call:
            monkeypatch.setattr("osp_diag.runs.replacing._system_call", lambda: None)
        exchange(one, other)
        assert (one / other.name).exists()
        assert (other / one.name).exists()
    with replacement(tmp_path / "new.zarr") as beside:
        write_run(beside)
    assert open_run(tmp_path / "new.zarr").steps.tolist() == [0, 10, 20]


# What is said


def test_what_is_gone_is_not_called_safe(tmp_path):
    writer = RunWriter(tmp_path / "run.zarr", ATTRIBUTES)
    for step in (10, 20):
        writer.append(step, groups(step))
    shutil.rmtree(writer.path)
    with pytest.raises(StoreError, match="it was deleted or moved while it was written") as raised:
        writer.append(30, groups(30))
    assert "safe" not in str(raised.value)


def test_a_series_that_is_empty_after_going_back_is_gone(run):
    with RunWriter(run, ATTRIBUTES, resume=True) as writer:
        writer.append_series(30, {"loss": 2.0, "stopped_step": 1.0})
    assert "stopped_step" in open_run(run).series
    with RunWriter(run, ATTRIBUTES, resume=True) as writer:
        writer.truncate_after(25)
        assert not (run / "series/stopped_step").exists()
    series = open_run(run).series
    assert "stopped_step" not in series
    assert {"loss", "learning_rate"} <= set(series.data_vars)


def test_no_verb_waits_for_a_lock_that_is_a_pipe(run, capsys):
    os.mkfifo(run / ".writer.lock")
    start = time.monotonic()
    assert main(["watch", str(run), "--once"]) in (0, 1)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("chunk", "left"),
    [
        (
            "residual_post/osp_excess_kurtosis/c.0.0.0",
            {"max_median_ratio", "nonfinite_token_count", "participation_ratio"},
        ),
        ("residual_post/layer/c.0", set()),  # without its labels nothing of the group can be read
    ],
)
def test_a_report_shows_what_is_whole_and_says_what_is_not(tmp_path, capsys, chunk, left):
    path = grown_run(tmp_path / "run.zarr")
    (path / chunk).write_bytes((path / chunk).read_bytes()[:-5])
    page = tmp_path / "report.html"
    assert main(["report", str(path), "--out", str(page)]) == 1
    told = capsys.readouterr()
    assert re.search(rf"^report: left out, chunk .*{re.escape(chunk)} is damaged", told.err, re.MULTILINE)
    assert f"report: {page}" in told.out
    assert f"Damaged, and therefore not on this page: chunk run.zarr/{chunk} is damaged" in page.read_text()
    opened = open_whole_part(path)
    assert set(opened.tree["residual_post"].data_vars) == left
    assert "osp_excess_kurtosis" in opened.at("final_norm")
    refused(path, f"{chunk} is damaged")


def test_a_run_whose_steps_are_damaged_has_no_report(run, tmp_path, capsys):
    (run / "step/c.0").unlink()
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 2
    assert "step/c.0 is missing; restore the run from a copy" in capsys.readouterr().err


def test_names_of_a_run_send_no_escape_sequence_to_the_terminal(tmp_path, capsys):
    evil = "tiny\x1b]0;title\x07\x1b[2J\u202e\ud800"
    path = write_run(tmp_path / "run.zarr", model_name=evil.replace("\ud800", ""), protocol=evil[:-1])
    for words in (["report", str(path), "--out", str(tmp_path / "r.html")], ["watch", str(path), "--once"]):
        main(words)
        told = capsys.readouterr()
        assert not set(told.out + told.err) & set("\x1b\x07\u202e")
    assert main(["report", str(tmp_path / f"gone{evil}"), "--out", str(tmp_path / "r.html")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_metadata_that_differ_from_the_array_s_own_are_damage(run):
    change(run, lambda nodes: nodes[KURTOSIS].update(dimension_names=["step", "stratum", "layer"]))
    opened = open_whole_part(run)
    (problem,) = opened.damage
    assert f"{KURTOSIS} is described in its own zarr.json otherwise than in the run's" in problem
    assert "osp_excess_kurtosis" not in opened.at("residual_post")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"sites": 5}, "its attribute 'sites' is 5"),
        ({"estimators": [3]}, "its attribute 'estimators' holds what is no text"),
        ({"model_name": {"a": 1}}, "its attribute 'model_name' is"),
        ({"number_of_layers": "many"}, "its attribute 'number_of_layers' is 'many'"),
    ],
)
def test_attributes_of_another_kind_are_refused(tmp_path, attributes, message):
    refused(write_run(tmp_path / "run.zarr", **attributes), message)


@pytest.mark.slow
def test_the_longer_fuzzer_counts_what_survives():
    command = [sys.executable, "-m", "benchmarks.hostile", "--only", "run", "--cases", "2"]
    root = Path(__file__).parents[1]
    told = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.splitlines()[-1].split() == ["all", "2", "2"]


def test_an_array_folder_that_is_a_link_is_not_read_through(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (run / KURTOSIS).rename(elsewhere)
    os.symlink(elsewhere, run / KURTOSIS)
    refused(run, f"{KURTOSIS} is a link, which is not followed")
