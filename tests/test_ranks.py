"""Several processes: states merged over ranks, a probe in a DDP loop, FSDP, device maps and torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr

import osp_diag
from osp_diag.cli.main import main
from osp_diag.estimators.base import Layout, Suite
from osp_diag.estimators.registry import get_estimator
from osp_diag.probing.ranks import is_distributed, is_first_rank, merge_over_ranks, on_first_rank
from tests.rank_processes import Ranks, free_port, launched
from tests.tiny_checkpoints import byte_tokenizer, llama, save

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as ranks:
        yield ranks


def same(left: osp_diag.Run, right: osp_diag.Run, *, rtol: float = 1e-6) -> None:
    """Equal statistics and raw sums at every site, to a fraction of each variable's largest value."""
    assert left.sites == right.sites
    assert left.steps.tolist() == right.steps.tolist()
    for site in left.sites:
        for a, b in ((left.at(site), right.at(site)), (left.raw(site), right.raw(site))):
            assert set(a) == set(b)
            for name in a:
                # Sums that cancel are no more exact than what was summed.
                scale = np.abs(b[name].where(np.isfinite(b[name]))).max().item()
                atol = rtol * scale if np.isfinite(scale) else 0.0
                xr.testing.assert_allclose(a[name].load(), b[name].load(), rtol=rtol, atol=atol)


# States


SUM, MAXIMUM = "pooled_kurtosis.total", "token_scale.maximum"
SUITES = {
    "everywhere": Suite([get_estimator("pooled_kurtosis"), get_estimator("token_scale")]),
    "six": Suite([get_estimator("six_sigma_outliers")]),
}


def states_of(rank: int) -> tuple[dict, dict]:
    """What a rank measured: sequences longer on higher ranks; rank 0 saw nothing at the site "six"."""
    states, layouts = {}, {}
    layout = Layout(channels=5, tokens=4 + rank)
    generator = torch.Generator().manual_seed(rank)
    for site, suite in SUITES.items():
        if site == "six" and rank == 0:
            continue
        states[site], layouts[site] = {}, layout
        for name, spec in suite.fields(layout).items():
            shape = suite.shape(spec, layout)
            states[site][name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return states, layouts


def fields_of(site: str, layout: Layout):
    return SUITES[site].fields(layout)


def combined(site: str, name: str, ranks: int) -> np.ndarray:
    """The same in NumPy, by hand."""
    found = [states_of(rank)[0] for rank in range(ranks)]
    values = [state[site][name].numpy() for state in found if site in state]
    shape = np.max([value.shape for value in values], axis=0) if values[0].ndim else ()
    how = SUITES[site].fields(Layout(channels=5, tokens=4))[name].combine
    total = np.full(shape, {"sum": 0.0, "maximum": -np.inf, "minimum": np.inf}[how])
    for value in values:
        part = total[tuple(map(slice, value.shape))]
        part[...] = {"sum": np.add, "maximum": np.maximum, "minimum": np.minimum}[how](part, value)
    return total


def _merging(rank: int, ranks: int) -> None:
    states, layouts = states_of(rank)
    merged, sizes = merge_over_ranks(states, layouts, fields_of)
    assert set(merged) == set(SUITES)
    for site, state in merged.items():
        assert sizes[site] == Layout(channels=5, tokens=4 + ranks - 1)
        for name, value in state.items():
            np.testing.assert_allclose(value.numpy(), combined(site, name, ranks), rtol=1e-12, err_msg=name)
    assert is_distributed()
    assert is_first_rank() == (rank == 0)


@pytest.mark.slow
def test_states_of_unlike_ranks_are_merged_by_two(two):
    two.run(_merging)


@pytest.mark.slow
def test_states_of_unlike_ranks_are_merged_by_four(four):
    four.run(_merging)


def test_one_process_is_not_distributed():
    assert not is_distributed()
    assert is_first_rank()
    with pytest.raises(ZeroDivisionError):
        on_first_rank(lambda: 1 // 0)


def _failing(rank: int, ranks: int) -> None:
    with pytest.raises(osp_diag.OspDiagError, match="no space left"):
        on_first_rank(_refused)


def _refused() -> None:
    from osp_diag.errors import StoreError

    assert is_first_rank()
    raise StoreError("no space left")


@pytest.mark.slow
def test_what_fails_on_the_first_rank_fails_on_all(two):
    two.run(_failing)


# Training loops


def sequences(length: int = 12, count: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))


def _training(rank: int, ranks: int, out: str, wrap: str) -> None:
    model = llama()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if wrap == "ddp" else sharded(model)
    mine = sequences()[rank::ranks]
    # At 0.1 one token's kurtosis comes to lie on the edge of a histogram's bin, where a last bit decides.
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    with osp_diag.Probe(wrapped, every=2, out=out, snapshot_tokens=3) as probe:
        assert (probe._records.writer is not None) == (rank == 0)
        for step in range(3):
            with probe.step(step):
                loss = wrapped(mine, labels=mine).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.append_series(step, {"loss": loss.item()})
    if rank != 0:
        return
    run = osp_diag.open_run(out)
    assert run.steps.tolist() == [0, 2]
    assert run.snapshot("residual_post").sizes["token"] == 3


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def alone(out: Path) -> osp_diag.Run:
    """The same loop in one process, on all ranks' tokens."""
    model, ids = llama(), sequences()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with osp_diag.Probe(model, every=2, out=out) as probe:
        for step in range(3):
            with probe.step(step):
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return osp_diag.open_run(out)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_probe_in_a_distributed_loop_measures_all_tokens(tmp_path, two, wrap):
    two.run(_training, str(tmp_path / "two.zarr"), wrap)
    # Gradients are averaged in another order, so the weights of step 2 differ in their last bits.
    same(osp_diag.open_run(tmp_path / "two.zarr"), alone(tmp_path / "one.zarr"), rtol=2e-5)


def _probing_a_sharded_model(rank: int, ranks: int, out: str) -> None:
    from osp_diag.errors import CaptureError

    model, tokenizer = sharded(llama()), byte_tokenizer()
    with pytest.raises(
        CaptureError, match=r"5 sequences do not divide evenly among 2 ranks.*run 4 sequences"
    ):
        osp_diag.probe(model, tokenizer=tokenizer, tokens=80, seq_len=16)
    run = osp_diag.probe(model, tokenizer=tokenizer, tokens=96, seq_len=16, out=out)
    assert run.attrs["ranks"] == 2


@pytest.mark.slow
def test_a_sharded_model_is_probed_whole(tmp_path, two):
    two.run(_probing_a_sharded_model, str(tmp_path / "two.zarr"))
    one = osp_diag.probe(llama(), tokenizer=byte_tokenizer(), tokens=96, seq_len=16)
    same(osp_diag.open_run(tmp_path / "two.zarr"), one)


# The command


def torchrun(ranks: int, *words: str | Path) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    endpoint = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [*launcher, *endpoint, "-m", "osp_diag", *map(str, words)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


# Five sequences of 16 tokens: ranks run unlike numbers of them.
WORDS = ("--tokens", "80", "--seq-len", "16", "--single-protocol")


def assert_whole(out: Path, path: Path, ranks: int) -> None:
    """The run of several ranks is that of one process."""
    run, one = osp_diag.open_run(out), osp_diag.probe(path, tokens=80, seq_len=16)
    assert run.attrs["ranks"] == ranks
    assert run.attrs["token_fingerprint"] == one.attrs["token_fingerprint"]
    same(run, one)
    xr.testing.assert_allclose(run.snapshot("residual_post"), one.snapshot("residual_post"))


@pytest.mark.slow
def test_torchrun_shards_the_tokens_and_writes_one_run(tmp_path):
    path, out = save(llama(), tmp_path / "tiny", byte_tokenizer()), tmp_path / "ranks.zarr"
    done = torchrun(2, "probe", path, *WORDS, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 80
    assert_whole(out, path, 2)
    again = launched(2, ["probe", path, *WORDS, "--out", out], tmp_path)
    assert again.returncode != 0
    assert again.stderr.count("already holds a run; pass --overwrite") == 1


def _probing_by_command(rank: int, ranks: int, *words: str) -> None:
    assert main(["probe", *words]) == 0


@pytest.mark.slow
def test_four_ranks_shard_the_tokens_and_write_one_run(tmp_path, four):
    path, out = save(llama(), tmp_path / "tiny", byte_tokenizer()), tmp_path / "ranks.zarr"
    four.run(_probing_by_command, str(path), *WORDS, "--out", str(out))
    assert_whole(out, path, 4)


@pytest.mark.slow
def test_more_ranks_than_sequences(tmp_path, two):
    path, out = save(llama(), tmp_path / "tiny", byte_tokenizer()), tmp_path / "ranks.zarr"
    two.run(_probing_by_command, str(path), "--tokens", "16", "--seq-len", "16", "--out", str(out))
    same(osp_diag.open_run(out), osp_diag.probe(path, tokens=16, seq_len=16))


# Device maps


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_spread_over_places_gives_the_same_numbers(tmp_path, place):
    from accelerate import dispatch_model

    options = {"tokenizer": byte_tokenizer(), "tokens": 64, "seq_len": 16}
    expected = osp_diag.probe(llama(), **options)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": place}
    rest = {"model.norm": place, "model.rotary_emb": "cpu", "lm_head": place}
    model = dispatch_model(llama(), places | rest, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    same(osp_diag.probe(model, **options), expected)
