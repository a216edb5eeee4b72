"""Probes whose statistics are finished and written by a thread, while the loop goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import osp_diag
from osp_diag.errors import StoreError
from osp_diag.probing import session
from osp_diag.probing.deferred import HostWork
from osp_diag.runs.lock import LOCK_NAME
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.callbacks import OutlierProbeCallback
from osp_diag.trainer.loop import train
from tests.test_ranks import ROOT
from tests.test_train_loop import assert_same_run
from tests.test_transformers_callback import trainer as transformers_trainer
from tests.tiny_checkpoints import byte_tokenizer, llama
from tests.training_loops import WATCHED, Kept, assert_same_runs, held_out
from tests.training_runs import minute

IDS = torch.arange(16)[None]


def probe_at(out: Path | None, **options: Any) -> osp_diag.Probe:
    return osp_diag.Probe(llama(), out=out, **{"sites": ["residual_post"], "deferred": True} | options)


def measure(probe: osp_diag.Probe, *steps: int) -> None:
    for step in steps:
        with probe.step(step):
            probe.model(IDS + step)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds up the finishing of every step until it is set."""
    gate = threading.Event()
    finish = session.labelled_groups

    def held_up(*arguments: Any, **options: Any) -> Any:
        assert gate.wait(60)
        return finish(*arguments, **options)

    monkeypatch.setattr(session, "labelled_groups", held_up)
    yield gate
    gate.set()


@contextmanager
def opening(gate: threading.Event) -> Iterator[None]:
    """Opens the gate while the caller waits, as far as that can be told."""
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    yield
    timer.join()


def test_on_a_cpu_nothing_is_deferred_unless_asked_for():
    assert not osp_diag.Probe(llama()).deferred
    assert osp_diag.Probe(llama(), deferred=True).deferred


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_run_is_the_same_to_the_bit(tmp_path, on_disk):
    runs = []
    for deferred in (False, True):
        beside = iter(range(3))
        probe = probe_at(
            tmp_path / f"{deferred}.zarr" if on_disk else None,
            deferred=deferred,
            sites=["residual_post", "mlp_hidden", "attention"],
            token_groups=2,
            snapshot_tokens=4,
            tokenizer=byte_tokenizer(),
            beside=lambda counter=beside: {
                "optimizer/x": xr.Dataset({"x": ("layer", [float(next(counter))])})
            },
        )
        with probe:
            for step in range(3):
                measure(probe, step)
                probe.append_series(step, {"loss": step / 3})
            assert probe.latest["optimizer/x"]["x"].item() == 2
            runs.append(probe.run)
    at_once, behind = runs
    assert_same_runs(at_once, behind)
    assert_same = xr.testing.assert_identical
    assert_same(at_once.raw("mlp_hidden").load(), behind.raw("mlp_hidden").load())
    assert_same(at_once.snapshot("residual_post").load(), behind.snapshot("residual_post").load())
    assert "top_key_token_text" in behind.at("attention").coords
    assert "probe_background_seconds" not in at_once.series
    assert (behind.series["probe_background_seconds"] > 0).all()
    assert np.isfinite(behind.series["probe_seconds"]).all()
    if on_disk:
        for name in ("probe_seconds", "probe_background_seconds"):
            attributes = behind.series[name].attrs
            assert attributes["units"] == "s"
            assert "the loop went on" in attributes["definition"]


def test_the_loop_goes_on_while_a_step_is_finished(path, gate):
    with probe_at(path) as probe:
        measure(probe, 0)
        for step in range(3):
            probe.append_series(step, {"loss": float(step)})
        assert not (path / "residual_post").exists()
        gate.set()
        run = probe.run
    assert run.steps.tolist() == [0]
    assert run.series["loss"].values.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "look",
    [
        lambda probe: probe.latest,
        lambda probe: probe.run,
        lambda probe: probe.flush(),
        lambda probe: probe.truncate_after(5),
        lambda probe: probe.close(),
    ],
    ids=["latest", "run", "flush", "truncate_after", "close"],
)
def test_who_looks_waits(path, gate, look: Callable[[osp_diag.Probe], Any]):
    with probe_at(path) as probe:
        measure(probe, 0)
        with opening(gate):
            look(probe)
        assert osp_diag.open_run(path).steps.tolist() == [0]


def test_a_step_waits_for_the_one_before(path, gate, monkeypatch):
    told: list[str] = []
    append = RunWriter.append

    def noted(writer: RunWriter, step: int, groups: Any, **options: Any) -> None:
        told.append(f"{step} is written")
        append(writer, step, groups, **options)

    monkeypatch.setattr(RunWriter, "append", noted)
    with probe_at(path) as probe:
        measure(probe, 0)
        with opening(gate):
            measure(probe, 1)
        told.append("1 is measured")
        assert probe.run.steps.tolist() == [0, 1]
    assert told.index("0 is written") < told.index("1 is measured")


def test_a_series_keeps_a_value_as_it_was(path, gate):
    loss = torch.tensor(1.0)
    with probe_at(path) as probe:
        measure(probe, 0)
        probe.append_series(0, {"loss": loss})
        loss.fill_(2.0)
        gate.set()
        assert probe.run.series["loss"].item() == 1.0
        with pytest.raises(StoreError, match="series 'loss' is None, not a number; give a float"):
            probe.append_series(1, {"loss": None})


# What fails in the thread


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 1 cannot be written."""
    append = RunWriter.append

    def failing(writer: RunWriter, step: int, groups: Any, **options: Any) -> None:
        if step == 1:
            raise StoreError("cannot write run run.zarr: the disk is full")
        append(writer, step, groups, **options)

    monkeypatch.setattr(RunWriter, "append", failing)


@pytest.mark.parametrize(
    "call",
    [
        lambda probe: probe.latest,
        lambda probe: probe.run,
        lambda probe: probe.append_series(2, {"loss": 1.0}),
        lambda probe: probe.write_static("snapshot/x", xr.Dataset()),
        lambda probe: probe.flush(),
        lambda probe: probe.truncate_after(0),
        lambda probe: measure(probe, 2),
        lambda probe: probe.close(),
    ],
    ids=["latest", "run", "series", "static", "flush", "truncate_after", "step", "close"],
)
@pytest.mark.usefixtures("full_disk")
def test_an_error_is_raised_by_the_next_call_once(path, call: Callable[[osp_diag.Probe], Any]):
    probe = probe_at(path)
    measure(probe, 0, 1)
    probe._records._work._finish()
    with pytest.raises(StoreError, match="the disk is full") as caught:
        call(probe)
    assert caught.value.__notes__ == ["This happened in a thread, after the call that had begun it returned."]
    probe.close()
    probe.close()
    assert not (path / LOCK_NAME).exists()
    with pytest.raises(StoreError, match=r"the writer of .*run\.zarr is closed"):
        probe.append_series(2, {"loss": 1.0})
    with probe_at(path, resume=True) as again:
        measure(again, 3)
    assert osp_diag.open_run(path).steps.tolist() == [0, 3]


def test_errors_that_came_together_are_raised_together():
    work = HostWork(deferred=True)
    begun = threading.Event()

    def fail(why: str) -> None:
        assert begun.wait(60)
        raise StoreError(why)

    for why in ("no space", "no space", "no folder"):
        work.later(partial(fail, why))
    begun.set()
    with pytest.raises(StoreError, match="no space") as caught:
        work.wait()
    assert caught.value.__notes__[0] == "After this: no folder"
    work.wait()
    work.close()


# Ctrl-C


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C a little later, while the caller waits."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    timer.join()


def test_ctrl_c_while_waiting_loses_nothing(path, gate):
    with probe_at(path) as probe:
        measure(probe, 0)
        with interrupted():
            probe.flush()
        gate.set()
        probe.append_series(0, {"loss": 1.0})
        assert probe.run.steps.tolist() == [0]
        assert probe.run.series["loss"].item() == 1.0


def test_ctrl_c_while_closing_still_writes_the_step_and_then_releases_the_run(path, gate):
    probe = probe_at(path)
    measure(probe, 0)
    with interrupted():
        probe.close()
    assert (path / LOCK_NAME).exists()
    gate.set()
    probe.close()
    assert not (path / LOCK_NAME).exists()
    assert osp_diag.open_run(path).steps.tolist() == [0]


def test_ctrl_c_while_measuring_records_what_was_measured(path):
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        yield {"input_ids": IDS}
        raise KeyboardInterrupt

    with probe_at(path) as probe:
        with pytest.raises(KeyboardInterrupt):
            probe.measure(0, batches())
        assert probe.run.steps.tolist() == [0]


# One Python does the imports, and forks into as many as there are ways to end.
LEFT_OPEN = """
import atexit, os, pathlib, shutil, sys, torch, osp_diag, zarr
import osp_diag.probing.session, osp_diag.runs.writer, transformers.models.llama.modeling_llama
from tests.tiny_checkpoints import byte_tokenizer, llama
for how in sys.argv[1:]:
    out = how + ".zarr"
    child = os.fork()
    if not child:
        break
    status = os.waitpid(child, 0)[1]
    pathlib.Path(how + ".status").write_text(str(os.waitstatus_to_exitcode(status)))
else:
    sys.exit()
os.dup2(os.open(how + ".errors", os.O_WRONLY | os.O_CREAT), 2)
model = llama()
probe = osp_diag.Probe(model, out=out, sites=["residual_post"], deferred=True)
if how == "closed at exit":
    atexit.register(probe.close)
for step in range(3):
    if step == 2 and how == "failing":
        probe.flush()
        shutil.rmtree(out)
    with probe.step(step):
        model(torch.arange(16)[None])
    probe.append_series(step, {"loss": 1.0})
"""


@pytest.fixture(scope="module")
def left_open(tmp_path_factory) -> Path:
    """The folder of what processes wrote that ended with a deferred probe, and of what they said."""
    folder = tmp_path_factory.mktemp("ended")
    words = [sys.executable, "-c", LEFT_OPEN, "left open", "closed at exit", "failing"]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=folder
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["left open", "closed at exit"])
def test_the_last_step_is_written_when_python_ends(left_open, how):
    path = left_open / f"{how}.zarr"
    assert (left_open / f"{how}.status").read_text() == "0"
    assert (left_open / f"{how}.errors").read_text() == ""
    assert osp_diag.open_run(path).steps.tolist() == [0, 1, 2]
    assert (path / LOCK_NAME).exists() == (how == "left open")


@pytest.mark.slow
def test_an_error_that_no_call_was_left_to_raise_is_told_when_python_ends(left_open):
    told = (left_open / "failing.errors").read_text()
    assert "RuntimeWarning: a probe was not recorded whole: cannot write run" in told
    assert "(close the probe, to have this raised)" in told


# In training


class Told(Kept):
    """Keeps also the order in which it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []

    def log(self, step, values) -> None:
        self.order.append(step)
        super().log(step, values)


def probe_that(*, deferred: bool):
    """A probe that is deferred or not, whatever it is asked for."""
    return lambda model, **options: osp_diag.Probe(model, **options | {"deferred": deferred})


def without_clocks(told: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    clocks = ("step_seconds", "tokens_per_second")
    return {step: {k: v for k, v in values.items() if k not in clocks} for step, values in told.items()}


def test_the_trainer_records_and_tells_the_same(tmp_path, monkeypatch):
    told = []
    for deferred in (False, True):
        told.append(Told())
        monkeypatch.setattr("osp_diag.trainer.recording.open_loggers", lambda *_, **__: told[-1])
        monkeypatch.setattr("osp_diag.trainer.recording.Probe", probe_that(deferred=deferred))
        train(minute(), tmp_path / f"{deferred}.zarr", loggers=["tensorboard"])
    assert_same_run(tmp_path / "False.zarr", tmp_path / "True.zarr")
    at_once, behind = told
    assert without_clocks(at_once.told) == without_clocks(behind.told)
    assert "osp_diag/osp_excess_kurtosis" in behind.told[6]
    assert behind.order == sorted(behind.order) == at_once.order


def test_loggers_get_the_headline_of_training_steps_that_are_probed(tmp_path, monkeypatch):
    logger = Told()
    monkeypatch.setattr("osp_diag.trainer.recording.open_loggers", lambda *_, **__: logger)
    train(minute(steps=3, probe__on="training"), tmp_path / "run.zarr", loggers=["tensorboard"])
    probed = [step for step, values in logger.told.items() if "osp_diag/osp_excess_kurtosis" in values]
    assert (probed, logger.order) == ([3], sorted(logger.order))


def test_a_deferred_training_that_is_interrupted_goes_on_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr("osp_diag.trainer.recording.Probe", probe_that(deferred=True))
    train(minute(), tmp_path / "whole.zarr")
    out = tmp_path / "run.zarr"
    with pytest.raises(KeyboardInterrupt):
        train(minute(), out, progress=lambda step, *_: step == 3 and signal.raise_signal(signal.SIGINT))
    train(minute(), out, resume=True)
    assert_same_run(out, tmp_path / "whole.zarr")


def test_the_callbacks_record_and_tell_the_same(tmp_path):
    told, runs = [], []
    for deferred in (False, True):
        told.append(Told())
        callback = OutlierProbeCallback(
            held_out(),
            out=tmp_path / f"{deferred}.zarr",
            every=2,
            loggers=told[-1],
            deferred=deferred,
            **WATCHED,
        )
        transformers_trainer(tmp_path, [callback]).train()
        runs.append(callback.run)
    assert_same_runs(*runs)
    assert told[0].told == told[1].told
    assert told[0].order == told[1].order == [0, 2, 4, 6]
