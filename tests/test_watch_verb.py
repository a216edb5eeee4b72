"""``osp-diag watch``, as a user types it."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from osp_diag.analyses.live import standing
from osp_diag.cli.main import main
from osp_diag.cli.watch_terminal import standing_as_text
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.writer import RunWriter
from osp_diag.wording import duration
from tests.growing_runs import ATTRIBUTES, groups, grown_run, record, scalars

ROOT = Path(__file__).parents[1]


def looked(path):
    run = FollowedRun(path)
    run.refresh()
    return standing(run)


# -- what it prints --------------------------------------------------------------------------------------


def test_once_prints_where_a_run_stands(tmp_path, capsys):
    path = grown_run(tmp_path / "run.zarr")
    assert main(["watch", str(path), "--once"]) == 0
    text = capsys.readouterr().out
    for said in (
        "grown",
        "(Llama, 3 layers, 64 channels)",
        "step 50 of 1,000, nobody writes it, last written",
        "loss 4.95 (held out 5.05), learning rate 0.001, gradient norm 1",
        "4,096 tokens/s, probing takes 2.3% of the time",
        "OSP kurtosis over its floor (0.176), ▁ 1× to █ 10×, steps 0 to 50",
        "embedding     ▁▁▁▁",
        "layer 2       ▄▄▄▄",
        "4.5×",
        "sink rate: heads that give the first token over 0.3 of their attention",
        "25%",
    ):
        assert said in text
    assert "\x1b" not in text, "no colours where no terminal is"


def test_rows_are_the_numbers_of_the_run(tmp_path):
    """On a scale from 1 to 10 the bars of 1, 2 and 3 times the floor are the first, third and fourth."""
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        for step, over in enumerate((1.0, 2.0, 3.0, 10.0, 0.5, np.nan)):
            writer.append(step, groups([over]))
    lines = standing_as_text(looked(path), width=40, rows=8, top=10.0).plain.splitlines()
    assert next(line for line in lines if line.startswith("layer 0")).split()[2] == "▁▁▃▃▄▄██▁▁··"
    digits = standing_as_text(looked(path), width=40, rows=8, top=10.0, bars="12345678").plain
    assert "1133448811.." in digits
    digits.split("sink rate")[0].replace("\u00d7", "").encode("ascii")


def test_many_layers_and_steps_share_rows_and_bars_and_keep_their_spikes(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, block=300) as writer:
        for step in range(300):
            over = np.ones(24)
            over[13] = 10.0 if step == 151 else 1.0
            writer.append(step, groups(over))
    lines = standing_as_text(looked(path), width=63, rows=5, top=10.0).plain.splitlines()
    rows = [line for line in lines if line.startswith(("embedding", "layers", "final"))][:5]
    assert len(rows) == 5
    spiked = [row for row in rows if "█" in row]
    assert len(spiked) == 1
    assert spiked[0].startswith("layers 8 to 15")
    assert spiked[0].count("█") == 1
    assert rows[0].startswith("embedding ")
    assert rows[4].startswith("final norm ")


def test_several_runs_share_one_scale(tmp_path, capsys):
    low, high = grown_run(tmp_path / "low.zarr"), tmp_path / "high.zarr"
    with RunWriter(high, ATTRIBUTES | {"model_name": "higher"}) as writer:
        writer.append(0, groups([100.0]))
    assert main(["watch", str(low), str(high), "--once"]) == 0
    text = capsys.readouterr().out
    assert text.count("█ 100×") == 2
    assert "higher" in text


def test_names_cannot_command_the_terminal(tmp_path, capsys):
    path = grown_run(tmp_path / "run.zarr", model_name="[bold red]\x1b[2Jevil\x07")
    assert main(["watch", str(path), "--once"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold red]\ufffd[2Jevil\ufffd" in text


def test_json_is_for_machines(tmp_path, capsys):
    path = grown_run(tmp_path / "run.zarr")
    assert main(["watch", str(path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["run"] == str(path)
    assert (found["last_step"], found["planned_steps"], found["probes"]) == (50, 1000, 6)
    assert found["loss"] == pytest.approx(4.95)
    assert found["model_flops_utilisation"] is None
    last = found["osp_excess_kurtosis"]
    assert [row["site"] for row in last] == ["embedding", *["residual_post"] * 3, "final_norm"]
    assert last[3]["value"] / last[3]["floor"] == pytest.approx(4.5)
    assert found["sink_rate"][0] == {"layer": 0, "value": 0.25}
    assert found["alerts"] == []


def test_times_are_told_as_people_do():
    told = [duration(seconds) for seconds in (3.2, 119, 120, 7199, 7200, 172800)]
    assert told == ["3 s", "119 s", "2 min", "120 min", "2.0 h", "2.0 days"]


def test_forecasts_are_shown_on_request_alone(tmp_path, capsys):
    path = grown_run(tmp_path / "run.zarr")
    assert main(["watch", str(path), "--once", "--forecast"]) == 0
    assert "forecast: none" in capsys.readouterr().out
    assert main(["watch", str(path), "--json", "--forecast"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["forecasts"] == []
    assert main(["watch", str(path), "--json"]) == 0
    assert "forecasts" not in json.loads(capsys.readouterr().out)["runs"][0]


# -- exit codes ------------------------------------------------------------------------------------------


def test_nonfinite_values_are_exit_code_1(tmp_path, capsys):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0, 10])
        record(writer, [20], bad_layer=1)
    assert main(["watch", str(path), "--once"]) == 1
    said = "!! NaN or Inf in 3 tokens at step 20, first at residual_post, layer 1"
    assert said in capsys.readouterr().out
    assert main(["watch", str(path), "--json"]) == 1
    (alert,) = json.loads(capsys.readouterr().out)["runs"][0]["alerts"]
    assert (alert["rule"], alert["step"]) == ("nonfinite_activations", 20)


def test_a_diverged_step_is_exit_code_1(tmp_path, capsys):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0])
        writer.append_series(1, scalars(1) | {"loss": float("nan"), "skipped_step": 1.0})
    assert main(["watch", str(path), "--json"]) == 1
    alerts = json.loads(capsys.readouterr().out)["runs"][0]["alerts"]
    assert [alert["rule"] for alert in alerts] == ["diverged_steps", "nonfinite_scalars"]
    assert alerts[1]["value"] == "nan"


def test_a_damaged_file_is_told_and_what_can_be_read_is_shown(tmp_path, capsys):
    path = grown_run(tmp_path / "run.zarr")
    chunk = path / "residual_post/osp_excess_kurtosis/c.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    assert main(["watch", str(path), "--once"]) == 1
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "cannot be read" in text
    assert "is damaged" in text
    assert "loss 4.95" in text


# -- what is no run --------------------------------------------------------------------------------------


def refused(capsys, *words):
    assert main(["watch", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_misuse_is_told(tmp_path, capsys):
    run = grown_run(tmp_path / "run.zarr")
    (tmp_path / "file.txt").write_text("sentence")
    assert "is not a run: it has no zarr.json; give the folder" in refused(capsys, tmp_path)
    assert "file.txt is a file; a run is a folder" in refused(capsys, tmp_path / "file.txt")
    assert f"no run at {tmp_path / 'not.zarr'}; check the path, or leave --once and --json out" in refused(
        capsys, tmp_path / "not.zarr", "--once"
    )
    missing = tmp_path / "folder" / "not.zarr"
    assert f"no run at {missing}, and no folder {missing.parent} in which one could" in refused(
        capsys, missing
    )
    assert "--every is a number of seconds from 0.1 to 3600, not 0" in refused(capsys, run, "--every", 0)
    assert "leave --once and --json out" in refused(capsys, run, "--serve", "--once")
    assert "--serve shows no forecasts; leave --forecast out" in refused(capsys, run, "--serve", "--forecast")
    assert "which run? Give the path" in refused(capsys)


# -- while a run is written ------------------------------------------------------------------------------


@contextmanager
def watching(path, **options):
    command = [sys.executable, "-m", "osp_diag", "watch", str(path), "--every", "0.1"]
    process = subprocess.Popen(command, cwd=ROOT, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(file, said):
    """What ``file`` gives until ``said`` is among it."""
    text, end = "", time.monotonic() + 60
    while said not in text and time.monotonic() < end:
        text += os.read(file, 65536).decode(errors="replace")
    assert said in text, text
    return text


@pytest.mark.slow
def test_piped_it_waits_for_a_run_and_prints_again_when_something_changed(tmp_path):
    path = tmp_path / "run.zarr"
    with watching(path, stdout=subprocess.PIPE) as process:
        out = process.stdout.fileno()
        read_until(out, "nothing is there yet; waiting for a writer")
        with RunWriter(path, ATTRIBUTES) as writer:
            record(writer, [0, 10])
            read_until(out, "step 10 of 1,000, being written")
            record(writer, [20])
            read_until(out, "step 20 of 1,000, being written")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        process.stdout.close()


@pytest.mark.slow
def test_on_a_terminal_it_renews_the_picture_until_interrupted(tmp_path):
    path = tmp_path / "run.zarr"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    with RunWriter(path, ATTRIBUTES) as writer:
        record(writer, [0, 10])
        with watching(path, stdout=theirs, stdin=theirs, env=environment) as process:
            text = read_until(ours, "step 10 of 1,000, being written")
            assert "\x1b[?1049h" in text, "on a screen of its own"
            record(writer, [20], bad_layer=0)
            read_until(ours, "step 20 of 1,000")
            process.send_signal(signal.SIGINT)
            left = read_until(ours, "\x1b[?1049l")
            read_until(ours, "NaN or Inf in") if "NaN or Inf" not in left.split("1049l")[1] else 0
            assert process.wait(30) == 1
    os.close(ours)
    os.close(theirs)
