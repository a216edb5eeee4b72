"""``osp-diag control``: what a running training measures, saves and ends with, changed while it runs."""

import json
import os
import re
import threading
from contextlib import contextmanager, suppress

import lightning
import numpy as np
import pytest
import torch

import osp_diag
from osp_diag.cli.main import main
from osp_diag.errors import StoreError, UsageError
from osp_diag.probing import agreement
from osp_diag.probing import control as doing
from osp_diag.runs.control import ControlRequest, answer_path, request_path, take_request
from osp_diag.trainer.callbacks import OutlierProbeCallback
from osp_diag.trainer.callbacks.lightning import OutlierProbe
from osp_diag.trainer.checkpoint import complete_checkpoints, folder_of
from osp_diag.trainer.checkpoint_pins import read_pins
from osp_diag.trainer.loop import train
from tests import test_lightning_callback as with_lightning
from tests import test_transformers_callback as with_transformers
from tests.checkpoint_folders import tiny_llama
from tests.rank_processes import Ranks
from tests.training_loops import WATCHED, held_out
from tests.training_runs import minute

pytestmark = with_lightning.pytestmark
SOON = {"steps": 100_000, "probe__every": 100_000, "probe__sites": ("residual_post",), "checkpoint__every": 0}


@pytest.fixture(autouse=True)
def looking_at_every_step(monkeypatch):
    monkeypatch.setattr(doing, "LOOK_SECONDS", 0.0)


@contextmanager
def training(out, **changes):
    """A training in a thread, until it is stopped."""
    begun, outcome = threading.Event(), []

    def work():
        try:
            train(minute(**SOON | changes), out, resume=out.exists(), progress=lambda *_: begun.set())
        except BaseException as error:
            outcome.append(error)
        begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    assert not outcome, outcome
    try:
        yield
    finally:
        with suppress(StoreError):  # it may have been stopped
            osp_diag.control(out, stop=True)
        thread.join()
    assert isinstance(outcome[0], KeyboardInterrupt)


def switches(run):
    return [note for note in osp_diag.open_run(run).notes if note.startswith(doing.BEGINNING)]


def test_a_training_is_switched_saved_pinned_and_stopped_while_it_runs(tmp_path, capsys):
    out = tmp_path / "run.zarr"
    with training(out):
        first = osp_diag.control(out, every=2, sites=["residual_post", "attention"])
        assert first.done == ("probed every 2 steps", "measured at residual_post, attention alone")
        saved = osp_diag.control(out, checkpoint=True)
        pinned = osp_diag.control(out, pin=saved.step - 1)
        assert pinned.done == (f"the checkpoint of step {saved.step - 1} is pinned",)
        early = osp_diag.control(out, pin=0, every=3)
        assert early.refused == ("pin: there is no checkpoint at or before step 0",)
        assert early.done == ("probed every 3 steps",)
        off = osp_diag.control(out, probing="off")
        assert osp_diag.control(out, probing="off").refused == ("probing is off already",)
        on = osp_diag.control(out, probing="on")
        assert osp_diag.control(out, probing="on").refused == ("probing is on already; every says how often",)
        reset = osp_diag.control(out, probing="reset")
        assert main(["control", str(out), "--stop", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    last = answer["step"] - 1
    assert answer["done"] == [f"training ends after step {last}; --resume goes on from there"]
    expected = [0]
    for answer, until, every in ((first, early, 2), (early, off, 3), (on, reset, 3)):
        expected += [step for step in range(answer.step, until.step) if step % every == 0]
    run = osp_diag.open_run(out)
    assert run.steps.tolist() == expected
    rates = run.at("attention")["sink_rate"]
    assert np.isnan(rates.sel(step=0)).all()
    assert np.isfinite(rates.isel(step=slice(1, None))).all()
    # relabel reads the estimators of a run, also of those that came later.
    assert any(name.startswith("sink_rate") for name in run.estimators)
    assert re.fullmatch(
        rf"changed while it ran: from step {first.step} on probed every 2 steps, "
        r"measured at residual_post, attention alone \(.*\)",
        switches(out)[0],
    )
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder_of(out))] == [saved.step - 1, last]
    assert read_pins(folder_of(out)) == {saved.step - 1: "osp-diag control"}
    assert not request_path(out).exists()
    with pytest.raises(StoreError, match=r"nobody writes .*run\.zarr, so there is nobody to ask"):
        osp_diag.control(out, every=2)
    # Resumed, it goes by its configuration, and what an earlier process was asked is not asked of it.
    request_path(out).write_bytes(ControlRequest(every=1).as_json())
    with training(out):
        osp_diag.control(out, checkpoint=True)
    assert osp_diag.open_run(out).steps.tolist() == expected
    assert f"from step {last + 1} on by the configuration again, since it was resumed" in switches(out)[-1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"evry": 2, "id": "x"}', "there is no 'evry'; did you mean every?"),
        ('{"every": 0}', "every is 0; give a whole number from 1 on"),
        ('{"every": true}', "every is True; give a whole number from 1 on"),
        ('{"every": 1e99}', "every is 1e+99; give a whole number from 1 on"),
        ('{"sites": "attention"}', "sites is 'attention'; give a list of names or patterns, at most 256"),
        ('{"sites": [7]}', "sites holds 7; give names or patterns of sites"),
        ('{"probing": "maybe"}', "probing is 'maybe'; give one of on, off, reset"),
        ('{"stop": 1}', "stop is 1; give true or false"),
        ('{"probing": "off", "every": 2}', "every switches probing on: leave it or probing=off out"),
        ("{}", "nothing is asked: give every, sites, probing, checkpoint, pin or stop"),
        (" " * 70_000, "it has 70,000 bytes, and at most 65,536 are read"),
        ("[" * 10_000, "it is nested too deep"),
        (None, "it is a link, which is not followed"),
    ],
)
def test_a_request_that_is_none_is_noted_and_training_goes_on(tmp_path, text, reason):
    run, secret = tmp_path / "run.zarr", tmp_path / "secret"
    secret.write_text('{"every": 2}')
    with osp_diag.Probe(tiny_llama(), every=5, out=run, sites=["residual_post"]) as probe:
        if text is None:
            os.symlink(secret, request_path(run))
        else:
            request_path(run).write_text(text)
        assert [step for step in range(6) if probe.due(step)] == [0, 5]
        assert len(probe.notes) > 0
        assert f"a request before step 0 was refused: {reason}" in probe.notes[-1]
    answer = json.loads(answer_path(run).read_text())
    assert answer["id"] == ("x" if "evry" in str(text) else "")
    assert reason in answer["refused"][0]
    assert not os.path.lexists(request_path(run))
    assert secret.read_text() == '{"every": 2}'


def ask(run, **request):
    request_path(run).write_bytes(ControlRequest(**request).as_json())


def answered(run):
    answer = json.loads(answer_path(run).read_text())
    return answer["step"], *answer["done"], *answer["refused"]


def test_a_probe_in_any_loop_is_switched(tmp_path):
    model, run = tiny_llama(), tmp_path / "run.zarr"
    ids = torch.arange(12).reshape(2, 6)
    with osp_diag.Probe(model, every=4, out=run, sites=["residual_post"]) as probe:
        for step in range(9):
            if step == 2:
                ask(run, every=3, sites=("mlp_hidden",))
            if step == 7:
                ask(run, probing="off")
            with probe.step(step):
                model(ids)
        assert answered(run) == (7, "no probes")
        ask(run, checkpoint=True)
        probe.due(9)
        assert answered(run) == (
            9,
            "checkpoint: this loop's checkpoints and end are not osp-diag's to decide",
        )
        ask(run, sites=("mlp_hiden",), every=1)
        assert not probe.due(10)
        assert answered(run) == (10, "site 'mlp_hiden' is not in this model; did you mean mlp_hidden?")
    steps = osp_diag.open_run(run).at("mlp_hidden")["token_peak"].isel(layer=0, stratum=0)
    assert steps.step.values.tolist() == [0, 3, 6]
    assert np.isnan(steps.values).tolist() == [True, False, False]
    beside = osp_diag.open_run(run).at("residual_post")["token_peak"].isel(layer=0, stratum=0)
    assert np.isnan(beside.values).tolist() == [False, True, True]


def test_a_trainer_of_transformers_is_asked(tmp_path):
    out = tmp_path / "run.zarr"
    callback = OutlierProbeCallback(held_out(), out=out, every=100, **WATCHED)

    class Asking(with_transformers.transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                ask(out, every=2, checkpoint=True)
            if state.global_step == 4:
                ask(out, stop=True)

    loop = with_transformers.trainer(tmp_path, [Asking(), callback], max_steps=50)
    loop.train()
    assert loop.state.global_step == 5
    assert (tmp_path / "checkpoint-2").is_dir()
    assert callback.run.steps.tolist() == [0, 4]
    assert answered(out) == (6, "the Trainer ends after this step")


def test_a_trainer_of_lightning_is_asked(tmp_path):
    out = tmp_path / "run.zarr"
    callback = OutlierProbe(held_out(), out=out, every=100, **WATCHED)

    class Asking(lightning.pytorch.callbacks.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 1:
                ask(out, every=2, checkpoint=True)
            if trainer.global_step == 4:
                ask(out, stop=True)

    loop = with_lightning.trainer(tmp_path, [Asking(), callback], max_steps=10)
    with_lightning.fit(loop, with_lightning.Module())
    assert loop.global_step == 5
    assert (tmp_path / "osp-diag-step=2.ckpt").is_file()
    assert callback.run.steps.tolist() == [0, 4]
    assert answered(out) == (6, "the Trainer ends after this step, unless min_steps or min_epochs go on")


def _rank(rank, ranks, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doing, "LOOK_SECONDS", 0.0)
        # In our loop the request travels with the losses; in a Probe by itself.
        out = folder + "/train.zarr"
        with pytest.raises(KeyboardInterrupt):
            train(minute(**SOON), out, progress=lambda step, *_: _ask_at(out, step))
        model, run, due = tiny_llama(), folder + "/probe.zarr", []
        with osp_diag.Probe(model, every=100, out=run, sites=["residual_post"], control=True) as probe:
            for step in range(1, 9):
                if rank == 0 and step == 2:
                    ask(run, every=1)
                with probe.step(step) as probed:
                    model(torch.arange(12).reshape(2, 6))
                due += [step] if probed else []
    assert due == list(range(2 + agreement.LAG, 9)), due


def _ask_at(run, step):
    if step == 2:
        ask(run, every=2, checkpoint=True)
    if step == 6:
        ask(run, stop=True)


@pytest.mark.slow
def test_two_ranks_switch_in_the_same_step(tmp_path):
    with Ranks(2) as ranks:
        ranks.run(_rank, str(tmp_path))
    run = osp_diag.open_run(tmp_path / "train.zarr")
    assert run.steps.tolist() == [0, 4, 6]
    assert [one.step for one in complete_checkpoints(folder_of(tmp_path / "train.zarr"))] == [3, 7]
    assert osp_diag.open_run(tmp_path / "probe.zarr").steps.tolist() == [4, 5, 6, 7, 8]


def test_who_asks_is_told_what_is_wrong(tmp_path, capsys):
    run = tmp_path / "run.zarr"
    with pytest.raises(StoreError, match=r"no run at .*run\.zarr; check the path"):
        osp_diag.control(run, every=2)
    with pytest.raises(UsageError, match="nothing is asked: give every"):
        osp_diag.control(run)
    assert main(["control", str(run), "--on", "--off"]) == 2
    assert "--on and --off contradict one another; give one" in capsys.readouterr().err
    with osp_diag.Probe(tiny_llama(), out=run, sites=["residual_post"], control=False):
        with pytest.raises(StoreError, match=r"not taken within 0.1 s and is withdrawn: a step of "):
            osp_diag.control(run, pin=0, wait=0.1)
        assert take_request(run) is None
    assert not list(tmp_path.glob("run.control*"))
