"""Files that may come from a stranger: only plain ones are opened, no link is followed, none is waited for.

A run or a checkpoint can be sent with a link to ``/dev/zero`` or a pipe in place of a chunk. Everything that
reads or replaces files inside such a folder opens them here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["first_special", "open_plain", "read_plain"]

_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises
    ------
    FileNotFoundError : there is none
    OSError : it is a link, a pipe, a device or a folder, which ``strerror`` says
    """
    try:
        file = os.open(path, os.O_RDONLY | _NO_LINK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(errno.ELOOP, "is a link, which is not followed", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is no plain file", str(path))
    return os.fdopen(file, "rb")


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a file, of which there may be ``most``; raises as :func:`open_plain`."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(
                errno.EFBIG, f"has {size:,} bytes, and at most {most:,} are read of such a file", str(path)
            )
        return file.read()


def first_special(folder: Path) -> Path | None:
    """The first entry below ``folder`` that is neither a plain file nor a folder; no link is followed."""
    return next(_special_below(str(folder)), None)


def _special_below(folder: str) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _special_below(entry.path)
            elif not entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
