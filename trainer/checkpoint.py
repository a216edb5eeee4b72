"""Checkpoints: sharded, written in the background, committed by one rename, the last few kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from osp_diag.errors import TrainingError
from osp_diag.json_text import parse_object
from osp_diag.plain_files import read_plain
from osp_diag.probing.ranks import is_distributed, is_first_rank
from osp_diag.trainer.checkpoint_files import TensorReader, read_metadata
from osp_diag.trainer.config import CheckpointConfig, TrainConfig, from_dictionary
from osp_diag.trainer.config_values import as_dictionary, differences

__all__ = [
    "CheckpointFolder",
    "TrainingCheckpoint",
    "check_beside",
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
_NO_SPACE = 2**20
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
    "divergence.policy",
    "divergence.spike",
    "monitor.",
)
"""Keys that a resumed run may change: how the work is done, not what is computed."""


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """The values that determine what a run computes, by dotted key."""
    return {key: value for key, value in as_dictionary(config).items() if not key.startswith(FREE)}


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
    """

    path: Path
    step: int
    config: TrainConfig
    data: dict[str, Any]

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
            raise TrainingError(f"{self.path} cannot be read ({_reason(error)}); {_DELETE}") from error

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, whole and on the CPU: ``model.…``, ``optimizer.<name>.<parameter>.…``.

        Raises
        ------
        TrainingError : as :meth:`load`
        """
        entries = self._metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
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
    until :meth:`CheckpointFolder.wait`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        yield


def latest(folder: Path) -> TrainingCheckpoint | None:
    """The newest complete checkpoint of a folder; None where there is none."""
    complete = _complete(folder)
    return read_checkpoint(complete[-1]) if complete else None


def check_beside(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse checkpoints that do not belong to what is about to be trained.

    Raises
    ------
    TrainingError : a run was moved or deleted and its checkpoints were left
    """
    folder = folder_of(run)
    if run.exists() or overwrite or not _complete(folder):
        return
    advice = "move the run back beside them" if resume else "give another --out, --overwrite, or delete them"
    raise TrainingError(f"{folder} holds checkpoints of a run, but {run} is not there; {advice}")


def delete_checkpoints(folder: Path, *, after: int = -1) -> None:
    """Delete the checkpoints, later than a step, of a run that is to be replaced; nothing else is deleted."""
    for entry in folder.glob("step-*") if folder.is_dir() else ():
        match = NAME.fullmatch(entry.name.removesuffix(PART))
        if match and int(match[1]) > after:
            _delete(entry)


def _delete(entry: Path) -> None:
    """Delete a checkpoint; of a link the link."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    entries = [e for e in folder.iterdir() if NAME.fullmatch(e.name) and e.is_dir() and not e.is_symlink()]
    return sorted(entries, key=lambda entry: int(entry.name.removeprefix("step-")))


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """The checkpoint in a folder.

    Raises
    ------
    TrainingError : it is none, or of another version
    """
    try:
        state = parse_object(read_plain(path / HOST_STATE, _MOST_HOST_STATE))
        return TrainingCheckpoint(path, int(state["step"]), from_dictionary(state["config"]), state["data"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise TrainingError(
            f"{path} is no checkpoint of this version ({_reason(error)}); {_DELETE}"
        ) from error


def _reason(error: BaseException) -> str:
    """Why torch could not read or write, in a sentence: its own message repeats the trace of every rank."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class CheckpointFolder:
    """Writes checkpoints and deletes old ones.

    A checkpoint is written into ``step-N.part`` and renamed to ``step-N`` once every rank's tensors and the
    host's state are on disk; whatever kills the process, a folder named ``step-N`` is complete
    (docs/decisions.md, Training).

    Parameters
    ----------
    folder : of this run's checkpoints; made when needed
    config : how many to keep, and whether to write in the background
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self._under_way: tuple[Future[Any], Callable[[], None], Path] | None = None
        # Collectives of a background thread must not mix with those of the training step.
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        if is_first_rank() and folder.is_dir():
            for part in folder.glob(f"step-*{PART}"):
                _delete(part)

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        data: Mapping[str, Any],
        run_config: TrainConfig,
        *,
        background: bool | None = None,
    ) -> None:
        """Save ``tensors`` (nested dictionaries of tensors, DTensors among them) and the host's state.

        Returns once the tensors are copied; they may change while they are being written. A save that is
        still being written is waited for first.

        Raises
        ------
        TrainingError : the disk refuses, now or in the save before; nothing is left of what was not finished
        KeyboardInterrupt : the same
        """
        self.wait()
        final, part = self.folder / f"step-{step:08d}", self.folder / f"step-{step:08d}{PART}"
        if final.exists():
            return
        host = {"step": step, "config": as_dictionary(run_config), "data": dict(data)}
        with self._disk_errors(final, part):
            if is_first_rank():
                part.mkdir(parents=True, exist_ok=True)
                (part / HOST_STATE).write_text(json.dumps(host), encoding="utf-8")
            self._barrier()
            alone, group = not is_distributed(), self._group
            if self.config.background if background is None else background:
                future = dcp.async_save(tensors, checkpoint_id=part, process_group=group, no_dist=alone)
                assert isinstance(future, Future)
                self._under_way = (future, lambda: self._commit(part, final), part)
                return
            dcp.save(tensors, checkpoint_id=part, process_group=group, no_dist=alone)
            self._commit(part, final)

    def wait(self) -> None:
        """Wait until what is being written is committed."""
        if self._under_way is None:
            return
        (future, commit, part), self._under_way = self._under_way, None
        with self._disk_errors(part.with_suffix(""), part, future):
            future.result()
            commit()

    def poll(self) -> None:
        """Commit a background save that has ended; called between steps.

        With several ranks the commit waits for the next save or the end: its barrier would make ranks that
        are ahead wait for the slowest in the middle of training.
        """
        if self._under_way is not None and not is_distributed() and self._under_way[0].done():
            self.wait()

    def _commit(self, part: Path, final: Path) -> None:
        self._barrier()
        if is_first_rank():
            _synchronise(part)
            part.rename(final)
            for old in _complete(self.folder)[: -self.config.keep]:
                shutil.rmtree(old)
        self._barrier()

    @contextmanager
    def _disk_errors(self, final: Path, part: Path, future: Future[Any] | None = None) -> Iterator[None]:
        """Turn what a full or read-only disk raises into a message; what was not finished is removed."""
        try:
            yield
        except (OSError, RuntimeError, KeyboardInterrupt, dcp.CheckpointException) as error:
            if future is not None:
                future.exception()  # its thread writes until then
            if is_first_rank():
                shutil.rmtree(part, ignore_errors=True)
            # torch wraps a second Ctrl-C as it wraps everything else.
            if any(isinstance(reason, KeyboardInterrupt) for reason in _reasons(error)):
                interruption = KeyboardInterrupt()
                interruption.add_note(
                    f"the checkpoint {final.name} was not finished and is removed; --resume goes on from "
                    "the one before it."
                )
                raise interruption from None
            raise TrainingError(
                f"the checkpoint {final} could not be written: {_refusal(error, part)}; free some space or "
                "give another --out, and resume: the checkpoints before it are whole"
            ) from error

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)


def _reasons(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from; torch carries those of every rank within one of its own."""
    while error is not None:
        yield error
        for failure, _ in error.failures.values() if isinstance(error, dcp.CheckpointException) else ():
            yield from _reasons(failure)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def _refusal(error: BaseException, folder: Path) -> str:
    """Why a disk refused: torch says of a full one that a position is another than it expected."""
    refused = next((reason for reason in _reasons(error) if isinstance(reason, OSError)), None)
    with suppress(OSError):
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        if shutil.disk_usage(nearest).free < _NO_SPACE:
            return "no space left on the device"
    return _reason(error) if refused is None else refused.strerror or str(refused)


def _synchronise(folder: Path) -> None:
    """Make the files durable before the rename that declares them complete."""
    for entry in folder.iterdir():
        with entry.open("rb") as file:
            os.fsync(file.fileno())
