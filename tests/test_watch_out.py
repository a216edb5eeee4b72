"""The alerts that ``osp-diag watch --out`` writes."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import datetime

import pytest

from osp_diag.analyses.live import standing
from osp_diag.cli.main import main
from osp_diag.cli.watch_alerts import AlertFile
from osp_diag.monitoring import Finding
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.writer import RunWriter
from tests.growing_runs import ATTRIBUTES, grown_run, record, scalars

NAN = float("nan")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("how", ["--once", "--json"])
def test_every_alert_is_a_line(tmp_path, capsys, how):
    good, bad, out = grown_run(tmp_path / "good.zarr"), tmp_path / "bad.zarr", tmp_path / "alerts.jsonl"
    with RunWriter(bad, ATTRIBUTES) as writer:
        record(writer, [0, 10])
        writer.append_series(11, scalars(11) | {"loss": NAN, "gradient_norm": NAN})
        record(writer, [20])
    out.write_text("of an earlier watch\n")
    assert main(["watch", str(good), str(bad), how, "--out", str(out)]) == 1
    capsys.readouterr()
    found = lines(out)
    assert [entry["sentence"] for entry in found] == [
        "loss is nan at step 11",
        "gradient_norm is nan at step 11",
    ]
    assert set(found[0]) == {"time", "run"} | {field.name for field in fields(Finding)}
    assert (found[0]["run"], found[0]["rule"], found[0]["value"]) == (str(bad), "nonfinite_scalars", "nan")
    assert datetime.fromisoformat(found[0]["time"]).tzinfo is not None


def test_without_alerts_the_file_is_empty(tmp_path, capsys):
    out = tmp_path / "alerts.jsonl"
    assert main(["watch", str(grown_run(tmp_path / "run.zarr")), "--once", "--out", str(out)]) == 0
    assert "step 50 of 1,000" in capsys.readouterr().out
    assert out.read_text() == ""


def test_while_an_alert_stands_it_is_written_once_and_again_when_it_comes_back(tmp_path):
    path, out = tmp_path / "run.zarr", tmp_path / "alerts.jsonl"
    run, alerts = FollowedRun(path), AlertFile(out)

    def told():
        run.refresh()
        alerts.add([standing(run)])
        return [entry["step"] for entry in lines(out)]

    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0])
        assert told() == []
        record(writer, [10], bad_layer=1)
        assert told() == [10]
        record(writer, [20], bad_layer=1)
        assert told() == [10]
        writer.append_series(21, scalars(21) | {"skipped_step": 1.0})
        writer.flush()
        assert told() == [10, 21]
        writer.truncate_after(0)
        assert told() == [10, 21]
        record(writer, [10], bad_layer=1)
        assert told() == [10, 21, 10]


def test_a_file_that_cannot_be_meant_is_refused_before_anything_is_shown(tmp_path, capsys):
    run = grown_run(tmp_path / "run.zarr")
    (tmp_path / "folder.jsonl").mkdir()
    for words, said in (
        (["--once", "--out", tmp_path / "a.txt"], "alerts are lines of JSON; let the name end in .jsonl"),
        (
            ["--out", tmp_path / "no" / "a.jsonl"],
            f"the folder {tmp_path / 'no'} does not exist; make it first",
        ),
        (["--json", "--out", tmp_path / "folder.jsonl"], "Is a directory; write elsewhere or make room"),
        (["--serve", "--out", tmp_path / "a.jsonl"], "--serve writes no file; leave --out out, or run"),
    ):
        assert main(["watch", str(run), *map(str, words)]) == 2
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.out == ""
