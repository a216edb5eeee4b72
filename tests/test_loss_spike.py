"""That a training which stopped at a spike of the loss says so to whoever watches it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from osp_diag.cli.main import main
from osp_diag.errors import DivergenceError
from osp_diag.monitoring import judge
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.divergence import unseen_cause
from osp_diag.trainer.loop import Training, train
from tests.growing_runs import ATTRIBUTES, scalars
from tests.training_runs import minute


def watched(path, *rows):
    """A run with these scalars (step → what differs from a calm one), as who watches it sees it."""
    with RunWriter(path, ATTRIBUTES) as writer:
        for step, values in rows:
            writer.append_series(step, scalars(step) | values)
    run = FollowedRun(path)
    run.refresh()
    return run


def test_a_stop_at_a_spike_is_told(tmp_path):
    calm = [(step, {"loss": 3.0}) for step in range(20)]
    (alert,) = judge(watched(tmp_path / "run.zarr", *calm, (20, {"loss": 9.0, "stopped_step": 1.0})))
    assert (alert.rule, alert.severity, alert.step, alert.value) == ("stopped_at_spike", "bad", 20, 9.0)
    assert alert.sentence == (
        "training stopped at step 20: its loss of 9 is a spike, the median of the 10 recorded before it is "
        "3. The state after step 19 is saved: go on with --resume --set divergence.policy=skip, which passes "
        "over such steps, or begin again with a lower optimizer.lr"
    )


def test_what_did_not_stop_the_trainer_is_no_spike(tmp_path):
    assert judge(watched(tmp_path / "run.zarr", (0, {"loss": 3.0}), (1, {"loss": 99.0}))) == ()


def test_a_stop_at_the_first_step_has_nothing_before_it(tmp_path):
    (alert,) = judge(watched(tmp_path / "run.zarr", (1, {"loss": 99.0, "stopped_step": 1.0})))
    assert "its loss of 99 is a spike. The state after step 0" in alert.sentence


@pytest.mark.parametrize("wrong", ["loss", "gradient_norm"])
def test_a_stop_at_nan_is_told_as_such(tmp_path, wrong):
    found = judge(watched(tmp_path / "run.zarr", (1, {}), (2, {wrong: float("nan"), "stopped_step": 1.0})))
    assert [alert.rule for alert in found] == ["nonfinite_scalars"]


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
    assert (alert["rule"], alert["step"]) == ("stopped_at_spike", 5)
    assert "is a spike, the median of the" in alert["sentence"]
    monkeypatch.undo()
    train(minute(divergence__policy="skip", divergence__window=4), out, resume=True)
    assert main(["watch", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["alerts"] == []


def test_a_step_that_is_not_finite_is_no_spike():
    assert unseen_cause({"loss": 9.0, "gradient_norm": 3.0}) == "no NaN or Inf, the loss is a spike"
    overflown = unseen_cause({"loss": 9.0, "gradient_norm": float("inf")})
    assert overflown == "every gradient is finite, and the sum of their squares is not"
    assert "spike" not in unseen_cause({"loss": float("nan"), "gradient_norm": 1.0})


def test_a_training_that_ignores_nan_is_probed_to_its_end(tmp_path):
    config = minute(divergence__policy="ignore", optimizer__lr=1e30, optimizer__gradient_clip=None)
    run = train(config, tmp_path / "run.zarr")
    assert run.steps.tolist() == [0, 3, 6]
    assert np.isnan(run.series["loss"].values[-1])
    condition = run.tree["weights/embedding_projection/embedding_projection_condition_number"]
    assert np.isnan(condition.sel(step=[3, 6])).all()
