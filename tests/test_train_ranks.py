"""Training on several processes: the same curve and the same probes as on one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from osp_diag.runs.run import open_run
from osp_diag.trainer.batch_statistics import BATCH_SERIES
from osp_diag.trainer.checkpoint import folder_of, latest
from osp_diag.trainer.config_values import as_dictionary
from osp_diag.trainer.exporting import trained_model
from osp_diag.trainer.loop import train
from tests.rank_processes import Ranks, launched
from tests.training_runs import minute

MODES = {
    "ddp": {"parallel__mode": "ddp"},
    "fsdp": {"parallel__mode": "fsdp"},
    "hsdp": {"parallel__mode": "hsdp", "parallel__shard": 2},
}
CONFIG = {"batch_size": 8, "micro_batch_size": 1, "steps": 2, "probe__every": 2, "checkpoint__every": 1}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run.zarr"
    train(minute(**CONFIG), out)
    return out


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Trained by two ranks that share the parameters out, for two tests."""
    out = tmp_path_factory.mktemp("sharded") / "run.zarr"
    done = by_command(2, minute(**CONFIG, **MODES["fsdp"]), out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: osp-diag figure") == 1
    return out


def by_command(ranks, config, out):
    """Trained as by ``torchrun … -m osp_diag train``; test_ranks starts the real one."""
    described = out.with_suffix(".json")
    described.write_text(json.dumps(as_dictionary(config)))
    return launched(ranks, ["train", "--config", described, "--out", out], out.parent)


def assert_alike(one: Path, other: Path) -> None:
    """Equal curves, probes and weights, to what another order of float32 sums gives."""
    ours, theirs = open_run(one), open_run(other)
    assert list(ours.steps) == list(theirs.steps)
    for name in ("loss", "gradient_norm", "held_out_loss"):
        np.testing.assert_allclose(ours.series[name], theirs.series[name], rtol=2e-4, err_msg=name)
    for name in BATCH_SERIES:
        np.testing.assert_array_equal(ours.series[name], theirs.series[name], err_msg=name)
    settings, expected = (run.logged("optimizer_settings").load() for run in (ours, theirs))
    xr.testing.assert_identical(settings, expected)
    sketch, expected = (run.logged("weight_sketch").load() for run in (ours, theirs))
    xr.testing.assert_allclose(sketch.drop_vars("top_row"), expected.drop_vars("top_row"), 1e-3, 2e-3)
    functions = [latest(folder_of(run)).function for run in (one, other)]
    assert functions[0]["constants"] == functions[1]["constants"]
    assert functions[0]["reference_loss"] == pytest.approx(functions[1]["reference_loss"], rel=2e-4)
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
def test_two_ranks_train_what_one_process_trains(alone, tmp_path):
    out = tmp_path / "run.zarr"
    done = by_command(2, minute(**CONFIG, **MODES["ddp"]), out)
    assert done.returncode == 0, done.stderr
    assert_alike(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_at_sites_are_those_of_one_process(mode, tmp_path):
    changes = {"steps": 1, "probe__every": 1, "probe__on": "training", "probe__gradients": True}
    train(minute(**(CONFIG | changes)), tmp_path / "one.zarr")
    done = by_command(2, minute(**(CONFIG | changes), **MODES[mode]), tmp_path / "two.zarr")
    assert done.returncode == 0, done.stderr
    one, two = (open_run(tmp_path / f"{name}.zarr") for name in ("one", "two"))
    for site in ("gradient:embedding", "gradient:residual_post"):
        for name, values in one.at(site).data_vars.items():
            np.testing.assert_allclose(two.at(site)[name], values, rtol=2e-3, atol=1e-9, err_msg=name)


def _training(rank: int, ranks: int, mode: str, out: str) -> None:
    train(minute(**CONFIG, **MODES[mode]), out)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "hsdp"])
def test_four_ranks_train_what_one_process_trains(mode, four, alone, tmp_path):
    four.run(_training, mode, str(tmp_path / "run.zarr"))
    assert_alike(tmp_path / "run.zarr", alone)


@pytest.mark.slow
def test_two_ranks_that_share_parameters_train_what_one_process_trains(sharded, alone):
    assert_alike(sharded, alone)


@pytest.mark.slow
def test_a_sharded_run_goes_on_under_another_number_of_ranks(sharded, alone, tmp_path):
    out = tmp_path / "run.zarr"
    shutil.copytree(sharded, out)
    shutil.copytree(folder_of(sharded), folder_of(out))
    shutil.rmtree(folder_of(out) / "step-00000002")
    run = train(minute(**CONFIG), out, resume=True)
    assert list(run.steps) == [0, 2]
    assert_alike(out, alone)


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_once(tmp_path):
    done = by_command(2, minute(batch_size=3), tmp_path / "run.zarr")
    assert done.returncode != 0
    assert done.stderr.count("batch_size=3 cannot be dealt to 2 ranks; give a multiple of 2") == 1
    assert not (tmp_path / "run.zarr").exists()
