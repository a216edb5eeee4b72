"""The live page's server: what it answers, what it lets through, and the verb that starts it."""

import json
import shutil
import socket

import pytest

from osp_diag.cli.main import main
from osp_diag.figures.live._data import Choice
from osp_diag.figures.live._layout import CONTROLS, GRAPHS
from osp_diag.figures.live._page import Watched
from osp_diag.figures.live._server import application, is_loopback
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
    ]
    joined = "...".join(f"{output['id']}.{output['property']}" for output in outputs)
    body = {
        "output": f"..{joined}..",
        "outputs": outputs,
        "inputs": [
            {"id": "tick", "property": "n_intervals", "value": 1},
            *({"id": name, "property": "value", "value": inputs[name]} for name in CONTROLS),
        ],
        "state": [{"id": "shown", "property": "data", "value": told}],
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
