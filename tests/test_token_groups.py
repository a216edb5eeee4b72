"""Sums kept apart by group of batches: together they are the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import osp_diag
from osp_diag import Probe
from osp_diag.capture.token_groups import GROUPED_FIELDS, GROUPED_SITES
from osp_diag.errors import StoreError, UsageError
from osp_diag.probing.feeding import Feeding
from osp_diag.tokens import make_batches
from osp_diag.trainer.loop import train
from tests.tiny_checkpoints import VOCABULARY, byte_tokenizer, llama
from tests.training_runs import minute


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return osp_diag.probe(
        llama(),
        tokenizer=byte_tokenizer(),
        tokens=20 * 16,
        seq_len=16,
        token_groups=4,
        out=tmp_path_factory.mktemp("groups") / "run.zarr",
    )


@pytest.mark.parametrize("site", GROUPED_SITES)
def test_the_groups_together_are_the_whole(run, site):
    groups, whole = run.token_groups(site), run.raw(site)
    assert groups.sizes["token_group"] == 4
    for name in GROUPED_FIELDS:
        assert groups[name].attrs["combine"] == "sum"
        together = groups[name].astype(float).sum("token_group")
        np.testing.assert_allclose(together, whole[name].transpose(*together.dims), rtol=1e-6)
    counts = groups["token.count"].isel(step=0, layer=0).sel(stratum="all").values
    np.testing.assert_array_equal(counts, np.full(4, 5 * 16))


def test_groups_are_batches_dealt_out_in_turn():
    tokens = torch.arange(6 * 8).reshape(6, 8) % 90 + 4
    apart = Probe(llama(), token_groups=3)
    with apart.step(0):
        for row in tokens:
            apart.model(row[None])
    found = apart.run.token_groups("residual_post")["channel.square"].isel(step=0).sel(stratum="all")
    for group in range(3):
        alone = Probe(llama(), sites=["residual_post"])
        with alone.step(0):
            for row in tokens[group::3]:
                alone.model(row[None])
        expected = alone.run.raw("residual_post")["channel.square"].isel(step=0).sel(stratum="all")
        np.testing.assert_allclose(found.isel(token_group=group), expected, rtol=1e-6)


def test_a_pass_that_raised_is_in_no_group():
    probe = Probe(llama(), token_groups=2)
    tokens = torch.arange(8)[None] + 4
    with probe.step(0):
        probe.model(tokens)
        handle = probe.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            probe.model(tokens)
        handle.remove()
        probe.model(tokens)
    counts = probe.run.token_groups("residual_post")["token.count"].isel(step=0, layer=0)
    assert counts.sel(stratum="all").values.tolist() == [8, 8]


def test_there_are_no_more_groups_than_sequences_and_batches_are_made_to_fit():
    batches = make_batches(byte_tokenizer(), tokens=5 * 16, seq_len=16, vocabulary_size=VOCABULARY)
    assert Feeding(llama(), batches).batch_size == 64
    assert Feeding(llama(), batches, passes=4).batch_size == 1
    assert Feeding(llama(), batches, passes=2).batch_size == 2
    assert Feeding(llama(), batches, batch_size=5, passes=4).batch_size == 5
    few = osp_diag.probe(llama(), tokenizer=byte_tokenizer(), tokens=2 * 16, seq_len=16)
    assert few.token_groups("residual_post").sizes["token_group"] == 2
    one = osp_diag.probe(llama(), tokenizer=byte_tokenizer(), tokens=16, seq_len=16)
    with pytest.raises(StoreError, match="the run has no token groups of 'residual_post'"):
        one.token_groups("residual_post")


def test_a_training_run_keeps_groups_if_it_is_asked_to(tmp_path):
    run = train(minute(steps=3, probe__token_groups=4, checkpoint__every=0), tmp_path / "run.zarr")
    counts = run.token_groups("residual_post")["token.count"].sel(stratum="all").isel(layer=0)
    assert counts["step"].values.tolist() == [0, 3]
    np.testing.assert_array_equal(counts, np.full((2, 4), 256 / 4))
    with pytest.raises(UsageError, match=r"probe\.token_groups=-1"):
        minute(probe__token_groups=-1)


def test_one_group_is_none():
    with pytest.raises(
        UsageError, match="token_groups=1: a bootstrap over groups of batches needs 2 or more"
    ):
        Probe(llama(), token_groups=1)


def test_steps_and_files_agree(tmp_path):
    tokens = torch.arange(24).reshape(3, 8) + 4
    with Probe(llama(), out=tmp_path / "steps.zarr", token_groups=2) as probe:
        for step in (0, 5):
            with probe.step(step):
                for row in tokens:
                    probe.model(row[None])
        run = probe.run
    found = run.token_groups("embedding")
    assert found["step"].values.tolist() == [0, 5]
    np.testing.assert_array_equal(found["channel.square"].sel(step=0), found["channel.square"].sel(step=5))
    assert "token_groups" not in run.sites
    assert found["channel.square"].dtype == np.float32
