"""The live page without a browser: alerts, what its pictures hold, what the server lets through."""

import json
import shutil
import socket

import numpy as np
import pytest

from analyses.alerts import AlertRules, alerts, growth, share_rising
from analyses.live_numbers import hidden_state_kurtosis
from figures.live._data import MOST_BINS, Choice, chosen, curve, extremes, of_layers, offered, sinks
from figures.live._layout import CONTROLS, GRAPHS, labels_of
from figures.live._page import Watched, pictures
from figures.live._server import application, is_loopback
from osp_diag.cli.main import main
from osp_diag.errors import UsageError
from osp_diag.run_following import FollowedRun
from osp_diag.store import RunWriter
from tests.growing_runs import ATTRIBUTES, FLOOR, WIDTH, groups, grown_run, record, scalars


def followed(path):
    run = FollowedRun(path)
    run.refresh()
    return run


def written(path, courses, **changes):
    """A run whose layers take these courses, as multiples of the floor; (layer, step)."""
    with RunWriter(path, ATTRIBUTES | changes.pop("attributes", {}), block=1000) as writer:
        for step, over in enumerate(np.asarray(courses, float).T):
            writer.append(step, groups(over, **changes))
    return followed(path)


# -- alerts ----------------------------------------------------------------------------------------------


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
    found = alerts(written(tmp_path / "run.zarr", [np.ones(len(course)), course]))
    assert [alert.rule for alert in found] == (["growing_kurtosis"] if told else [])
    if told:
        (alert,) = found
        assert (alert.severity, alert.step) == ("watch", 11)
        assert alert.value == pytest.approx(12 * 1.2**11)
        assert alert.text == (
            "OSP kurtosis of layer 1 is 89 times its floor, having grown 5.16-fold over the last 10 probes"
        )


def test_a_wobbling_plateau_is_not_told(tmp_path):
    wobble = np.exp(0.1 * np.random.default_rng(0).standard_normal((24, 60)))
    run = written(tmp_path / "run.zarr", 100 * wobble)
    kurtosis = hidden_state_kurtosis(run).values[1:25]
    rules = AlertRules()
    windows = [kurtosis[:, at : at + rules.window] for at in range(50)]
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
    (alert,) = alerts(followed(path))
    assert (alert.rule, alert.severity, alert.step) == ("nonfinite_activations", "bad", 20)
    assert alert.text == (
        "NaN or Inf in activations of 2 probed steps, first at step 20 (residual_post, layer 2)"
    )


def test_a_scalar_that_was_not_recorded_is_not_nan(tmp_path):
    """Step 0 has no loss; steps that are not probed have no held-out loss; the last row is not complete."""
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES, series_block=1) as writer:
        record(writer, [0, 10])
        for step in (11, 12):
            writer.append_series(step, scalars(step))
        writer.append_series(13, {"probe_seconds": 1.0})
        assert alerts(followed(path)) == []
        writer.append_series(13, {"held_out_loss": 5.0})
        writer.append_series(14, scalars(14) | {"gradient_norm": np.inf})
        writer.append_series(15, scalars(15) | {"loss": np.nan})
        writer.append_series(16, scalars(16) | {"loss": np.nan})
        found = alerts(followed(path))
    assert [alert.text for alert in found] == [
        "loss is nan at step 15 and 1 later step",
        "gradient_norm is inf at step 14",
    ]


def test_steps_that_the_trainer_passed_over_are_told(tmp_path):
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        for step in range(1, 6):
            bad = {"skipped_step": 1.0} if step in (2, 4) else {}
            writer.append_series(step, scalars(step) | bad)
    (alert,) = alerts(followed(path))
    assert alert.text == "the trainer passed over 2 diverged steps, the last is 4"


def test_rules_that_cannot_be_meant_are_refused():
    with pytest.raises(UsageError, match=r"window at least 2, rising a share; got 1, 1\.25, 10 and 0\.9$"):
        AlertRules(times_floor=1)


# -- small enough to send --------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_extremes_and_its_ends():
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000)
    values[[1234, 8765]] = 50.0, -50.0
    steps, kept = curve(np.arange(10_000), values)
    assert len(kept) <= 2 * MOST_BINS + 2
    assert steps[kept.argmax()] == 1234
    assert steps[kept.argmin()] == 8765
    assert (steps[0], steps[-1]) == (0, 9999)
    assert (np.diff(steps) > 0).all()


def test_a_gap_stays_a_gap():
    values = np.ones(5000)
    values[2000:3000] = np.nan
    kept = extremes(values, 100)
    assert np.isnan(values[kept]).any()
    assert len(extremes(np.ones(7), 100)) == 7


def test_a_spike_of_one_step_is_in_the_map_and_in_the_curve(tmp_path):
    courses = np.ones((2, 700))
    courses[1, 333] = 90.0
    run = written(tmp_path / "run.zarr", courses)
    drawn = pictures([run], Choice((0,)))
    z = np.array(drawn["kurtosis-maps"]["data"][0]["customdata"])
    assert z.shape == (2, MOST_BINS)
    assert z.max() == pytest.approx(90 * FLOOR, rel=1e-4)
    line = drawn["kurtosis-curves"]["data"][0]
    assert max(line["y"]) == pytest.approx(90 * FLOOR, rel=1e-4)
    assert line["x"][int(np.argmax(line["y"]))] == 333


def test_what_is_sent_does_not_grow_with_the_run(tmp_path):
    sizes = [
        len(json.dumps(pictures([written(tmp_path / f"{count}.zarr", np.ones((4, count)))], Choice((0,)))))
        for count in (650, 1300)
    ]
    assert sizes[1] < 1.2 * sizes[0]


# -- what the pictures hold ------------------------------------------------------------------------------


def test_curves_are_of_the_chosen_layer_tokens_and_statistic(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))

    def line(**changes):
        return pictures([run], Choice((0,), **changes))["kurtosis-curves"]["data"][0]["y"]

    assert line(layer="0")[-1] == pytest.approx(1.5 * FLOOR, rel=1e-4)
    assert line(layer="largest")[-1] == pytest.approx(4.5 * FLOOR, rel=1e-4)
    assert line(layer="mean")[-1] == pytest.approx(3.0 * FLOOR, rel=1e-4)
    assert line(layer="2", stratum="first")[-1] == pytest.approx(9.0 * FLOOR, rel=1e-4)
    assert line(statistic="max_median_ratio")[-1] == pytest.approx(3 + 4.5 * FLOOR, rel=1e-4)
    assert line(site="embedding")[-1] == pytest.approx(FLOOR, rel=1e-4)
    assert line(layer="17") == [None] * 6


def test_maps_of_several_runs_share_one_scale_of_colours(tmp_path):
    low, high = (
        written(tmp_path / f"{name}.zarr", [[1.0, 1.0], [1.0, top]], attributes={"model_name": name})
        for name, top in (("low", 2.0), ("high", 300.0))
    )
    drawn = pictures([low, high], Choice((0, 1)))["kurtosis-maps"]
    assert [trace["coloraxis"] for trace in drawn["data"]] == ["coloraxis", "coloraxis"]
    assert drawn["layout"]["coloraxis"]["cmin"] == pytest.approx(np.log10(FLOOR))
    assert drawn["layout"]["coloraxis"]["cmax"] == pytest.approx(np.log10(300 * FLOOR))
    assert [note["text"] for note in drawn["layout"]["annotations"]] == ["low", "high"]
    bottoms = [drawn["layout"][f"yaxis{suffix}"]["domain"] for suffix in ("", "2")]
    assert bottoms[0][0] > bottoms[1][1], "the first on top"


def test_a_statistic_that_falls_with_outliers_is_not_cut_off_at_what_noise_scores(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))
    drawn = pictures([run], Choice((0,), statistic="participation_ratio", layer="2"))
    expected = WIDTH / (1 + 4.5 * FLOOR)
    assert drawn["kurtosis-curves"]["data"][0]["y"][-1] == pytest.approx(expected, rel=1e-4)
    assert drawn["kurtosis-curves"]["layout"]["shapes"] == []
    assert drawn["kurtosis-maps"]["data"][0]["z"][2][-1] == pytest.approx(np.log10(expected), rel=1e-3)


def test_sinks_are_the_mean_over_heads(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))
    assert sinks(run).dims == ("step", "layer")
    np.testing.assert_allclose(sinks(run).values, 0.25)
    drawn = pictures([run], Choice((0,)))
    assert drawn["sink-curves"]["layout"]["yaxis"]["range"] == [0, 1.02]
    np.testing.assert_allclose(of_layers(sinks(run), "mean"), 0.25)


def test_a_run_that_lacks_the_choice_leaves_the_others_on_view(tmp_path):
    whole = followed(grown_run(tmp_path / "whole.zarr"))
    waiting = followed(tmp_path / "waiting.zarr")
    drawn = pictures([waiting, whole], Choice((0, 1)))
    assert len(drawn["kurtosis-maps"]["data"]) == 1
    assert pictures([waiting], Choice((0,)))["loss"]["data"] == []
    assert chosen(whole, Choice((0,), site="attention", statistic="sink_rate")) is None


def test_what_can_be_chosen_is_what_the_runs_hold(tmp_path):
    run = followed(grown_run(tmp_path / "run.zarr"))
    offer = offered([run], Choice((0,)))
    assert offer.sites == ["embedding", "residual_post", "final_norm"]
    names = ["osp_excess_kurtosis", "max_median_ratio", "nonfinite_token_count", "participation_ratio"]
    assert offer.statistics == names
    assert offer.strata == ["all", "first", "delimiter", "rest"]
    assert offer.layers == [0, 1, 2]
    assert offered([], Choice(())).sites == []


def test_runs_are_told_apart(tmp_path):
    runs = [
        followed(grown_run(tmp_path / folder / "run.zarr"))
        for folder in ("a", "b")
        if _made(tmp_path / folder)
    ]
    assert labels_of(runs) == [f"grown ({run.path})" for run in runs]
    other = followed(grown_run(tmp_path / "other.zarr", model_name="other"))
    assert labels_of([runs[0], other]) == ["grown", "other"]


def _made(folder):
    folder.mkdir()
    return True


def test_a_name_that_is_markup_is_text(tmp_path):
    name = "<b>bold</b><img src=x onerror=alert(1)>"
    run = followed(grown_run(tmp_path / "run.zarr", model_name=name))
    drawn = json.dumps(pictures([run], Choice((0,))))
    assert "<b>" not in drawn
    assert "<img" not in drawn
    assert "&lt;b&gt;bold" in drawn


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
