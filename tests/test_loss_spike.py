"""That a training which stopped at a spike of the loss says so to whoever watches it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from analyses.alerts import alerts
from osp_diag.cli.main import main
from osp_diag.errors import DivergenceError
from osp_diag.run_following import FollowedRun
from osp_diag.store import RunWriter
from tests.growing_runs import ATTRIBUTES, scalars
from tests.training_runs import minute
from trainer.divergence import LEAST
from trainer.loop import Training, train

RULE = {"policy": "stop", "spike": 4.0, "window": 12}
CALM = 3.0 + 0.1 * np.cos(np.arange(20))


def written(path, losses, rule=RULE, every=1, **attributes):
    """A run whose scalars are recorded every so many steps from the first, and at the last one."""
    told = ATTRIBUTES | {"divergence": rule} | attributes
    last = len(losses) - 1
    with RunWriter(path, told) as writer:
        for step, loss in enumerate(losses):
            values = scalars(step) | {"loss": float(loss)}
            if step % every:
                del values["learning_rate"]
            if step % every == 0 or step == last:
                writer.append_series(step, values)
    return looked_at(path)


def looked_at(path):
    run = FollowedRun(path)
    run.refresh()
    return run


def test_the_rule_is_the_trainers(tmp_path):
    limit = CALM[-12:].mean() + 4.0 * CALM[-12:].std()
    (alert,) = alerts(written(tmp_path / "above.zarr", [*CALM, limit + 1e-6]))
    assert (alert.rule, alert.severity, alert.step) == ("loss_spike", "bad", 20)
    assert f"{limit:.4g}" == "3.282"
    assert alert.value == pytest.approx(limit)
    assert alert.text == (
        "training stopped at step 20: its loss of 3.282 is a spike, more than 4 standard deviations above "
        "the mean of the 12 good losses before (limit 3.282). The state after step 19 is saved: go on with "
        "--resume --set divergence.policy=skip, which passes over such steps, or begin again with a lower "
        "optimizer.lr"
    )
    assert alerts(written(tmp_path / "below.zarr", [*CALM, limit - 1e-6])) == []


@pytest.mark.parametrize(
    "losses",
    [
        [*CALM[: LEAST - 1], 99.0],  # the beginning of training
        [*CALM, 99.0, 3.0],  # only under another policy does the trainer go on
    ],
)
def test_what_did_not_stop_the_trainer_is_not_told(tmp_path, losses):
    assert alerts(written(tmp_path / "run.zarr", losses)) == []


@pytest.mark.parametrize(
    "rule",
    [
        RULE | {"policy": "ignore"},
        RULE | {"policy": "skip"},
        RULE | {"spike": None},
        RULE | {"window": "many"},
        RULE | {"window": 0},
        "stop",
        {},
    ],
)
def test_without_such_a_rule_in_the_run_nothing_is_a_spike(tmp_path, rule):
    assert alerts(written(tmp_path / "run.zarr", [*CALM, 99.0], rule)) == []


def test_a_resumed_run_is_judged_by_its_present_rule(tmp_path):
    path = tmp_path / "run.zarr"
    written(path, [*CALM, 99.0], RULE | {"spike": None})
    with RunWriter(path, ATTRIBUTES | {"divergence": RULE}, resume=True) as writer:
        writer.truncate_after(19)
        assert alerts(looked_at(path)) == []
        writer.append_series(20, scalars(20) | {"loss": 99.0})
        writer.flush()
    assert [alert.rule for alert in alerts(looked_at(path))] == ["loss_spike"]


def test_a_stop_between_recorded_steps_is_told_too(tmp_path):
    (alert,) = alerts(written(tmp_path / "run.zarr", [*CALM, 3.2, 3.3], every=10))
    assert (alert.rule, alert.step) == ("loss_spike", 21)
    assert "limit" not in alert.text
    recorded = CALM.repeat(5)
    (alert,) = alerts(written(tmp_path / "recorded.zarr", [*recorded, 9.0], every=5))
    assert (alert.rule, alert.step) == ("loss_spike", 100)
    assert alerts(written(tmp_path / "calm.zarr", [*recorded, 3.2], every=5)) == []
    stopped_by_nan = [*CALM, 3.2, float("nan")]
    found = alerts(written(tmp_path / "nan.zarr", stopped_by_nan, every=10))
    assert "loss_spike" not in [alert.rule for alert in found]


@pytest.mark.slow
def test_watch_tells_of_a_real_training(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run.zarr"
    original = Training._loss

    def loss(self, batch):
        value = original(self, batch)
        return value * 9 if self.step + 1 == 5 else value

    monkeypatch.setattr(Training, "_loss", loss)
    config = minute(divergence__spike=20.0, divergence__window=4)
    with pytest.raises(DivergenceError, match=r"step 5 spiked .*no NaN or Inf, the loss is a spike"):
        train(config, out)
    assert main(["watch", str(out), "--json"]) == 1
    (alert,) = json.loads(capsys.readouterr().out)["runs"][0]["alerts"]
    assert (alert["rule"], alert["step"]) == ("loss_spike", 5)
    assert "more than 20 standard deviations above the mean of the 4 good losses before" in alert["text"]
    monkeypatch.undo()
    train(minute(divergence__policy="skip", divergence__window=4), out, resume=True)
    assert main(["watch", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["alerts"] == []
