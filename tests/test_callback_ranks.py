"""The callbacks under DDP: two ranks write one run, which is the single process's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

import osp_diag
from osp_diag.trainer.callbacks import OutlierProbeCallback
from osp_diag.trainer.callbacks.lightning import OutlierProbe
from tests import test_lightning_callback as with_lightning
from tests import test_transformers_callback as with_transformers
from tests.rank_processes import Ranks, free_port
from tests.training_loops import WATCHED, assert_same_runs, assert_untouched, held_out

pytestmark = with_lightning.pytestmark
MODES = ("held_out", "training")


def transformers_trains(out: Path, on: str, ranks: int = 1) -> nn.Module:
    callback = OutlierProbeCallback(held_out(), out=out, on=on, every=2, **WATCHED)
    parallel = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False} if ranks > 1 else {}
    settings = {"per_device_train_batch_size": 2 // ranks, "max_steps": 4}
    loop = with_transformers.trainer(out.parent, [callback], **settings, **parallel)
    # Each rank would draw its own random numbers.
    for layer in loop.model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    loop.train()
    assert (loop.args.parallel_mode.value == "distributed") == (ranks > 1)
    return loop.model


def lightning_trains(out: Path, on: str, rank: int = 0, ranks: int = 1) -> nn.Module:
    callback = OutlierProbe(held_out(), out=out, on=on, every=2, **WATCHED)
    module = with_lightning.Module(dropout=0.0)
    parallel = {"strategy": "ddp", "devices": ranks, "use_distributed_sampler": False} if ranks > 1 else {}
    loop = with_lightning.trainer(out.parent, [callback], max_steps=4, **parallel)
    with_lightning.fit(loop, module, with_lightning.rows(24, rank, ranks))
    return module


def _training(rank: int, ranks: int, port: int, out: str) -> None:
    dist.destroy_process_group()  # the libraries begin their own, from what torchrun sets
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    for on in MODES:
        assert_untouched(transformers_trains(Path(out) / f"transformers_{on}.zarr", on, ranks))
        assert_untouched(lightning_trains(Path(out) / f"lightning_{on}.zarr", on, rank, ranks))


@pytest.mark.slow
def test_under_ddp_one_run_of_all_ranks_tokens_is_written(tmp_path):
    with Ranks(2) as ranks:
        ranks.run(_training, free_port(), str(tmp_path))
    (tmp_path / "alone").mkdir()
    for on in MODES:
        for library, trains in (("transformers", transformers_trains), ("lightning", lightning_trains)):
            trains(tmp_path / "alone" / f"{library}_{on}.zarr", on)
            two = osp_diag.open_run(tmp_path / f"{library}_{on}.zarr")
            one = osp_diag.open_run(tmp_path / "alone" / f"{library}_{on}.zarr")
            assert_same_runs(two, one, exact=False)
