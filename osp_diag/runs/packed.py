"""A run as one file: a zip of its folder, which :func:`osp_diag.open_run` reads as it reads the folder.

A run has two files for every array, thousands for one step. Packed it can be sent and kept as one. The
entries are stored as they are, since chunks are compressed already: a reader still reads only what it needs
(docs/decisions.md, Runs).
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from osp_diag.errors import StoreError
from osp_diag.runs.folder import DAMAGED_ZIP, PACKED_SUFFIX, is_packed, read_packed_root, read_root
from osp_diag.runs.format import METADATA, PARTIAL
from osp_diag.runs.lock import LOCK_NAME, writer_state

__all__ = ["MOST_RATIO", "MOST_UNPACKED", "pack", "unpack"]

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every entry: the same run gives the same file."""
_UNIX = 3
_ENCRYPTED = 0x1
MOST_UNPACKED, MOST_RATIO = 2**26, 20
"""What an entry may unpack to, in bytes and in multiples of its size: ours are compressed already."""


def pack(
    run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, overwrite: bool = False
) -> Path:
    """Write the run in the folder ``run`` as one file, and return its path. The folder stays as it is.

    The file is written beside its place and renamed, so that it is there whole or not at all.

    Parameters
    ----------
    out : the file; None for the run's name with ".zip" behind it
    overwrite : replace the file that is there

    Raises
    ------
    StoreError : there is no run, it is being written, it holds links, or ``out`` cannot be written
    """
    folder = Path(run)
    target = Path(f"{folder.absolute()}{PACKED_SUFFIX}" if out is None else out)
    if is_packed(folder):
        raise StoreError(f"{folder} is packed already; --unpack makes a folder of it")
    read_root(folder)
    _refuse_target(target, overwrite=overwrite)
    if folder.resolve() in target.resolve().parents:
        raise StoreError(f"cannot pack {folder} into itself; give an --out outside of it")
    _refuse_writer(folder)
    before = (folder / METADATA).read_bytes()
    names = _names(folder)
    with _beside(target) as (partial, settle):
        with open(partial, "xb") as file:
            _write_entries(file, folder, names)
            file.flush()
            os.fsync(file.fileno())
        _refuse_writer(folder)
        if (folder / METADATA).read_bytes() != before:
            raise StoreError(f"{folder} was written while it was being packed; pack it again")
        settle()
    return target


def _refuse_writer(folder: Path) -> None:
    if writer_state(folder) == "writing":
        raise StoreError(f"{folder} is being written, so it cannot be packed; wait for its writer or stop it")


def _refuse_target(target: Path, *, overwrite: bool) -> None:
    if target.is_dir():
        raise StoreError(f"cannot write {target}: a folder is there; choose another --out")
    if target.exists() and not overwrite:
        raise StoreError(f"{target} is there already; pass --overwrite to replace it, or another --out")
    if not target.absolute().parent.is_dir():
        raise StoreError(f"cannot write {target}: there is no folder {target.parent}; make it first")


def _names(folder: Path) -> list[str]:
    """The files of a run's folder, by their paths in it, the commit pointer first."""
    names = []
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(path, name)):
                raise StoreError(
                    f"{os.path.join(path, name)} is a link, which a packed run cannot hold; put the file "
                    "itself there"
                )
        subfolder = Path(path).relative_to(folder).as_posix()
        names += [
            name if subfolder == "." else f"{subfolder}/{name}"
            for name in files
            if name != LOCK_NAME and not name.endswith(PARTIAL)
        ]
    return sorted(names, key=lambda name: (name != METADATA, name))


def _write_entries(file: IO[bytes], folder: Path, names: list[str]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = _UNIX
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, (folder / name).read_bytes())


def unpack(file: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Make the folder of the packed run ``file`` again, every file to the byte, and return its path.

    Every entry is looked at before anything is written: what would leave the folder, a link, and sizes that
    are not those declared are refused. The folder is made beside its place and renamed.

    Parameters
    ----------
    out : the folder to make, which is not there yet; None for the file's name without ".zip"

    Raises
    ------
    StoreError : there is no packed run, it is damaged or unsafe, or ``out`` cannot be written
    """
    source = Path(file)
    read_packed_root(source)
    target = Path(str(source.absolute()).removesuffix(PACKED_SUFFIX) if out is None else out)
    if target.exists():
        raise StoreError(f"{target} is there already; give an --out that is not")
    if not target.absolute().parent.is_dir():
        raise StoreError(f"cannot write {target}: there is no folder {target.parent}; make it first")
    with _damage(source), zipfile.ZipFile(source) as archive:
        entries = _checked(archive, source)
        size = sum(entry.file_size for entry in entries)
        free = shutil.disk_usage(target.absolute().parent).free
        if size > free:
            raise StoreError(f"cannot unpack {source}: it needs {size:,} bytes, and {free:,} are free there")
        with _beside(target) as (partial, settle):
            partial.mkdir()
            for entry in entries:
                _extract(archive, entry, partial, source)
            settle()
    return target


def _checked(archive: zipfile.ZipFile, source: Path) -> list[zipfile.ZipInfo]:
    """The entries that are files; :class:`StoreError` if one of them is none that a run could have."""
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    names: set[str] = set()
    for entry in archive.infolist():
        problem = _problem(entry)
        if not problem and entry.filename in names:
            problem = "is there twice"
        if problem:
            raise StoreError(f"{source} is not unpacked: its entry {entry.filename!r} {problem}")
        names.add(entry.filename)
    above = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if conflicts := sorted(above.intersection(entry.filename for entry in entries)):
        raise StoreError(f"{source} is not unpacked: its entry {conflicts[0]!r} is a file and a folder")
    # Entries that overlap in the file would give many times its size.
    if sum(entry.compress_size for entry in entries) > source.stat().st_size:
        raise StoreError(f"{source} is not unpacked: its entries are larger than the file")
    return entries


def _problem(entry: zipfile.ZipInfo) -> str:
    """What is wrong with an entry by what the zip declares of it; empty if nothing is."""
    # orig_filename is what the zip has; zipfile cuts names at a null byte.
    name = entry.orig_filename
    parts = name.removesuffix("/").split("/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith("/") or "\\" in name or ":" in parts[0] or "\0" in name:
        return "is no path within the run"
    if any(part in ("", ".", "..") for part in parts):
        return "is no path within the run"
    if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        return "is a link or something else that is no plain file"
    if parts[-1] == LOCK_NAME or parts[-1].endswith(PARTIAL):
        return "is nothing that a packed run has"
    if entry.file_size > MOST_UNPACKED + MOST_RATIO * entry.compress_size:
        return f"is {entry.compress_size:,} bytes and would unpack to {entry.file_size:,}"
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        return f"is {entry.compress_size:,} bytes and declares {entry.file_size:,}"
    return ""


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, source: Path) -> None:
    path = folder / entry.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    # Reading checks the entry's checksum, and never gives more than it declares.
    with archive.open(entry) as packed, open(path, "xb") as file:
        shutil.copyfileobj(packed, file)
        size = file.tell()
    if size != entry.file_size:
        raise StoreError(f"{source} is damaged: {entry.filename} is {size:,} bytes, not {entry.file_size:,}")


@contextmanager
def _damage(source: Path) -> Iterator[None]:
    """Turn what zipfile says of a broken file into a :class:`StoreError`."""
    try:
        yield
    except DAMAGED_ZIP as error:
        raise StoreError(f"{source} is damaged ({error}); restore it from a copy") from error


@contextmanager
def _beside(target: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A path beside ``target`` to write to, and what puts it in its place; else nothing is left of it."""
    partial = target.absolute().with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial, lambda: os.replace(partial, target)
    except OSError as error:
        raise StoreError(
            f"cannot write {target}: {error.strerror or error} ({error.filename or 'while writing'}); "
            "nothing there was changed"
        ) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
