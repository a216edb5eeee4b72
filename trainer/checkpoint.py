"""Checkpoints as they lie on disk: which are there, whose they are, and reading them."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from osp_diag.errors import TrainingError
from osp_diag.json_text import parse_object
from osp_diag.plain_files import read_plain
from osp_diag.probing.ranks import is_distributed
from osp_diag.trainer.checkpoint_files import TensorReader, read_metadata
from osp_diag.trainer.checkpoint_pins import PINS
from osp_diag.trainer.config import TrainConfig, from_dictionary
from osp_diag.trainer.config_values import as_dictionary, differences

__all__ = [
    "TrainingCheckpoint",
    "check_beside",
    "complete_checkpoints",
    "delete_checkpoints",
    "folder_of",
    "identity_of",
    "latest",
    "read_checkpoint",
    "without_single_process_warnings",
]

PART = ".part"
HOST_STATE = "state.json"
NAME = re.compile(r"step-(\d+)", re.ASCII)
_MOST_HOST_STATE = 64 * 2**20
_DELETE = "delete it to resume from the one before"

# Why these: docs/decisions.md, Training.
FREE = (
    "checkpoint.",
    "parallel.",
    "device",
    "compile",
    "activation_checkpointing",
    "micro_batch_size",
    "log_every",
    "sketch_every",
    "divergence.policy",
    "divergence.spike",
    "monitor.",
)
"""Keys that a resumed run may change: how the work is done, not what is computed."""


ADDED_LATER = {"probe.gradients": False}
"""Keys that runs of earlier versions lack → the value with which a run is as theirs are: these go on."""


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """The values that determine what a run computes, by dotted key."""
    return {
        key: value
        for key, value in as_dictionary(config).items()
        if not key.startswith(FREE) and (key not in ADDED_LATER or value != ADDED_LATER[key])
    }


def folder_of(run: str | os.PathLike[str]) -> Path:
    """Where the checkpoints of a run are: ``name.checkpoints`` beside ``name.zarr``."""
    return Path(run).with_suffix(".checkpoints")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One complete checkpoint.

    Attributes
    ----------
    path : its folder
    step : steps done
    config : of the run that wrote it
    data : the state of the data after that step
    function : what the weights are weights of (:func:`osp_diag.trainer.fingerprint.function_record`); None in
        checkpoints of versions that did not keep it
    """

    path: Path
    step: int
    config: TrainConfig
    data: dict[str, Any]
    function: dict[str, Any] | None = None

    def check(self, config: TrainConfig) -> None:
        """Refuse to go on under another configuration.

        Raises
        ------
        TrainingError : with every value that differs, save those that only say how the work is done
        """
        changed = [line for line in differences(self.config, config) if not line.startswith(FREE)]
        if changed:
            raise TrainingError(
                f"{self.path} was trained under another configuration and cannot be resumed under this one:\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nGive the same values, or another --out for a new run."
            )

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes of its tensors by name, such as ``model.lm_head.weight``; nothing is read but metadata.

        Raises
        ------
        TrainingError : as :func:`osp_diag.trainer.checkpoint_files.read_metadata`
        """
        tensors = self._metadata().state_dict_metadata
        return {name: tuple(entry.size) for name, entry in tensors.items() if hasattr(entry, "size")}

    def load(self, tensors: dict[str, Any]) -> None:
        """Read the tensors into those of ``tensors``, whatever the number of ranks that wrote them.

        Nothing of the checkpoint is executed.

        Raises
        ------
        TrainingError : it is damaged, or was not written by osp-diag
        """
        reader = TensorReader(self.path, self._metadata())
        try:
            with without_single_process_warnings():
                dcp.load(tensors, storage_reader=reader, no_dist=not is_distributed())
        except (Exception, dcp.CheckpointException) as error:
            raise TrainingError(f"{self.path} cannot be read ({reason_of(error)}); {_DELETE}") from error

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors whose names begin so, whole, on the CPU: ``model.…``, ``optimizer.<owner>.<parameter>.…``.

        Raises
        ------
        TrainingError : as :meth:`load`
        """
        entries = self._metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
        }
        self.load(tensors)
        return tensors

    def _metadata(self) -> Metadata:
        try:
            return read_metadata(self.path)
        except TrainingError as error:
            raise TrainingError(f"{error}; {_DELETE}") from error


@contextmanager
def without_single_process_warnings() -> Iterator[None]:
    """Keep torch from warning, at every save and load, that a single process saves alone.

    Warning filters belong to the process, not to a thread: a block that saves in the background has to last
    until :meth:`osp_diag.trainer.checkpoint_folder.CheckpointFolder.wait`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield


def latest(folder: Path) -> TrainingCheckpoint | None:
    """The newest complete checkpoint of a folder; None where there is none."""
    complete = complete_folders(folder)
    return read_checkpoint(complete[-1]) if complete else None


def complete_checkpoints(folder: Path) -> list[TrainingCheckpoint]:
    """All complete checkpoints of a folder, by rising step; a training may be writing others meanwhile.

    Raises
    ------
    TrainingError : one is damaged; the message names it
    """
    checkpoints = []
    for path in complete_folders(folder):
        try:
            checkpoints.append(read_checkpoint(path))
        except TrainingError:
            if path.exists():  # else a training has just deleted it
                raise
    return checkpoints


def check_beside(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse checkpoints that do not belong to what is about to be trained.

    Raises
    ------
    TrainingError : a run was moved or deleted and its checkpoints were left
    """
    folder = folder_of(run)
    if run.exists() or overwrite or not complete_folders(folder):
        return
    advice = "move the run back beside them" if resume else "give another --out, --overwrite, or delete them"
    raise TrainingError(f"{folder} holds checkpoints of a run, but {run} is not there; {advice}")


def delete_checkpoints(folder: Path, *, after: int = -1) -> None:
    """Delete the checkpoints, later than a step, of a run that is to be replaced; nothing else is deleted."""
    for entry in folder.glob("step-*") if folder.is_dir() else ():
        match = NAME.fullmatch(entry.name.removesuffix(PART))
        if match and int(match[1]) > after:
            delete(entry)
    if after < 0 and os.path.lexists(folder / PINS):
        delete(folder / PINS)


def delete(entry: Path) -> None:
    """Delete a checkpoint; of a link the link."""
    if entry.is_dir() and not entry.is_symlink():
        # A kill in between must not leave half of it under the name of a complete one.
        part = entry.with_name(entry.name.removesuffix(PART) + PART)
        if part != entry and os.path.lexists(part):
            delete(part)
        shutil.rmtree(entry.rename(part))
    else:
        entry.unlink()


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def complete_folders(folder: Path) -> list[Path]:
    """The complete checkpoints of a run by step, the newest last."""
    if not folder.is_dir():
        return []
    entries = [e for e in folder.iterdir() if NAME.fullmatch(e.name) and e.is_dir() and not e.is_symlink()]
    return sorted(entries, key=step_of)


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """The checkpoint in a folder.

    Raises
    ------
    TrainingError : it is none, or of another version
    """
    try:
        state = parse_object(read_plain(path / HOST_STATE, _MOST_HOST_STATE))
        step, config = int(state["step"]), from_dictionary(state["config"])
        function = state.get("function")
        if function is not None and not isinstance(function, dict):
            raise TypeError("its 'function' is no object")
        return TrainingCheckpoint(path, step, config, state["data"], function)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise TrainingError(
            f"{path} is no checkpoint of this version ({reason_of(error)}); {_DELETE}"
        ) from error


def reason_of(error: BaseException) -> str:
    """Why torch could not read or write, in a sentence: its own message repeats the trace of every rank."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
