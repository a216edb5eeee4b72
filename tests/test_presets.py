"""Every preset as shipped, at reduced width: its first steps and probe, alone and on ranks."""

import numpy as np
import pytest
from torch import nn

from osp_diag.runs.run import open_run
from osp_diag.trainer.config_values import with_changes
from osp_diag.trainer.loop import train
from osp_diag.trainer.presets import PRESETS, preset
from tests.rank_processes import Ranks
from tests.training_runs import SITES

REDUCED = {
    "steps": 3,
    "batch_size": 4,
    "log_every": 1,
    "model.vocabulary_size": 4096,
    "model.hidden_size": 64,
    "model.layers": 2,
    "model.heads": 2,
    "data.source": "builtin",
    "data.mixture": {},
    "data.tokenizer": None,
    "data.sequence_length": 32,
    "probe.tokens": 128,
    "probe.dense_until": 0,
    "probe.every": 3,
    "probe.sites": SITES,
    "checkpoint.every": 0,
}
"""Sizes, and text that is there. What a preset computes with, and how, stays."""


def reduced(name):
    config = preset(name)
    return with_changes(config, REDUCED | ({"micro_batch_size": 1} if config.micro_batch_size else {}))


def without_code_generation(monkeypatch):
    """Compile into the same graphs, and no further: making code takes longer than all that it runs."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **options: compile_module(module, backend="aot_eager", **options)
    )


def _trained(rank, ranks, name, out):
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_code_generation(monkeypatch)
        train(reduced(name), out)


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_ranks_what_it_trains_alone(name, two, tmp_path, monkeypatch):
    without_code_generation(monkeypatch)
    alone, shared = tmp_path / "alone.zarr", tmp_path / "shared.zarr"
    train(with_changes(reduced(name), {"parallel.mode": "ddp"}), alone)
    two.run(_trained, name, str(shared))
    ours, theirs = open_run(shared), open_run(alone)
    # The seed's weights are the same, and so is every dtype: what is left is the order of bfloat16 sums.
    for loss in ("loss", "held_out_loss"):
        np.testing.assert_allclose(ours.series[loss], theirs.series[loss], rtol=5e-5, err_msg=loss)
    for site in ("residual_post", "query_post_rope", "mlp_hidden"):
        for statistic in ("channel_rms", "osp_excess_kurtosis"):
            values, expected = ours.at(site)[statistic], theirs.at(site)[statistic]
            np.testing.assert_allclose(values, expected, rtol=5e-3, atol=5e-3, err_msg=f"{site} {statistic}")
