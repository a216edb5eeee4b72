"""Gloo processes that stay for several tests, and commands that ``torchrun`` would start as several."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
import torch.distributed as dist

from tests.warm_processes import Warm, command, forking


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """That many processes in one group; ``run`` may be called again and again."""

    def __init__(self, ranks: int) -> None:
        self.ranks, port = ranks, free_port()
        context = forking()
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, ranks, port, theirs), daemon=True)
            process.start()
            theirs.close()  # else the end of a process that dies is never read
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, body: Any, *arguments: Any) -> None:
        """Call ``body(rank, ranks, *arguments)`` in every process; what one raises is raised here."""
        for pipe in self.pipes:
            pipe.send((body, arguments))
        waiting = list(self.pipes)
        while waiting:
            for pipe in wait(waiting):
                waiting.remove(pipe)
                try:
                    problem = pipe.recv()
                except EOFError:
                    problem = "it died"
                if problem is not None:  # the others may wait for it for ever
                    self.end()
                    raise AssertionError(f"rank {self.pipes.index(pipe)} of {self.ranks}: {problem}")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def launched(ranks: int, words: Sequence[str | Path], folder: Path) -> CompletedProcess[str]:
    """``osp-diag`` with these words on several ranks, which the environment describes as ``torchrun`` does.

    The exit code is the largest of theirs, as torchrun's is not 0 if any of theirs is not.
    """
    port = str(free_port())
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    errors = folder / f"launched-{port}"  # as torchrun's folder, of which each rank has its own
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    errors.mkdir()
    streams = {name: folder / f"launched-{port}.{name}" for name in ("stdout", "stderr")}
    processes = [
        Warm(
            command,
            ([str(word) for word in words],),
            env=os.environ
            | shared
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {"TORCHELASTIC_ERROR_FILE": str(errors / str(rank) / "error.json")},
            **streams,
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    written = {name: path.read_text() for name, path in streams.items()}
    return CompletedProcess(list(words), max(map(abs, codes)), **written)


def _serve(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    while True:
        body, arguments = pipe.recv()
        try:
            body(rank, ranks, *arguments)
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)
