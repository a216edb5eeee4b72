"""kill -9 at any moment of a training: the resumed run is the undisturbed one, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.test_ranks import ROOT
from tests.test_train_loop import assert_same_run
from tests.training_runs import minute
from trainer.config_values import as_dictionary
from trainer.loop import train

KILLS = 8

DEFERRED = """
import sys
from functools import partial
import trainer.probing
from osp_diag.cli.main import main
trainer.probing.Probe = partial(trainer.probing.Probe, deferred=True)
sys.exit(main(sys.argv[1:]))
"""
"""The command line with probes finished behind the loop, as on a GPU."""


@pytest.mark.slow
@pytest.mark.parametrize("words", [("-m", "osp_diag"), ("-c", DEFERRED)], ids=["at once", "deferred"])
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path, words):
    config = minute(steps=40, checkpoint__every=3, probe__every=4, probe__sites=("residual_post",))
    train(config, tmp_path / "whole.zarr")
    described, out = tmp_path / "config.json", tmp_path / "killed.zarr"
    described.write_text(json.dumps(as_dictionary(config)))
    command = [sys.executable, *words, "train", "--config", str(described), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    dice = random.Random(0)
    kills = 0
    while kills < KILLS:
        before = progress_of(out)
        process = subprocess.Popen([*command, "--resume"], env=environment, stderr=subprocess.DEVNULL)
        # Not before it has begun to write, or else most of the kills would hit imports.
        while process.poll() is None and progress_of(out) == before:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.6))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, tmp_path / "whole.zarr")


def progress_of(out):
    """Something that changes whenever the run is written."""
    pointer = out / "zarr.json"
    return pointer.stat().st_mtime_ns if pointer.exists() else None
