"""Several runs side by side, each in a process of its own, as many at a time as the machine takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from osp_diag.errors import TrainingError
from osp_diag.trainer.checkpoint import folder_of, latest
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.config_values import as_dictionary

__all__ = ["concurrent_runs", "memory_of_a_run", "train_all", "visible_gpus"]

POLL_SECONDS = 0.5
LAST_LINES = 15
CRASHES = {
    -number for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
}
"""Exit codes of native code that gave up, as after a fault of the GPU; no error of ours ends so."""
RESTARTS = 2
"""How often a run that crashed is taken up again."""


@dataclass
class _Process:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    gpu: str | None
    log_start: int
    """Bytes of the log that are of earlier lives of the run."""


def memory_of_a_run(config: TrainConfig) -> float:
    """Roughly the bytes that training one configuration takes on a device.

    Weights, gradients and two moments in float32 (16 bytes a parameter); what a block keeps for its
    backward pass (about 34 bytes a token and channel in 16 bits, Korthikanti et al. 2022, twice that in 32);
    and the logits with their gradient (8 bytes a token and vocabulary entry).
    """
    model = config.model
    # Of a block: four matrices of attention (GQA would be less), three of the feed-forward.
    matrices = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.feed_forward_size
    parameters = model.layers * matrices + 2 * model.vocabulary_size * model.hidden_size
    tokens = (config.micro_batch_size or config.batch_size) * config.data.sequence_length
    bytes_per_channel = 34 if config.dtype == "bfloat16" else 68
    return (
        16 * parameters
        + tokens * model.layers * model.hidden_size * bytes_per_channel
        + 8 * tokens * model.vocabulary_size
    )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return variable.split(",")[:count] if variable else list(map(str, range(count)))


def concurrent_runs(configs: Mapping[str, TrainConfig]) -> int:
    """How many of these to train at a time: what memory allows on each GPU, one a core on a CPU."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        need = 1.3 * max(map(memory_of_a_run, configs.values())) + 2**30
        return max(1, min(len(configs), len(visible_gpus()) * max(1, int(free / need))))
    return max(1, min(len(configs), os.cpu_count() or 1))


def train_all(
    configs: Mapping[str, TrainConfig],
    out: Path,
    *,
    at_a_time: int | None = None,
    resume: bool = False,
    announce: Callable[[str], None] = lambda line: None,
    stop: threading.Event | None = None,
) -> dict[str, Path]:
    """Train every configuration into ``out/name.zarr``; returns these paths by name.

    Each run has one GPU where there are any, the one with the fewest runs. What a run prints goes to
    ``out/name.log``. With ``resume`` finished runs are left as they are and unfinished ones go on. A run
    whose process crashes goes on from its last checkpoint, twice at most. If one fails otherwise the others
    are stopped, saved, and can be resumed; so are all of them where another thread sets ``stop``.

    Raises
    ------
    TrainingError : a run failed, with what its log says of it, or all were stopped
    """
    out.mkdir(parents=True, exist_ok=True)
    number = at_a_time or concurrent_runs(configs)
    waiting = [name for name in configs if not (resume and _finished(out / f"{name}.zarr", configs[name]))]
    running: list[_Process] = []
    gpus = visible_gpus()
    start = time.monotonic()
    restarts: Counter[str] = Counter()
    stop = stop or threading.Event()
    try:
        while waiting or running:
            while waiting and len(running) < number:
                busy = [entry.gpu for entry in running]
                gpu = min(gpus, key=busy.count, default=None)
                running.append(_start(waiting[0], configs[waiting.pop(0)], out, number, resume, gpu))
                announce(f"{running[-1].name} started")
            if stop.wait(POLL_SECONDS):
                names = ", ".join(entry.name for entry in running)
                raise TrainingError(f"the runs {names} were stopped, and are saved where they were")
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                if entry.process.returncode in CRASHES and restarts[entry.name] < RESTARTS:
                    restarts[entry.name] += 1
                    announce(f"{_failure(entry)}\n{entry.name} goes on from its last checkpoint")
                    running.append(_start(entry.name, configs[entry.name], out, number, True, entry.gpu))
                    continue
                _check(entry)
                announce(f"{entry.name} finished after {time.monotonic() - start:.0f} s")
    finally:
        for entry in running:
            entry.process.terminate()
        for entry in running:
            entry.process.wait()
    return {name: out / f"{name}.zarr" for name in configs}


def _finished(run: Path, config: TrainConfig) -> bool:
    checkpoint = latest(folder_of(run)) if run.exists() else None
    return checkpoint is not None and checkpoint.step == config.steps


def _start(
    name: str, config: TrainConfig, out: Path, at_a_time: int, resume: bool, gpu: str | None
) -> _Process:
    config_file = out / f"{name}.json"
    config_file.write_text(json.dumps(as_dictionary(config), indent=1), encoding="utf-8")
    mode = "--resume" if resume else "--overwrite"
    command = [sys.executable, "-m", "osp_diag", "train", "--config", str(config_file)]
    command += ["--out", str(out / f"{name}.zarr"), mode]
    # Processes that each take every core slow one another down.
    threads = str(max(1, (os.cpu_count() or 1) // at_a_time))
    log = out / f"{name}.log"
    with log.open("ab" if resume else "wb") as file:
        log_start = file.tell()
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ
            | {"OMP_NUM_THREADS": threads}
            | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
        )
    return _Process(name, process, log, gpu, log_start)


def _check(entry: _Process) -> None:
    if entry.process.returncode != 0:
        raise TrainingError(
            f"{_failure(entry)}\n"
            "The other runs are saved where they were: the same command with --resume goes on from there."
        )


def _failure(entry: _Process) -> str:
    """That a run failed, and what its log says of it."""
    lines = entry.log.read_bytes()[entry.log_start :].decode(errors="replace").splitlines()
    head = f"the run {entry.name} failed with exit code {entry.process.returncode}; from {entry.log}:"
    return "\n".join([head, *(f"  {line}" for line in _last_lines(lines))])


def _last_lines(lines: list[str]) -> list[str]:
    """The log from the run's own message on; native code may print a long trace after it."""
    messages = [number for number, line in enumerate(lines) if line.startswith("osp-diag:")]
    return lines[messages[-1] :][:LAST_LINES] if messages else lines[-LAST_LINES:]
