"""Training on several processes: the same curve and the same probes as on one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from osp_diag.run import open_run
from tests.test_ranks import ROOT, free_port
from tests.training_runs import minute
from trainer.checkpoint import folder_of, latest
from trainer.config_values import as_dictionary
from trainer.exporting import trained_model
from trainer.loop import train

MODES = {
    "ddp": {"parallel__mode": "ddp"},
    "fsdp": {"parallel__mode": "fsdp"},
    "hsdp": {"parallel__mode": "hsdp", "parallel__shard": 2},
}
CONFIG = {"batch_size": 8, "micro_batch_size": 1, "steps": 4, "probe__every": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run.zarr"
    train(minute(**CONFIG), out)
    return out


def torchrun(ranks, config, out, *options):
    described = out.with_suffix(".json")
    described.write_text(json.dumps(as_dictionary(config)))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={free_port()}", "--module", "osp_diag", "train"]
    command += ["--config", str(described), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def assert_alike(one: Path, other: Path) -> None:
    """Equal curves, probes and weights, to what another order of float32 sums gives."""
    ours, theirs = open_run(one), open_run(other)
    assert list(ours.steps) == list(theirs.steps)
    for name in ("loss", "gradient_norm", "held_out_loss"):
        np.testing.assert_allclose(ours.series[name], theirs.series[name], rtol=2e-4, err_msg=name)
    for site in ("embedding", "residual_post", "mlp_hidden", "attention"):
        for name, values in ours.at(site).data_vars.items():
            if values.dtype.kind == "f":
                expected = theirs.at(site)[name].values
                largest = np.nanmax(np.abs(expected), initial=0.0, where=np.isfinite(expected))
                np.testing.assert_allclose(
                    values, expected, rtol=2e-2, atol=1e-2 * largest, err_msg=f"{site} {name}"
                )
    groups = [
        {path: set(node.data_vars) for path, node in run.tree.to_dict().items()} for run in (ours, theirs)
    ]
    assert groups[0] == groups[1]
    first = trained_model(latest(folder_of(one))).state_dict()
    second = trained_model(latest(folder_of(other))).state_dict()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "ranks"), [("ddp", 2), ("fsdp", 2), ("ddp", 4), ("hsdp", 4)])
def test_ranks_train_what_one_process_trains(mode, ranks, alone, tmp_path):
    out = tmp_path / "run.zarr"
    done = torchrun(ranks, minute(**CONFIG, **MODES[mode]), out)
    assert done.returncode == 0, done.stderr
    assert_alike(out, alone)


@pytest.mark.slow
def test_a_sharded_run_goes_on_under_another_number_of_ranks(alone, tmp_path):
    out = tmp_path / "run.zarr"
    half = minute(**CONFIG, **MODES["fsdp"])
    done = torchrun(2, half, out)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder_of(out) / "step-00000004")
    run = train(minute(**CONFIG), out, resume=True)
    assert list(run.steps) == [0, 2, 4]
    assert_alike(out, alone)


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_once(tmp_path):
    done = torchrun(2, minute(batch_size=3), tmp_path / "run.zarr")
    assert done.returncode != 0
    assert "batch_size=3 cannot be dealt to 2 ranks; give a multiple of 2" in done.stderr
    assert not (tmp_path / "run.zarr").exists()
