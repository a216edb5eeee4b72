"""The folder of a run: recognising one, comparing two, and clearing away what was never committed."""

from __future__ import annotations

import errno
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from osp_diag.errors import StoreError
from osp_diag.json_text import parse_json
from osp_diag.plain_files import first_special, read_plain
from osp_diag.runs.format import METADATA, PARTIAL
from osp_diag.runs.lock import LOCK_NAME
from osp_diag.runs.naming import model_name
from osp_diag.runs.nodes import check_attributes, check_nodes

__all__ = [
    "DAMAGED_ZIP",
    "FORMAT_KEY",
    "FORMAT_VERSION",
    "PACKED_SUFFIX",
    "check_destination",
    "disk_errors",
    "disk_reason",
    "is_packed",
    "read_packed_root",
    "read_root",
    "survey",
    "sweep",
]

FORMAT_KEY = "osp_diag_run"
"""Root attribute by which a run is recognised; its value is the version of the format."""
FORMAT_VERSION = 1

PACKED_SUFFIX = ".zip"
"""By custom the end of a packed run's name, as in run.zarr.zip."""

DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What zipfile raises of a file that is broken, or of what it does not read."""

_MOST_METADATA = 64 * 2**20
"""Of the root, which has 0.8 MB for a default probe."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHUNK_NAME = re.compile(r"c(\.\d+)*")


def read_root(path: Path) -> dict[str, Any]:
    """The committed metadata of the run at ``path``; :class:`StoreError` if there is none to read."""
    if not path.exists():
        raise StoreError(f"no run at {path}: there is no such file or folder; check the path")
    if is_packed(path):
        raise StoreError(f"{path} is a packed run; {_unpack_command(path)}")
    if not path.is_dir():
        raise StoreError(
            f"{path} is a file; a run is a folder (by custom named *.zarr), or a file made by `osp-diag pack`"
        )
    try:
        text = read_plain(path / METADATA, _MOST_METADATA)
    except FileNotFoundError:
        raise StoreError(
            f"{path} is not a run: it has no {METADATA}; give the folder that `osp-diag probe --out` wrote"
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path / METADATA} cannot be read ({error.strerror or error}); restore the run from a copy"
        ) from error
    return _root_of(text, path)


def is_packed(path: Path) -> bool:
    """Whether ``path`` is a zip file, as :func:`osp_diag.runs.packed.pack` writes."""
    return path.is_file() and zipfile.is_zipfile(path)


def read_packed_root(path: Path) -> dict[str, Any]:
    """The metadata of the packed run ``path``; :class:`StoreError` if there is none to read."""
    if not path.exists():
        raise StoreError(f"no run at {path}: there is no such file or folder; check the path")
    if path.is_dir():
        raise StoreError(f"{path} is a folder and not a packed run")
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(METADATA).file_size
            if size > _MOST_METADATA:
                raise StoreError(
                    f"{path} is damaged: its {METADATA} declares {size:,} bytes, of which at most "
                    f"{_MOST_METADATA:,} are read; restore it from a copy"
                )
            text = archive.read(METADATA)
    except KeyError:
        raise StoreError(
            f"{path} is a zip file but no packed run: it has no {METADATA} at its top; give a file that "
            "`osp-diag pack` made"
        ) from None
    except zipfile.BadZipFile as error:
        raise StoreError(f"{path} is no packed run, or damaged ({error}); restore it from a copy") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror or error})") from error
    except (*DAMAGED_ZIP, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore it from a copy") from error
    return _root_of(text, path)


def _unpack_command(path: Path) -> str:
    folder = str(path).removesuffix(PACKED_SUFFIX)
    folder = folder if folder.endswith(".zarr") else f"{folder}.zarr"
    return f"unpack it first (osp-diag pack {path} --unpack --out {folder})"


def _root_of(text: bytes, path: Path) -> dict[str, Any]:
    """The root's metadata of the run at ``path``, checked."""
    try:
        root = parse_json(text)
    except ValueError as error:
        raise StoreError(f"{path / METADATA} is damaged ({error}); restore the run from a copy") from error
    attributes = root.get("attributes") if isinstance(root, dict) else None
    version = attributes.get(FORMAT_KEY) if isinstance(attributes, dict) else None
    if type(version) is not int or attributes is None or "consolidated_metadata" not in root:
        raise StoreError(
            f"{path} is a Zarr hierarchy but not a run of osp_diag (its root lacks {FORMAT_KEY!r}); "
            "open it with xarray.open_datatree"
        )
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} was written in run format {version}, newer than the {FORMAT_VERSION} known here; "
            "upgrade osp_diag"
        )
    check_attributes(attributes, path)
    members = root["consolidated_metadata"]
    check_nodes(members.get("metadata") if isinstance(members, dict) else None, path)
    return root


def survey(path: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether a run is at ``path``; :class:`StoreError` if a writer may not begin there."""
    if not path.exists():
        return False
    if is_packed(path):
        raise StoreError(f"cannot write to {path}: it is a packed run; {_unpack_command(path)}")
    if not path.is_dir():
        raise StoreError(f"cannot write a run to {path}: a file is there; choose another path")
    names = sorted(name for name in os.listdir(path) if name != LOCK_NAME and not name.endswith(PARTIAL))
    if not names:
        return False
    try:
        root = read_root(path)
        special = first_special(path)
    except StoreError as error:
        raise StoreError(
            f"cannot write a run to {path}: it holds {len(names)} entries ({', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}) and is no run that could be resumed or overwritten "
            f"({error}); choose another path"
        ) from None
    if special is not None:
        raise StoreError(
            f"cannot write to {path}: {special} is a link, or no plain file, through which files outside "
            "of the run could be written; remove it, or choose another path"
        )
    if not resume and not overwrite:
        raise StoreError(
            f"{path} already holds a run ({_describe(root)}); resume it (resume=True), replace it "
            "(overwrite=True) or choose another path"
        )
    return True


def check_destination(path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse, before long work, a path where a run cannot be written; creates and changes nothing."""
    target = Path(path)
    survey(target, resume=resume, overwrite=overwrite)
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise StoreError(f"cannot write a run to {target}: {existing} is a file; choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(f"cannot write a run to {target}: {existing} is not writable; choose another path")


def _describe(root: Mapping[str, Any]) -> str:
    attributes = root["attributes"]
    step = root["consolidated_metadata"]["metadata"].get("step", {})
    count = (step.get("shape") or [0])[0]
    model = model_name(attributes)
    return f"{model}, {count} step{'' if count == 1 else 's'}, created {attributes.get('created', 'unknown')}"


def sweep(path: Path, alive: Callable[[str, str], bool]) -> None:
    """Delete partial files, and those of nodes for which ``alive(node path, file name)`` is false.

    Only names that a run consists of are touched: a picture that someone put beside the arrays stays.
    """
    for folder, _, names in os.walk(path, topdown=False):
        node = os.path.relpath(folder, path).replace(os.sep, "/").removeprefix(".")
        for name in names:
            ours = name == METADATA or _CHUNK_NAME.fullmatch(name)
            if name.endswith(PARTIAL) or (ours and not alive(node, name)):
                os.unlink(os.path.join(folder, name))
        if node and not os.listdir(folder):
            os.rmdir(folder)


@contextmanager
def disk_errors(path: Path, settled: Sequence[int]) -> Iterator[None]:
    """Turn errors of the file system into a :class:`StoreError` that says what is safe."""
    try:
        yield
    except OSError as error:
        if settled and not os.path.lexists(path / METADATA):
            raise StoreError(
                f"cannot write run {path}: it was deleted or moved while it was written, and what was "
                "committed went with it; begin again, or move it back and open it with resume=True"
            ) from error
        safe = f"{len(settled)} committed step{'' if len(settled) == 1 else 's'}"
        if settled:
            safe += f" (the last is step {settled[-1]})"
        reason, advice = disk_reason(error)
        raise StoreError(
            f"cannot write run {path}: {reason}; its {safe} are safe. {advice}, then call flush() again, "
            "or open the run with resume=True"
        ) from error


def disk_reason(error: OSError) -> tuple[str, str]:
    """Why the file system refused, and what to do."""
    full = error.errno in _FULL
    reason = "no space left" if full else error.strerror or str(error)
    return f"{reason} ({error.filename or 'while writing'})", "Free space" if full else "Mend this"
