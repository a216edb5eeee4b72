"""Loggers, each with its own library and read back from what that wrote; the numbers that they are told."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

import osp_diag
from osp_diag.errors import UsageError
from osp_diag.monitoring import Finding
from osp_diag.trainer.headline import channel_profiles, headline
from osp_diag.trainer.loggers import LOGGERS, Logger, RichLogger, open_loggers
from osp_diag.trainer.loggers.opening import _Several
from tests.training_loops import WATCHED, dropping_llama, held_out, logged_scalars

CONFIG = {"lr": 0.1, "model": {"layers": 2}}
LOSSES = [(0, 3.0), (10, 2.5), (20, float("nan"))]


def send(logger: Logger) -> None:
    for step, loss in LOSSES:
        logger.log(step, {"loss": loss, "osp_diag/sink_rate": step / 100})
        logger.log(step, {"learning_rate": 0.5})
    logger.close()


FINDING = Finding(
    rule="jump",
    severity="watch",
    step=10,
    first_bad_step=10,
    sentence="loss leapt",
    value=2.0,
    statistic="loss",
)
PROFILE = {"osp_diag/log10_channel_rms/layer 0": np.linspace(-1.0, 2.0, 32)}


def send_alert(logger: Logger) -> None:
    assert isinstance(logger, RichLogger)
    logger.log(10, {"loss": 2.5})
    logger.alert(FINDING)
    logger.histograms(10, PROFILE)
    logger.close()


def same_numbers(found: list[tuple[int, float]]) -> bool:
    return [step for step, _ in found] == [step for step, _ in LOSSES] and np.array_equal(
        [value for _, value in found], [value for _, value in LOSSES], equal_nan=True
    )


# TensorBoard


def test_tensorboard_reads_what_was_logged(tmp_path):
    logger = open_loggers(["tensorboard"], run="adam", config=CONFIG, directory=tmp_path)
    assert isinstance(logger, Logger)
    send(logger)
    found = logged_scalars(tmp_path / "adam")
    assert same_numbers(found["loss"])
    assert found["osp_diag/sink_rate"] == [(0, 0.0), (10, pytest.approx(0.1)), (20, pytest.approx(0.2))]
    assert found["learning_rate"] == [(0, 0.5), (10, 0.5), (20, 0.5)]


def test_tensorboard_shows_the_configuration(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    open_loggers(["tensorboard"], run="adam", config=CONFIG, directory=tmp_path).close()
    events = EventAccumulator(str(tmp_path / "adam"))
    events.Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == {"project": "osp-diag", **CONFIG}


def test_a_resumed_tensorboard_forgets_what_will_be_made_again(tmp_path):
    send(open_loggers(["tensorboard"], run="adam", config=CONFIG, directory=tmp_path))
    again = open_loggers(["tensorboard"], run="adam", config=CONFIG, directory=tmp_path, resumed_after=10)
    again.log(15, {"loss": 1.0})
    again.close()
    assert logged_scalars(tmp_path / "adam")["loss"] == [(0, 3.0), (10, 2.5), (15, 1.0)]


def test_tensorboard_shows_alerts_and_distributions(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send_alert(open_loggers(["tensorboard"], run="adam", config=CONFIG, directory=tmp_path))
    events = EventAccumulator(str(tmp_path / "adam"), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    (text,) = events.Tensors("monitor/jump/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (10, "watch: loss leapt")
    (histogram,) = events.Histograms(next(iter(PROFILE)))
    assert (histogram.step, histogram.histogram_value.num) == (10, 32)
    assert histogram.histogram_value.max == 2.0


# Weights & Biases


def wandb_records(folder) -> list:
    """All of the one offline run, once it is complete: W&B's own process writes on after ``finish``."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = unpacked(path.read_bytes())
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise TimeoutError(f"{path} has no end")


def unpacked(data: bytes) -> list:
    """The records of a transaction log: protocol buffers in the pieces of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    block, header = 32768, 7
    assert data.startswith(b":W&B")
    records, part, at = [], b"", header
    while at + header <= len(data):
        if block - at % block < header:  # too little of the block is left for a piece
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + header : at + header + length]
        at += header + length
        if at > len(data):
            break
        if kind in (1, 4):  # whole, or the last piece
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def wandb_history(folder) -> list[dict[str, float]]:
    rows = [
        record.history.item
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows
    ]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_wandb_keeps_what_was_logged_by_its_step(tmp_path):
    import wandb

    send(open_loggers(["wandb"], run="adam", config=CONFIG, directory=tmp_path))
    assert wandb.run is None
    rows = wandb_history(tmp_path)
    assert same_numbers([(row["step"], row["loss"]) for row in rows if "loss" in row])
    assert [(row["step"], row["osp_diag/sink_rate"]) for row in rows if "loss" in row][1] == (10, 0.1)
    records = wandb_records(tmp_path)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.project) == ("adam", "osp-diag")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["model"] == {"layers": 2}
    metrics = {
        r.metric.name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"
    }
    assert metrics["loss"] == metrics["osp_diag/sink_rate"] == "step"


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_an_open_wandb_run_is_shared_and_left_open(tmp_path):
    import wandb

    theirs = wandb.init(project="theirs", dir=tmp_path)
    try:
        theirs.log({"train/loss": 1.0})
        send(open_loggers(["wandb"], run="ours", config=CONFIG, directory=tmp_path))
        assert wandb.run is theirs
        theirs.log({"train/loss": 0.5})
    finally:
        theirs.finish()
    rows = wandb_history(tmp_path)
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1.0, 0.5]
    assert same_numbers([(row["step"], row["loss"]) for row in rows if "loss" in row])


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_wandb_gets_alerts_and_distributions(tmp_path):
    send_alert(open_loggers(["wandb"], run="adam", config=CONFIG, directory=tmp_path))
    records = wandb_records(tmp_path)
    (alert,) = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("jump", "loss leapt", "WARN")
    (name,) = PROFILE
    (row,) = [row for row in wandb_history(tmp_path) if f"{name}/_type" in row]
    assert (row["step"], row[f"{name}/_type"], sum(row[f"{name}/values"])) == (10, "histogram", 32)


# trackio

TRACKIO = """
import json, sys, warnings
from contextlib import redirect_stdout
warnings.simplefilter("error")
from tests.test_loggers import CONFIG, send, send_alert
from osp_diag.trainer.loggers import open_loggers
import trackio
from trackio.sqlite_storage import SQLiteStorage

send(open_loggers(["trackio"], run="adam", config=CONFIG))
again = open_loggers(["trackio"], run="adam", config=CONFIG, resumed_after=20)
again.log(30, {"loss": 1.0})
again.close()
with redirect_stdout(sys.stderr):  # trackio prints, here on our behalf
    trackio.init(project="theirs", name="other", embed=False, auto_log_cpu=False, auto_log_gpu=False)
    send(open_loggers(["trackio"], run="adam", config=CONFIG))
    trackio.log({"mine": 1.0})
    trackio.finish()
found = {
    project: {run: SQLiteStorage.get_logs(project, run) for run in SQLiteStorage.get_runs(project)}
    for project in ("osp-diag", "theirs")
}
send_alert(open_loggers(["trackio"], run="alerted", config=CONFIG))
found["alerts"] = SQLiteStorage.get_alerts("osp-diag", "alerted")
found["alerted"] = SQLiteStorage.get_logs("osp-diag", "alerted")
found["config"] = SQLiteStorage.get_run_config("osp-diag", "adam")
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_trackio_keeps_what_was_logged_and_continues_a_resumed_run(tmp_path):
    # Where trackio writes is settled when it is imported.
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # and so standard output holds nothing else
    losses = [(row["step"], row["loss"]) for row in found["osp-diag"]["adam"] if "loss" in row]
    assert losses[:2] == LOSSES[:2]
    assert [step for step, _ in losses] == [0, 10, 20, 30]
    assert found["config"]["model"] == {"layers": 2}
    (alert,) = found["alerts"]
    assert [alert[key] for key in ("title", "text", "level", "step")] == ["jump", "loss leapt", "warn", 10]
    (name,) = PROFILE
    (histogram,) = [row[name] for row in found["alerted"] if name in row]
    assert sum(histogram["values"]) == 32
    theirs = found["theirs"]["other"]
    assert [row["step"] for row in theirs if "loss" in row] == [0, 10, 20]
    assert [row["mine"] for row in theirs if "mine" in row] == [1.0]


# Several


def test_an_unknown_logger_is_named():
    with pytest.raises(UsageError, match="loggers: 'wanb' is unknown; there are trackio, wandb, tensorboard"):
        open_loggers(["tensorboard", "wanb"], run="r", config={})


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_that_is_not_installed_is_told_how_to_be(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UsageError, match=rf"loggers: {name} cannot be imported.*pip install 'osp-diag\[loggers\]'"
    ):
        open_loggers([name], run="r", config={})


def test_no_loggers_are_silent():
    send(open_loggers([], run="r", config={}))


class Failing:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step, values) -> None:
        self.calls += 1
        raise OSError("no route")

    def close(self) -> None:
        raise OSError("no route")


def test_a_logger_that_fails_is_dropped_and_training_goes_on():
    failing, several = Failing(), _Several()
    several.add("wandb", failing)
    with pytest.warns(
        RuntimeWarning, match=r"wandb failed at step 3 and gets no more numbers: OSError\('no route'\)"
    ):
        several.log(3, {"loss": 1.0})
    several.log(4, {"loss": 1.0})
    several.close()
    assert failing.calls == 1


def test_a_logger_that_fails_to_close_is_told_of():
    several = _Several()
    several.add("wandb", Failing())
    with pytest.warns(RuntimeWarning, match="wandb failed when it was closed"):
        several.close()


# The headline


def test_the_headline_is_what_the_run_holds():
    model = dropping_llama()
    probe = osp_diag.Probe(model, **WATCHED)
    probe.measure(7, [{"input_ids": held_out()}])
    found, run = headline(probe.latest), probe.run

    def of(site: str, name: str) -> np.ndarray:
        values = run.at(site)[name].sel(step=7)
        return values.sel(stratum="all").values if "stratum" in values.dims else values.values

    kurtosis = [of("embedding", "osp_excess_kurtosis"), of("residual_post", "osp_excess_kurtosis")[:-1]]
    kurtosis.append(of("final_norm", "osp_excess_kurtosis"))
    rate = run.at("attention")["sink_rate"].sel(step=7, epsilon=0.3, sink_position=0)
    residual = [of(site, "absolute_maximum").max() for site in ("embedding", "residual_post")]
    assert found == {
        "osp_diag/osp_excess_kurtosis": pytest.approx(np.concatenate(kurtosis).mean()),
        "osp_diag/largest_osp_excess_kurtosis": pytest.approx(
            of("residual_post", "osp_excess_kurtosis").max()
        ),
        "osp_diag/largest_max_median_ratio": pytest.approx(of("residual_post", "max_median_ratio").max()),
        "osp_diag/largest_activation": pytest.approx(max(residual)),
        "osp_diag/largest_down_projection_input": pytest.approx(of("mlp_hidden", "absolute_maximum").max()),
        "osp_diag/sink_rate": pytest.approx(float(rate.mean())),
        "osp_diag/first_token_attention": pytest.approx(of("attention", "first_token_attention").mean()),
    }
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_channel_profiles_are_the_logarithms_of_the_run():
    probe = osp_diag.Probe(dropping_llama(), sites=["residual_post"], estimators=["channel_moments"])
    probe.measure(7, [{"input_ids": held_out()}])
    rms = probe.run.at("residual_post")["channel_rms"].sel(step=7, stratum="all")
    found = channel_profiles(probe.latest)
    assert list(found) == [f"osp_diag/log10_channel_rms/layer {layer}" for layer in rms["layer"].values]
    for values, row in zip(found.values(), rms.values, strict=True):
        np.testing.assert_allclose(10**values, row, rtol=1e-6)
    assert channel_profiles({}) == {}


def test_the_headline_leaves_out_what_was_not_measured():
    probe = osp_diag.Probe(dropping_llama(), sites=["mlp_hidden"], estimators=["token_scale"])
    probe.measure(0, [{"input_ids": held_out()}])
    assert list(headline(probe.latest)) == ["osp_diag/largest_down_projection_input"]
    assert headline({}) == {}
