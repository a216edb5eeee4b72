"""Crashes: kill -9 at any moment, and any order of operations."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osp_diag.runs.lock import LOCK_NAME, WriterLock
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import ATTRIBUTES, check_run, groups, snapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def begun(path: Path, **options: Any) -> RunWriter:
    return RunWriter(path, ATTRIBUTES, **options)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3)),
        st.tuples(st.just("series"), st.integers(1, 3)),
        st.tuples(st.just("flush"), st.just(0)),
        st.tuples(st.just("truncate"), st.integers(0, 6)),
        st.tuples(st.just("reopen"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operations=OPERATIONS,
    block=st.integers(1, 4),
    chunk_steps=st.integers(1, 4),
    series_block=st.integers(1, 4),
)
def test_any_order_of_operations_leaves_what_a_list_would_hold(
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[str, int]],
    block: int,
    chunk_steps: int,
    series_block: int,
) -> None:
    path = tmp_path_factory.mktemp("any") / "run.zarr"
    options = {"block": block, "chunk_steps": chunk_steps, "series_block": series_block}
    steps: list[int] = []
    logged: list[int] = []
    writer = begun(path, **options)
    small = xr.Dataset({"x": (("layer",), np.arange(2.0))}, coords={"layer": [0, 1]})
    for operation, size in operations:
        if operation == "append":
            steps.append((steps[-1] if steps else 0) + size)
            writer.append(steps[-1], {"embedding": small + steps[-1]})
        elif operation == "series":
            logged.append((logged[-1] if logged else 0) + size)
            writer.append_series(logged[-1], {"loss": logged[-1] / 2})
        elif operation == "flush":
            writer.flush()
        elif operation == "truncate":
            writer.truncate_after(size)
            steps, logged = [s for s in steps if s <= size], [s for s in logged if s <= size]
        else:
            writer.close()
            writer = begun(path, resume=True, **options)
        assert writer.steps == steps
    writer.close()
    with xr.open_datatree(path, engine="zarr") as tree:
        if "step" in tree.coords:
            assert tree.coords["step"].values.tolist() == steps
            expected = np.asarray(steps, float)[:, None] + np.arange(2.0)
            np.testing.assert_array_equal(tree["embedding/x"].values, expected.reshape(-1, 2))
        if "series" in tree.children:
            assert tree["series/logged_step"].values.tolist() == logged
            np.testing.assert_array_equal(tree["series/loss"].values, np.asarray(logged) / 2)


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it, nothing is written after it."""


@contextmanager
def killed_at(operation: int) -> Iterator[list[str]]:
    """Let the process "die" at its ``operation``-th change of the file system, files half written."""
    done: list[str] = []
    real = {name: getattr(os, name) for name in ("replace", "unlink", "mkdir", "rmdir")}

    def dying(name: str) -> Any:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            with one_at_a_time:
                if len(done) == operation:
                    if name == "replace":
                        os.truncate(path, os.path.getsize(path) // 2)
                    raise Killed
                done.append(name)
            return real[name](path, *rest, **options)

        return call

    one_at_a_time = threading.Lock()  # chunks are written by several threads
    locks: list[WriterLock] = []
    acquire = WriterLock.acquire
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WriterLock, "acquire", lambda lock: (acquire(lock), locks.append(lock)))
        for name in real:
            patch.setattr(os, name, dying(name))
        try:
            yield done
        finally:
            patch.undo()
            for lock in locks:
                lock.release()  # what the kernel does for a dead process


def _life(path: Path, journal: list[int]) -> None:
    """Resume a run, go back a little, train on; ``journal`` gets every step that append returned for."""
    writer = begun(path, resume=True, chunk_steps=3)
    last = writer.last_step
    if last is not None and last % 2:
        writer.truncate_after(last - 1)
    if "snapshot/residual_post" not in writer:
        writer.write_static("snapshot/residual_post", snapshot()["snapshot/residual_post"])
    for _ in range(2):
        step = 0 if writer.last_step is None else writer.last_step + 1
        writer.append(step, groups(step))
        journal.append(step)
    writer.close()


def test_death_at_every_single_file_operation(path: Path) -> None:
    """Exhaustive where the random kills below are not: each life dies one operation later than the last."""
    operation = deaths = 0
    while True:
        journal: list[int] = []
        before = len(check_run(path)) if (path / "zarr.json").exists() else 0
        try:
            with killed_at(operation) as done:
                _life(path, journal)
        except Killed:
            deaths += 1
        else:
            break
        if (path / "zarr.json").exists():
            steps = check_run(path)
            assert len(steps) >= before - 1
            if journal:
                assert steps[-1] >= journal[-1]
        operation += 1 if operation < 60 else 7
    assert deaths > 60
    assert len(done) <= operation
    check_run(path)
    assert not list(path.rglob("*.partial"))
    assert not (path / LOCK_NAME).exists()


# One interpreter does the imports; each life is a fork of it, killed by a signal of its own parent.
_NURSERY = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import ATTRIBUTES, groups, snapshot

def life(seed, journal):
    chance = random.Random(seed)
    writer = RunWriter({path!r}, ATTRIBUTES, resume=True, chunk_steps=5, series_block=4)
    if chance.random() < 0.3 and writer.last_step:
        writer.truncate_after(writer.last_step - 1)
    os.write(journal, b"%d open\\n" % (-1 if writer.last_step is None else writer.last_step))
    if "snapshot" not in writer:
        for group, dataset in snapshot().items():
            writer.write_static(group, dataset, replace=True)
    while True:
        step = 0 if writer.last_step is None else writer.last_step + 1
        writer.append(step, groups(step))
        os.write(journal, b"%d\\n" % step)
        writer.append_series(step, {{"loss": step / 2}})

for line in sys.stdin:
    seed, delay = line.split()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        life(int(seed), writing)
    os.close(writing)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading) as journal:
        lines = journal.read().split("\\n")[:-1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    print(",".join(lines), flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(path: Path, tmp_path: Path) -> None:
    """Forty lives of one run, each killed within a tenth of a second and then resumed."""
    chance = np.random.default_rng(0)
    script = tmp_path / "nursery.py"
    script.write_text(_NURSERY.format(root=str(Path(__file__).parents[1]), path=str(path)))
    command = [sys.executable, str(script)]
    killed_while_writing = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for life in range(40):
            nursery.stdin.write(f"{life} {chance.uniform(0.005, 0.1):.4f}\n")
            nursery.stdin.flush()
            journal = [entry for entry in nursery.stdout.readline().strip().split(",") if entry]
            if not journal:
                continue
            killed_while_writing += 1
            acknowledged = int(journal[-1].split()[0])
            steps = check_run(path)
            # At most the step being written when the kill came is missing, or already there.
            assert len(steps) - 1 in (acknowledged, acknowledged + 1)
        nursery.stdin.close()
    assert nursery.returncode == 0
    assert killed_while_writing >= 20
    with begun(path, resume=True) as writer:
        step = len(writer.steps)
        writer.append(step, groups(step))
    assert len(check_run(path)) == step + 1
    assert not list(path.rglob("*.partial"))
