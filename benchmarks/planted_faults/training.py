"""Training the faults: one healthy training for each recipe and seed, from whose middle the others go on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.planted_faults.faults import FAULTS, Fault
from osp_diag.errors import DivergenceError
from osp_diag.trainer.checkpoint import folder_of
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.config_values import as_dictionary, with_changes
from osp_diag.trainer.presets import preset, with_recipe

__all__ = ["BASES", "Job", "Setting", "jobs_of", "train_all", "train_one", "work_through"]

BASES = {"osp": "healthy_osp", "muon_embproj": "healthy_gains", "adam": "healthy_adam"}
"""Recipe → the fault (none) whose training the others of that recipe go on from."""

EVERY_PRESET: dict[str, Any] = {
    "schedule.decay": 0,  # so that a training does not depend on how long it will be
    "compile": False,
    "log_every": 1,
    "probe.dense_until": 0,
    "checkpoint.keep": 10_000,
    "checkpoint.background": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"batch_size": 4, "schedule.warmup": 5, "probe.tokens": 1024},
    # Of the built-in text, whose tokenizer has 4,096 entries.
    "small": {
        "batch_size": 16,
        "schedule.warmup": 10,
        "probe.tokens": 4096,
        "model.vocabulary_size": 4096,
        "data.sequence_length": 256,
        "data.validation_fraction": 0.05,
    },
}


@dataclass(frozen=True)
class Setting:
    """What all trainings of a table share.

    Attributes
    ----------
    out : the folder; a training is at ``preset/fault-seedN.zarr``
    preset : ``tiny`` or ``small``
    onset : faults that begin in the middle do so after this step
    steps : of a training
    every : steps between probes, and between checkpoints
    device : as in the configuration
    """

    out: Path
    preset: str = "tiny"
    onset: int = 50
    steps: int = 100
    every: int = 10
    device: str = "cpu"

    def config(self, recipe: str, seed: int) -> TrainConfig:
        """Of a healthy training."""
        periods = {"probe.every": self.every, "probe.dense_every": self.every, "checkpoint.every": self.every}
        seeds = {"seed": seed, "data.seed": seed, "device": self.device, "steps": self.steps}
        changes = EVERY_PRESET | PRESETS[self.preset] | periods | seeds
        return with_changes(with_recipe(preset(self.preset), recipe), changes)


@dataclass(frozen=True)
class Job:
    """One training of a table."""

    name: str
    seed: int
    setting: Setting

    @property
    def fault(self) -> Fault:
        """What is planted."""
        return FAULTS[self.name]

    @property
    def run(self) -> Path:
        """The run store."""
        return self.setting.out / self.setting.preset / f"{self.name}-seed{self.seed}.zarr"

    @property
    def base(self) -> Job:
        """The healthy training that it goes on from; of that training itself."""
        return Job(BASES[self.fault.recipe], self.seed, self.setting)

    @property
    def record(self) -> Path:
        """A file that is there once the training is done: how it ended and what it took."""
        return self.run.with_suffix(".json")

    @property
    def onset(self) -> int:
        """The last step without the fault; of one without any, its last step."""
        return {"healthy": self.setting.steps, "start": 0, "mid_run": self.setting.onset}[self.fault.begins]

    @property
    def goes_on(self) -> bool:
        """Whether it begins in the middle of its base."""
        return self.fault.begins == "mid_run" or (self.fault.begins == "healthy" and self != self.base)

    def healthy_config(self) -> TrainConfig:
        """Before the onset."""
        return self.setting.config(self.fault.recipe, self.seed)

    def config(self) -> TrainConfig:
        """After the onset."""
        config = self.healthy_config()
        values = as_dictionary(config)
        return with_changes(
            config,
            dict(self.fault.changes) | {key: values[key] * by for key, by in self.fault.times.items()},
        )

    def is_done(self) -> bool:
        """Whether it was trained under this setting."""
        if not self.record.exists():
            return False
        return json.loads(self.record.read_text(encoding="utf-8"))["config"] == as_dictionary(self.config())


def jobs_of(setting: Setting, names: Iterable[str], seeds: Iterable[int]) -> list[Job]:
    """The trainings of these faults with these seeds, and the healthy ones that they need."""
    jobs = [Job(name, seed, setting) for seed in seeds for name in names]
    return list(dict.fromkeys([*(job.base for job in jobs), *jobs]))


def train_one(job: Job) -> dict[str, Any]:
    """Train one; what an unfinished attempt left is replaced. Returns what the record holds."""
    from osp_diag.trainer.loop import train

    started, ended = time.perf_counter(), "finished"
    _delete(job)
    job.run.parent.mkdir(parents=True, exist_ok=True)
    config = job.config()
    options: dict[str, Any] = {}
    if job.goes_on:
        checkpoint = _copy_base(job)
        as_segment = job.fault.is_declared or job.fault.new_segment
        options = (
            {"start": checkpoint, "segment": True, "overwrite": True} if as_segment else {"resume": True}
        )
    with job.fault.planting(config, job.seed).planted():
        try:
            train(config, job.run, **options)
        except DivergenceError as error:
            ended = str(error)
    record = {
        "fault": job.name,
        "seed": job.seed,
        "ended": ended,
        "seconds": round(time.perf_counter() - started, 1),
        "config": as_dictionary(config),
    }
    job.record.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def _delete(job: Job) -> None:
    job.record.unlink(missing_ok=True)
    for folder in (job.run, folder_of(job.run)):
        if folder.exists():
            shutil.rmtree(folder)


def _copy_base(job: Job) -> Path:
    """The base's run, and its checkpoints up to the onset: nothing changes in these, so links serve.

    Returns the copy's checkpoint at the onset.
    """
    last = folder_of(job.run) / f"step-{job.setting.onset:08d}"
    shutil.copytree(job.base.run, job.run)
    for checkpoint in folder_of(job.base.run).glob("step-*"):
        if checkpoint.name <= last.name:
            shutil.copytree(checkpoint, folder_of(job.run) / checkpoint.name, copy_function=os.link)
    return last


def work_through(
    jobs: Sequence[Job],
    work: Callable[[Job], Mapping[str, Any]],
    workers: int,
    progress: Callable[[str], None],
) -> list[Job]:
    """Do ``work`` for each, so many at a time, in processes of one thread.

    Returns those that failed, once the others are done; why was told to ``progress``.
    """
    failed = []
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(min(workers, len(jobs)) or 1, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, job): job for job in jobs}
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            head = f"{number}/{len(jobs)} {job.name}, seed {job.seed}"
            if (error := future.exception()) is not None:
                failed.append(job)
                progress(f"{head}: failed: {type(error).__name__}: {error}")
            else:
                result = future.result()
                progress(f"{head}: {result['ended'].splitlines()[0]} ({result['seconds']:.0f} s)")
    return failed


def train_all(jobs: Iterable[Job], workers: int, progress: Callable[[str], None]) -> list[Job]:
    """Train what is not done, the healthy trainings first; returns those that failed."""
    waiting = [job for job in jobs if not job.is_done()]
    bases = [job for job in waiting if job == job.base]
    failed = work_through(bases, train_one, workers, progress)
    ready = [job for job in waiting if job not in bases and job.base not in failed]
    return failed + work_through(ready, train_one, workers, progress)
