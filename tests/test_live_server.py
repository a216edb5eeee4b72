"""The live page's server: what it answers, what it lets through, and the verb that starts it."""

import io
import json
import shutil
import socket

import pytest

from osp_diag.analyses.live import standing
from osp_diag.cli.main import main
from osp_diag.figures import names
from osp_diag.figures.live._data import Choice
from osp_diag.figures.live._diagnosis import AlertDiagnoses
from osp_diag.figures.live._figures import figure_options
from osp_diag.figures.live._layout import CONTROLS, GRAPHS
from osp_diag.figures.live._page import DIAGNOSIS_PARTS, FIGURE_PARTS, Watched, diagnosis_parts
from osp_diag.figures.live._server import application, is_loopback
from osp_diag.figures.report.pictures import report_figures
from osp_diag.figures.styles import RUN_COLOURS
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.writer import RunWriter
from tests.growing_runs import ATTRIBUTES, followed, grown_run, record

# -- what the server answers -----------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))
    return run, application([run]).server.test_client()


def asked(client, told=None, value=None):
    """What the browser sends when a second has gone by, and what it gets."""
    inputs = {"runs": [0], "site": "residual_post", "statistic": "osp_excess_kurtosis"}
    inputs |= {"stratum": "all", "layer": "largest"} | (value or {})
    outputs = [
        *({"id": name, "property": "figure"} for name in GRAPHS),
        *({"id": f"{name}-box", "property": "style"} for name in list(GRAPHS)[:4]),
        *({"id": name, "property": "options"} for name in CONTROLS),
        *({"id": name, "property": "children"} for name in ("cards", "alerts", "definition")),
        {"id": "shown", "property": "data"},
        *({"id": part, "property": kind} for part, kind in DIAGNOSIS_PARTS.values()),
    ]
    joined = "...".join(f"{output['id']}.{output['property']}" for output in outputs)
    body = {
        "output": f"..{joined}..",
        "outputs": outputs,
        "inputs": [
            {"id": "tick", "property": "n_intervals", "value": 1},
            *({"id": name, "property": "value", "value": inputs[name]} for name in CONTROLS),
        ],
        "state": [
            {"id": "shown", "property": "data", "value": told},
            {"id": "diagnosis-shown", "property": "data", "value": None},
        ],
        "changedPropIds": ["tick.n_intervals"],
    }
    answer = client.post("/_dash-update-component", json=body, headers={"Host": "127.0.0.1:8050"})
    assert answer.status_code == 200, answer.text
    return answer.json["response"]


def test_only_what_changed_is_sent(page, tmp_path):
    run, client = page
    first = asked(client)
    assert set(GRAPHS) <= set(first)
    told = first["shown"]["data"]
    assert set(asked(client, told)) == {"cards"}
    with RunWriter(run.path, ATTRIBUTES, resume=True) as writer:
        record(writer, [60])
    second = asked(client, told)
    assert second["loss"]["figure"]["data"][0]["x"][-1] == 60
    assert second["shown"]["data"] != told
    assert set(asked(client, second["shown"]["data"], {"layer": "1"})) > {"cards", "kurtosis-curves"}


def test_the_page_goes_on_when_the_run_is_gone(page):
    run, client = page
    told = asked(client)["shown"]["data"]
    shutil.rmtree(run.path)
    gone = asked(client, told)
    assert gone["loss"]["figure"]["data"] == []
    assert "waiting for a writer" in json.dumps(gone["cards"])


@pytest.mark.parametrize("chunk", ["residual_post/osp_excess_kurtosis/c.0.0.0", "series/loss/c.0"])
def test_the_page_goes_on_when_a_file_is_damaged(tmp_path, chunk):
    path = grown_run(tmp_path / "run.zarr")
    whole = (path / chunk).read_bytes()
    (path / chunk).write_bytes(whole[:-9])
    run = FollowedRun(path)
    client = application([run]).server.test_client()
    damaged = asked(client)
    assert "is damaged" in json.dumps(damaged["cards"])
    assert set(asked(client, damaged["shown"]["data"])) == {"cards"}
    (path / chunk).write_bytes(whole)
    mended = asked(client, damaged["shown"]["data"])
    assert "is damaged" not in json.dumps(mended["cards"])
    assert mended["loss"]["figure"]["data"][0]["x"][-1] == 50


@pytest.mark.parametrize(
    "value",
    [
        {"runs": [0, 7, -1, "x", None, "../.."]},
        {"site": "../../../etc"},
        {"site": "", "statistic": "passwd"},
        {"statistic": "../zarr.json"},
        {"stratum": "'; --"},
        {"layer": "-1"},
        {"layer": {"a": 1}},
        {"runs": None},
    ],
)
def test_whatever_a_browser_sends_reaches_nothing_but_the_runs(page, value):
    _, client = page
    assert "shown" in asked(client, None, value)


def test_choices_that_are_no_runs_are_left_out(page):
    run, _ = page
    assert Watched([run]).choice([0, 0, 3, "-1", True], "a", None, "", 2) == Choice((0,), site="a", layer="2")


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost:9999", "[::1]:8050", "127.0.0.1"])
def test_its_own_names_are_answered(page, host):
    assert page[1].get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8050", "127.0.0.1.evil.example", "192.168.1.5:8050", ""])
def test_other_names_are_refused(page, host):
    answer = page[1].get("/", headers={"Host": host})
    assert answer.status_code == 403
    assert "DNS rebinding" in answer.text


def test_on_another_address_addresses_are_answered_and_foreign_names_are_not(page):
    client = application([page[0]], host="0.0.0.0").server.test_client()
    assert client.get("/", headers={"Host": "192.168.1.5:8050"}).status_code == 200
    assert client.get("/", headers={"Host": socket.gethostname()}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/zarr.json",
        "/assets/../../zarr.json",
        "/assets/x.css",
        "/static/x",
        "/_reload-hash",
        "/_mcp",
        "/_dash-component-suites/dash/../../../pyproject.toml",
        "/_dash-component-suites/osp_diag/run.py",
        "/run.zarr",
    ],
)
def test_nothing_but_the_page_is_served(page, path):
    answer = page[1].get(path, headers={"Host": "localhost"})
    assert answer.status_code >= 400
    assert b"osp_diag_run" not in answer.data


def test_the_page_may_load_nothing_from_elsewhere(page):
    answer = page[1].get("/", headers={"Host": "localhost"})
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "https://" not in answer.text
    assert "http://" not in answer.text


def test_which_addresses_are_this_machine_alone():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "192.168.1.5", "example.org")] == [False] * 3


# -- the diagnosis -----------------------------------------------------------------------------------------


def test_a_diagnosis_is_made_in_the_background_and_anew_with_another_alert(tmp_path):
    path = grown_run(tmp_path / "run.zarr", range(0, 40, 10))
    run = followed(path)
    diagnoses = AlertDiagnoses([run])
    assert diagnoses.look([standing(run)], [0]) is None  # there is no alert
    with RunWriter(path, ATTRIBUTES, resume=True) as writer:
        record(writer, [40], bad_layer=1)
    run.refresh()
    assert diagnoses.look([standing(run)], [0]) is None  # it is being made
    diagnoses.wait()
    panel = diagnoses.look([standing(run)], [0])
    assert panel is diagnoses.look([standing(run)], [0])
    ((label, made, problem),) = panel.entries
    assert (label, problem) == ("grown", "")
    assert (made.bracket.good, made.bracket.bad, made.last_step) == (30, 40, 40)
    assert set(panel.pictures["diagnosis_timeline"]) == {"data", "layout"}
    assert panel.pictures["first_jumps"] is None
    assert "too few probes to say which changes are usual" in panel.left_out[0]
    parts = diagnosis_parts(panel, None)
    assert parts["diagnosis"] is False
    assert "NaN or Inf in 3 tokens at step 40" in str(parts["diagnosis-words"])
    assert diagnosis_parts(panel, panel.version) == {}
    assert diagnosis_parts(None, panel.version)["diagnosis"] is True


# -- figures of the registry -----------------------------------------------------------------------------


def asked_figure(client, name, told=None, places=(0,)):
    """What the browser sends for the figure that is chosen, and what it gets."""
    outputs = [{"id": place[0], "property": place[1]} for place in FIGURE_PARTS.values()]
    joined = "...".join(f"{output['id']}.{output['property']}" for output in outputs)
    body = {
        "output": f"..{joined}..",
        "outputs": outputs,
        "inputs": [
            {"id": "tick", "property": "n_intervals", "value": 1},
            {"id": "figure", "property": "value", "value": name},
            {"id": "runs", "property": "value", "value": list(places)},
        ],
        "state": [{"id": "figure-shown", "property": "data", "value": told}],
        "changedPropIds": ["tick.n_intervals"],
    }
    answer = client.post("/_dash-update-component", json=body, headers={"Host": "127.0.0.1:8050"})
    assert answer.status_code == 200, answer.text
    sent = answer.json["response"]
    if not sent:  # nothing new
        return None
    picture = sent["figure-picture"]["data"]
    texts = json.dumps(sent["figure-left-out"]["children"]), sent["figure-caption"]["children"]
    return sent["figure-shown"]["data"], picture, *texts


def test_every_figure_is_offered_in_the_order_of_the_report():
    offered = [option["value"] for option in figure_options()]
    assert sorted(offered) == names()
    assert [name for name in offered if name in report_figures()] == list(report_figures())
    labels = [option["label"] for option in figure_options()]
    assert len(set(labels)) == len(labels)
    assert all(labels)


def test_a_figure_is_drawn_when_it_is_asked_for_and_anew_when_the_run_has_grown(page, monkeypatch):
    run, client = page
    monkeypatch.setattr("osp_diag.figures.live._figures.REST", 0.0)
    assert asked_figure(client, None) is None
    told, picture, left_out, caption = asked_figure(client, "kurtosis_dynamics")
    assert picture["data"][-1]["x"][-1] == 50
    assert caption.startswith("Training loss and OSP kurtosis of the hidden states. grown")
    assert left_out == "[]"
    assert asked_figure(client, "kurtosis_dynamics", told) is None
    with RunWriter(run.path, ATTRIBUTES, resume=True) as writer:
        record(writer, [60])
    assert asked_figure(client, "kurtosis_dynamics", told)[1]["data"][-1]["x"][-1] == 60
    assert asked_figure(client, None, told) == (None, None, "null", None)


def test_a_figure_that_took_long_rests(page, monkeypatch):
    run, client = page
    monkeypatch.setattr("osp_diag.figures.live._figures.REST", 1e6)
    told = asked_figure(client, "depth_profile")[0]
    with RunWriter(run.path, ATTRIBUTES, resume=True) as writer:
        record(writer, [60])
    assert asked_figure(client, "depth_profile", told) is None
    assert asked_figure(client, "depth_profile")[0] == told, "another browser gets the one there is"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("activation_surface", "holds no snapshot of"),
        ("weight_surface", "probe the checkpoint with"),
        ("bit_width_sweep", "holds no results at few bits"),
        ("channel_map_comparison", "channel"),
    ],
)
def test_a_figure_that_cannot_be_drawn_says_why(page, name, reason):
    _, picture, left_out, _ = asked_figure(page[1], name)
    assert picture is None
    assert reason in left_out


def test_a_figure_of_some_runs_says_why_not_of_the_others_and_keeps_their_colours(tmp_path):
    runs = [
        followed(tmp_path / "waiting.zarr"),
        followed(grown_run(tmp_path / "one.zarr", range(0, 10, 10), model_name="one")),
        followed(grown_run(tmp_path / "long.zarr", model_name="<b>long</b>")),
    ]
    client = application(runs).server.test_client()
    _, picture, left_out, _ = asked_figure(client, "kurtosis_dynamics", places=(0, 1, 2))
    assert "one: it needs 2 probed steps" in left_out
    assert "waiting: it needs 2 probed steps" in left_out
    colours = {trace["line"]["color"] for trace in picture["data"] if trace.get("showlegend") is not False}
    assert colours & set(RUN_COLOURS) == {RUN_COLOURS[2]}
    assert "<b>long" not in json.dumps(picture)


@pytest.mark.parametrize("name", ["../etc", "_registry", "report", "os", "", 3, {"a": 1}, ["sink_map"]])
def test_whatever_a_browser_asks_for_is_a_figure_or_nothing(page, name):
    assert asked_figure(page[1], name) is None


def test_a_defect_of_a_figure_is_told_and_the_page_goes_on(page, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("osp_diag.figures.live._figures.page_picture", broken)
    left_out = asked_figure(page[1], "sink_map")[2]
    assert "it cannot be drawn (ZeroDivisionError: by zero); this is a defect of osp-diag" in left_out


# -- the verb --------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told(tmp_path, capsys):
    path = grown_run(tmp_path / "run.zarr")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["watch", str(path), "--serve", "--port", str(port)]) == 2
    said = f"cannot serve on 127.0.0.1, port {port}: Address already in use; choose another with --port"
    assert said in capsys.readouterr().err


def test_addresses_that_cannot_be_had_are_told(tmp_path, capsys):
    path = str(grown_run(tmp_path / "run.zarr"))
    assert main(["watch", path, "--serve", "--port", "70000"]) == 2
    assert "--port 70000: a port is a number from 0 (any that is free) to 65535" in capsys.readouterr().err
    assert main(["watch", path, "--serve", "--host", "no.such.host.invalid"]) == 2
    assert "give an address of this machine with --host" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_letting_other_machines_in_is_warned_of(tmp_path, capsys, monkeypatch, host, warned):
    class Interrupted:
        def serve_forever(self):
            raise KeyboardInterrupt

        def server_close(self):
            pass

    monkeypatch.setattr("werkzeug.serving.make_server", lambda *_, **__: Interrupted())
    path = str(grown_run(tmp_path / "run.zarr"))
    assert main(["watch", path, "--serve", "--port", "0", "--host", host]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"watch: http://{host}:")
    assert (f"--host {host} lets other machines see these runs; there is no password" in said.err) == warned


def test_without_dash_the_message_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "dash", None)
    path = str(grown_run(tmp_path / "run.zarr"))
    assert main(["watch", path, "--serve", "--port", "0"]) == 2
    assert "this needs the package 'dash': pip install \"osp-diag[live]\"" in capsys.readouterr().err


# -- what no page asks -----------------------------------------------------------------------------------

LOCAL = {"Host": "127.0.0.1:8050"}
UPDATE = "/_dash-update-component"


@pytest.mark.parametrize("host", ["[::1", "[", "a b:1", "127.0.0.1:port", "[v1.x]:80"])
def test_a_host_that_is_none_is_refused_without_a_traceback(page, capfd, host):
    assert page[1].get("/", headers={"Host": host}).status_code in (400, 403)
    assert capfd.readouterr().err == ""


BODIES = {
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "endless number": b'{"output": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "no output": b"{}",
    "another output": b'{"output": "..a.b..", "inputs": []}',
    "output of another kind": b'{"output": {"a": 1}}',
    "empty": b"",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_malformed_body_is_a_bad_request(page, capfd, body):
    answer = page[1].post(UPDATE, data=body, headers=LOCAL, content_type="application/json")
    assert (answer.status_code, answer.text) == (400, "This is nothing that the page asks.\n")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("part", ["inputs", "state", "outputs", "changedPropIds"])
@pytest.mark.parametrize("value", [None, 3, "x", [None], [{}], [3]])
def test_a_body_with_a_part_of_another_shape_is_a_bad_request(page, monkeypatch, part, value):
    _, client = page
    bodies = []
    monkeypatch.setattr(client, "post", lambda path, json, headers: bodies.append(json) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked(client)
    monkeypatch.undo()
    assert client.post(UPDATE, json=bodies[0], headers=LOCAL).status_code == 200
    assert client.post(UPDATE, json=bodies[0] | {part: value}, headers=LOCAL).status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_no_body_above_a_megabyte_is_read(page, chunked):
    body = io.BytesIO(b"x" * 2**22)
    overrides = {"wsgi.input_terminated": True, "CONTENT_LENGTH": ""} if chunked else {}
    answer = page[1].post(UPDATE, input_stream=body, headers=LOCAL, environ_overrides=overrides)
    assert answer.status_code in ((400, 413) if chunked else (413,))
    assert body.tell() <= 2**20 + 2**16


@pytest.mark.parametrize(
    "path", ["/_dash-component-suites/other/a.js", "/_dash-component-suites/dash/../../x"]
)
def test_a_library_that_is_none_is_not_found(page, capfd, path):
    assert page[1].get(path, headers=LOCAL).status_code == 404
    assert "Traceback" not in capfd.readouterr().err


def test_a_page_that_cannot_be_made_leaves_a_sentence(page, capfd, monkeypatch):
    def broken(self, choice):
        raise ZeroDivisionError("by \x1b[2Jzero")

    monkeypatch.setattr(Watched, "version", broken)
    with pytest.raises(AssertionError, match="the terminal says why"):
        asked(page[1])
    told = capfd.readouterr().err
    assert told == "watch: the page could not be made: ZeroDivisionError: by \ufffd[2Jzero\n"
