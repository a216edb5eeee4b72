"""What the trainer does with what the monitor says, in trainings whose learning rate is far too high."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from osp_diag.cli.train_progress import outcome
from osp_diag.errors import TrainingError
from osp_diag.figures.report.build import findings_of
from osp_diag.runs.run import open_run
from osp_diag.trainer.checkpoint import complete_folders, step_of
from osp_diag.trainer.checkpoint_pins import read_pins
from osp_diag.trainer.headline import HeadlineLog
from osp_diag.trainer.loop import train
from tests.training_runs import minute

ROSE = "bad: the held-out loss rose to 8.111 at step 4, 1 above its lowest, 7.107 at step 3"


def failing(action="log", **changes):
    """A config whose held-out loss rises after step 3."""
    settings = {
        "optimizer__lr": 0.3,
        "schedule__warmup": 6,
        "log_every": 1,
        "probe__every": 1,
        "probe__sites": ("residual_post",),
        "checkpoint__every": 1,
        "checkpoint__keep": 1,
        "checkpoint__ladder": 0,
        "monitor__action": action,
    }
    return minute(**settings | changes)


def checkpoints(out):
    return [step_of(path) for path in complete_folders(out.with_suffix(".checkpoints"))]


def test_log_says_it_and_keeps_nothing(tmp_path):
    out, said = tmp_path / "run.zarr", []
    run = train(failing(), out, announce=said.append)
    assert ROSE in said
    assert checkpoints(out) == [6]
    assert read_pins(out.with_suffix(".checkpoints")) == {}
    # Standard output and the report say it as well.
    rules = [finding["rule"] for finding in outcome(run)["findings"]]
    assert rules[0] == "loss_rise"
    assert findings_of(run)[0] == ("monitor", ROSE.removeprefix("bad: "))


@pytest.mark.parametrize("deferred", [False, True])
def test_pin_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, deferred):
    """Also where a probe is judged later than it was taken, as on a GPU."""
    if deferred:
        monkeypatch.setattr(
            HeadlineLog, "after_probe", lambda log, step, values: setattr(log, "_pending", (step, values))
        )
    out = tmp_path / "run.zarr"
    train(failing("pin"), out)
    assert checkpoints(out) == [3, 6]
    assert read_pins(out.with_suffix(".checkpoints")) == {3: ROSE.removeprefix("bad: ")}


def test_checkpoint_also_saves_what_it_is_about(tmp_path):
    out = tmp_path / "run.zarr"
    train(failing("checkpoint", checkpoint__every=3, checkpoint__keep=3, steps=6), out)
    assert checkpoints(out) == [3, 4, 6]


def test_stop_ends_and_a_resumption_with_another_action_goes_on(tmp_path):
    out = tmp_path / "run.zarr"
    message = r"monitor\.action=stop: stopped after step 4, whose state is saved; `osp-diag watch` says why"
    with pytest.raises(TrainingError, match=message):
        train(failing("stop"), out)
    assert open_run(out).steps[-1] == 4
    assert checkpoints(out) == [3, 4]
    said = []
    train(failing("log"), out, resume=True, announce=said.append)
    assert open_run(out).steps[-1] == 6
    assert ROSE not in said, "it was said before"
    assert checkpoints(out) == [3, 6]


def test_a_webhook_gets_every_finding(tmp_path):
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *words):
            """Not to standard error."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            run = train(
                failing(monitor__webhook=f"http://127.0.0.1:{server.server_port}/"), tmp_path / "run.zarr"
            )
        finally:
            server.shutdown()
            thread.join()
    assert {"bad: " + one["sentence"] for one in received if one["severity"] == "bad"} == {ROSE}
    assert not [note for note in run.notes if "webhook" in note]


def test_a_webhook_that_fails_is_one_note_and_its_address_is_recorded_nowhere(tmp_path, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port  # closed again: nobody answers there
    said = []
    address = f"http://127.0.0.1:{port}/secret"
    monkeypatch.setattr("sys.argv", ["osp-diag", "train", "tiny", "--set", f"monitor.webhook={address}"])
    run = train(failing(monitor__webhook=address), tmp_path / "run.zarr", announce=said.append)
    assert run.steps[-1] == 6
    (note,) = [note for note in run.notes if "webhook" in note]
    assert note.startswith("monitor.webhook at 127.0.0.1 failed at step 4: URLError(ConnectionRefusedError")
    assert note.endswith("; training goes on")
    assert run.attrs["command"] == f"osp-diag train tiny --set monitor.webhook=http://127.0.0.1:{port}/…"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"secret" in path.read_bytes()]
    assert said.count(note) == 1
