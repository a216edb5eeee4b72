"""Putting a new run in the place of another one, so that at every moment one of them is there, whole."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from osp_diag.errors import StoreError
from osp_diag.runs.folder import disk_reason, survey, sweep
from osp_diag.runs.format import PARTIAL
from osp_diag.runs.lock import WriterLock, writer_state

__all__ = ["replacement"]


@contextmanager
def replacement(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside ``path`` to write a run into, which takes its place when the block ends.

    If the block raises, nothing but that folder is removed. What a killed process left beside ``path`` is
    removed too. Files in the old run that are none of a run stay where they are.

    Raises
    ------
    StoreError : something may not be replaced, another process writes it, or the disk refuses
    """
    existed = survey(path, resume=False, overwrite=overwrite)
    beside = path.absolute().with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(path)
        yield beside
        _put_in_place(beside, path)
    except (OSError, StoreError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        reason, advice = disk_reason(cause)
        left = "the run that is there is as it was" if existed else "nothing of it is left there"
        raise StoreError(f"cannot write run {path}: {reason}; {left}. {advice}, and do it again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _clear_away(path: Path) -> None:
    for left in path.absolute().parent.glob(f".{_escaped(path.name)}.*{PARTIAL}"):
        if left.is_dir() and not left.is_symlink() and writer_state(left) != "writing":
            shutil.rmtree(left, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _put_in_place(beside: Path, path: Path) -> None:
    if not path.exists():
        os.rename(beside, path)
        return
    lock = WriterLock(path)
    lock.acquire()
    try:
        exchange(beside, path)
        lock.path = beside / lock.path.name  # which went with its folder
    finally:
        lock.release()
    # Beside is the old run now.
    sweep(beside, lambda node, name: False)
    for folder, _, names in os.walk(beside):
        for name in names:
            target = path / os.path.relpath(folder, beside) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(os.path.join(folder, name), target)


def exchange(one: Path, other: Path) -> None:
    """Let two folders change places in one operation; where the system has none, in three renames."""
    swap = _system_call()
    if swap is not None and swap(os.fsencode(one), os.fsencode(other)) == 0:
        return
    code = ctypes.get_errno()
    if swap is not None and code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(other))
    away = one.with_name(f"{one.name}.replaced")
    os.rename(other, away)
    os.rename(one, other)
    os.rename(away, one)


def _system_call():  # type: ignore[no-untyped-def]
    """Linux' ``renameat2`` or macOS' ``renamex_np``, of two paths; None on other systems."""
    library = ctypes.CDLL(None, use_errno=True)
    at_working_directory, exchanging, swapping = -100, 2, 2
    if hasattr(library, "renameat2"):
        call = library.renameat2
        return lambda one, other: call(at_working_directory, one, at_working_directory, other, exchanging)
    if hasattr(library, "renamex_np"):
        return lambda one, other: library.renamex_np(one, other, swapping)
    return None
