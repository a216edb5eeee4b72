"""One writer per run: a lock that the kernel drops when its process dies, however it dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from osp_diag.errors import StoreError
from osp_diag.json_text import parse_object
from osp_diag.plain_files import open_plain

try:
    import fcntl
except ImportError:  # Windows has no POSIX record locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_NAME", "WriterLock", "WriterState", "writer_state"]

LOCK_NAME = ".writer.lock"

_own_locks: set[tuple[int, str]] = set()
"""(process id, lock file) of the locks of this process: record locks do not exclude their own process."""

WriterState = Literal["writing", "closed", "died", "unknown"]

_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class WriterLock:
    """A POSIX record lock on ``<run>/.writer.lock``.

    Record locks belong to one process and are not inherited by forked children, so a data-loading
    worker that outlives a killed trainer does not keep the run locked (docs/decisions.md, Runs). The file's
    content (process id, host, time) only serves messages; a file left by a dead process locks nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._file: int | None = None
        self._key = (os.getpid(), str(self.path.resolve()))

    def acquire(self) -> None:
        """Take the lock or raise :class:`StoreError` that names its holder."""
        if fcntl is None:
            raise StoreError(
                f"cannot write {self.path.parent}: this system has no POSIX file locks, without which two "
                "processes could spoil one run; write runs on Linux, macOS or WSL (reading works here)"
            )
        if self._key in _own_locks:
            raise StoreError(
                f"{self.path.parent} is already open for writing in this process; close that writer first"
            )
        while True:
            file = self._opened()
            try:
                self._lock(file)
                # A writer that closed in between has deleted the file that we locked: try its successor.
                if os.fstat(file).st_ino == os.stat(self.path).st_ino:
                    break
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(file)
                raise
            os.close(file)
        self._file = file
        _own_locks.add(self._key)
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(record).encode(), 0)

    def _opened(self) -> int:
        """The file, made if it is not there; never another one to which a name in the run leads."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
                raise
            raise self._foreign() from None
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(file)
            raise self._foreign()
        return file

    def _foreign(self) -> StoreError:
        return StoreError(
            f"cannot write {self.path.parent}: its {LOCK_NAME} is a link, or no plain file, and is not "
            "written to; remove it"
        )

    def _lock(self, file: int) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise StoreError(
                    f"{self.path.parent} is being written by {self._holder(file)}; wait for it, stop it, or "
                    "choose another path"
                ) from None
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"the file system of {self.path.parent} offers no file locks ({error.strerror}): make sure "
                "that no other process writes this run",
                stacklevel=4,
            )

    @staticmethod
    def _holder(file: int) -> str:
        try:
            record = parse_object(os.pread(file, 4096, 0))
            holder = f"process {record['pid']} on {record['host']} since {record['since']}"
            return holder if holder.isprintable() else "another process"
        except (ValueError, KeyError):
            return "another process"

    def release(self) -> None:
        """Give the lock back and remove its file. A forked child that calls this changes nothing."""
        if self._file is None or self._key[0] != os.getpid():
            return
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        _own_locks.discard(self._key)


def writer_state(folder: Path) -> WriterState:
    """What became of the writer of the run at ``folder``, without touching its lock.

    "writing": a living process holds the lock. "closed": the last one gave it back. "died": one left it
    behind. "unknown": the file system or this system has no such locks.
    """
    path = folder / LOCK_NAME
    # A record lock falls when its own process closes *any* descriptor of the file, so the writer's
    # process must not even open it.
    if (os.getpid(), str(path.resolve())) in _own_locks:
        return "writing"
    if not hasattr(os, "lockf"):
        return "unknown"
    try:
        opened = open_plain(path)
    except FileNotFoundError:
        return "closed"
    except OSError:
        return "unknown"
    try:
        file = opened.fileno()
        os.lockf(file, os.F_TEST, 0)
    except OSError as error:
        return "writing" if error.errno in (errno.EACCES, errno.EAGAIN) else "unknown"
    finally:
        opened.close()
    return "died"
