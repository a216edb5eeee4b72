"""kill -9 at any moment of a training: the resumed run is the undisturbed one, to the bit."""

import json
import random
import sys
import time
from contextlib import redirect_stderr
from functools import partial

import pytest

from osp_diag.cli.main import main
from osp_diag.trainer import recording
from osp_diag.trainer.config_values import as_dictionary
from osp_diag.trainer.loop import train
from tests.test_train_loop import assert_same_run
from tests.training_runs import minute
from tests.warm_processes import forking

KILLS = 5


def command_line(words, errors, deferred):
    """``osp-diag`` with these words, in a process of its own."""
    if deferred:  # as on a GPU
        recording.Probe = partial(recording.Probe, deferred=True)
    with errors.open("w") as file, redirect_stderr(file):
        sys.exit(main(words))


@pytest.mark.slow
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path, deferred):
    config = minute(steps=40, checkpoint__every=3, probe__every=4, probe__sites=("residual_post",))
    train(config, tmp_path / "whole.zarr")
    described, out, errors = tmp_path / "config.json", tmp_path / "killed.zarr", tmp_path / "errors"
    described.write_text(json.dumps(as_dictionary(config)))
    words = ["train", "--config", str(described), "--out", str(out), "--resume"]
    dice = random.Random(0)
    kills = 0
    while kills < KILLS:
        before = progress_of(out)
        process = forking().Process(target=command_line, args=(words, errors, deferred))
        process.start()
        # Not before it has begun to write, or else most of the kills would hit imports.
        while process.is_alive() and progress_of(out) == before:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.6))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills >= 3
    last = forking().Process(target=command_line, args=(words, errors, deferred))
    last.start()
    last.join()
    assert last.exitcode == 0, errors.read_text()
    assert_same_run(out, tmp_path / "whole.zarr")


def progress_of(out):
    """Something that changes whenever the run is written."""
    pointer = out / "zarr.json"
    return pointer.stat().st_mtime_ns if pointer.exists() else None
