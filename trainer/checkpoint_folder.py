"""Writing checkpoints: sharded, in the background, committed by one rename, thinned out with age."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from osp_diag.errors import TrainingError
from osp_diag.probing.ranks import is_distributed, is_first_rank
from osp_diag.trainer.checkpoint import HOST_STATE, PART, complete_folders, delete, reason_of, step_of
from osp_diag.trainer.checkpoint_ladder import staying
from osp_diag.trainer.checkpoint_pins import read_pins, write_pins
from osp_diag.trainer.config import CheckpointConfig, TrainConfig
from osp_diag.trainer.config_values import as_recorded

__all__ = ["CheckpointFolder"]

_NO_SPACE = 2**20
_AND = "; and "
"""Between the reasons of a pin."""


class CheckpointFolder:
    """Writes checkpoints and deletes old ones.

    A checkpoint is written into ``step-N.part`` and renamed to ``step-N`` once every rank's tensors and the
    host's state are on disk; whatever kills the process, a folder named ``step-N`` is complete
    (docs/decisions.md, Training).

    Parameters
    ----------
    folder : of this run's checkpoints; made when needed
    config : how many to keep, and whether to write in the background

    Attributes
    ----------
    judged_step : of the last probe that was judged and whose findings were acted on; what is found later
        began after it, so the newest checkpoint up to it stays. None: nothing is judged

    Raises
    ------
    TrainingError : the folder's pins cannot be read
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.judged_step: int | None = None
        read_pins(folder)
        self._under_way: tuple[Future[Any], Callable[[], None], Path] | None = None
        # Collectives of a background thread must not mix with those of the training step.
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        if is_first_rank() and folder.is_dir():
            for part in folder.glob(f"step-*{PART}"):
                delete(part)

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        data: Mapping[str, Any],
        run_config: TrainConfig,
        *,
        function: Mapping[str, Any] | None = None,
        background: bool | None = None,
    ) -> None:
        """Save ``tensors`` (nested dictionaries of tensors, DTensors among them) and the host's state.

        Of that state is ``function``: which one the weights are of.

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
        host = {"step": step, "config": as_recorded(run_config), "data": dict(data)}
        if function is not None:
            host["function"] = dict(function)
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

    def pin(self, step: int, reason: str) -> int | None:
        """Keep the newest complete checkpoint at or before ``step`` for good, also when the run is resumed.

        Of one that is pinned already the reasons are kept, each once.

        One that is being written is not complete: :meth:`wait` first. The first rank alone writes.

        Returns
        -------
        int or None : the step of that checkpoint; None where there is none so early

        Raises
        ------
        TrainingError : the pins cannot be read or written
        """
        self.poll()
        at = self.newest_up_to(step)
        if at is not None and is_first_rank():
            pins = read_pins(self.folder)
            reasons = pins[at].split(_AND) if at in pins else []
            write_pins(self.folder, pins | {at: _AND.join(dict.fromkeys((*reasons, reason)))})
        return at

    def newest_up_to(self, step: int) -> int | None:
        """The step of the newest complete checkpoint at or before ``step``; None where there is none."""
        earlier = [one for one in map(step_of, complete_folders(self.folder)) if one <= step]
        return earlier[-1] if earlier else None

    def unpin(self, step: int) -> bool:
        """Let the checkpoint of exactly ``step`` go when its time comes; whether it was pinned.

        Raises
        ------
        TrainingError : the pins cannot be read or written
        """
        pins = read_pins(self.folder)
        was_pinned = pins.pop(step, None) is not None
        if was_pinned and is_first_rank():
            write_pins(self.folder, pins)
        return was_pinned

    @property
    def pins(self) -> dict[int, str]:
        """Step → why its checkpoint is pinned."""
        return read_pins(self.folder)

    def _commit(self, part: Path, final: Path) -> None:
        self._barrier()
        if is_first_rank():
            _synchronise(part)
            part.rename(final)
            self._thin_out()
        self._barrier()

    def _thin_out(self) -> None:
        """Delete what neither the last ones, nor the ladder, nor a pin keeps, nor a finding may ask for."""
        complete = {step_of(path): path for path in complete_folders(self.folder)}
        try:
            stay = staying(complete, self.config) | self.pins.keys()
        except TrainingError as error:  # a training of days does not end over this, nor does it delete a pin
            warnings.warn(f"no checkpoint is deleted: {error}", stacklevel=2)
            return
        if self.judged_step is not None:
            stay.add(max((step for step in complete if step <= self.judged_step), default=min(complete)))
        for step in complete.keys() - stay:
            delete(complete[step])

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
    return reason_of(error) if refused is None else refused.strerror or str(refused)


def _synchronise(folder: Path) -> None:
    """Make the files durable before the rename that declares them complete."""
    for entry in folder.iterdir():
        with entry.open("rb") as file:
            os.fsync(file.fileno())
