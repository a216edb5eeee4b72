"""Processes forked from one that has imported everything: that takes longer than what most tests do there."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest
import torch.multiprocessing

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "osp_diag.cli.main",
    "osp_diag.cli.options",
    "osp_diag.cli.probe",
    "osp_diag.cli.train",
    "osp_diag.trainer.loop",
    "tests.test_ranks",
    "tests.test_train_loop",
    # What these import when it is first used.
    "array_api_compat.numpy",
    "array_api_compat.torch",
    "tokenizers.trainers",
    "zarr",
)
"""No JAX, which starts threads, nor what a test wants imported anew."""


@cache
def forking() -> Any:
    """The context of :mod:`multiprocessing` whose processes are such forks."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


class Warm:
    """A process that calls a function, used as a :class:`subprocess.Popen` of a Python that would do so.

    Parameters
    ----------
    target, arguments : the function, at the top of a module; what it returns is the exit code
    stdout, stderr : files that are appended to; else this process's own
    env : all of its environment
    """

    def __init__(
        self,
        target: Callable[..., int | None],
        arguments: Iterable[Any] = (),
        *,
        stdout: Path | None = None,
        stderr: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        streams = {1: stdout, 2: stderr}
        environment = dict(os.environ if env is None else env)
        self._process = forking().Process(
            target=_become, args=(target, tuple(arguments), streams, environment, os.getcwd())
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As for a subprocess: None while it runs, -N if signal N ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(str(self._process), timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _become(
    target: Callable[..., int | None],
    arguments: tuple[Any, ...],
    streams: Mapping[int, Path | None],
    environment: Mapping[str, str],
    folder: str,
) -> None:
    for number, path in streams.items():
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.exit(target(*arguments))


def command(words: Sequence[str], /) -> int:
    """``osp-diag`` with these words."""
    from osp_diag.cli.main import main

    sys.argv = ["osp-diag", *words]
    return main()


def read_when(path: Path, ready: Callable[[str], bool], process: Warm, patience: float = 60) -> str:
    """What ``process`` has written to ``path``, once it is ``ready``."""
    end = time.monotonic() + patience
    while not ready(text := path.read_text() if path.exists() else ""):
        assert process.poll() is None, text
        assert time.monotonic() < end, text
        time.sleep(0.02)
    return text
