"""The weight files of a directory: which there are, and whether they are whole, before any is loaded."""

from __future__ import annotations

import operator
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp_diag.checkpoints.foreign_formats import foreign_format
from osp_diag.errors import CheckpointError
from osp_diag.json_text import parse_object

__all__ = [
    "WeightFiles",
    "check_pickle",
    "check_safetensors",
    "find_weights",
    "folder_of_weights",
    "read_json",
]

SINGLE = ("model.safetensors", "pytorch_model.bin")
LFS_POINTER = b"version https://git-lfs"
MOST_JSON = 64 * 2**20
LONGEST_HEADER = 100_000_000
"""safetensors itself refuses longer headers."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights; ``safe`` if they are safetensors and not pickles."""

    paths: tuple[Path, ...]
    safe: bool


def find_weights(directory: Path) -> WeightFiles:
    """The weights that will be loaded from a directory, known to be whole; safetensors before pickles.

    Raises
    ------
    CheckpointError
        There are none, a shard is missing, or a file is truncated.
    """
    # As transformers chooses: safetensors first, one file before an index of shards.
    for name in SINGLE:
        safe = name.endswith(".safetensors")
        check = check_safetensors if safe else check_pickle
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            check(directory / name)
            return WeightFiles((directory / name,), safe)
        if index.is_file():
            shards = _shards(index)
            for shard in shards:
                check(shard)
            return WeightFiles(shards, safe)
    foreign = foreign_format(directory)
    if foreign:
        raise CheckpointError(f"{directory} has no weights that can be read: {foreign}")
    files = sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack")
    )
    if len(files) > 1 and all("-of-" in name for name in files):
        advice = (
            f"; there are shards such as {files[0]}, but no index: model.safetensors.index.json is missing"
        )
    elif files:
        advice = f"; there is {', '.join(files[:5])}: pass that file itself, or rename it"
    else:
        advice = "; was it copied whole?"
    raise CheckpointError(
        f"{directory} has no weights: no model.safetensors and no pytorch_model.bin{advice}"
    )


def folder_of_weights(directory: Path) -> Path:
    """Where weights lie: in the directory, or in the folder that DeepSpeed's script names like a file."""
    inside = [directory / name for name in SINGLE if (directory / name).is_dir()]
    return inside[0] if inside else directory


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose data are all there."""
    # The format: 8 bytes of length (little-endian), a JSON header, then the data, from whose start the
    # header's offsets count.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _refuse_pointer(path, start + file.read(16))
        file.seek(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else 8
        if length > LONGEST_HEADER:
            raise CheckpointError(f"{path} is not a safetensors file: its first bytes announce no header")
        header_bytes = file.read(length)
    if len(header_bytes) < length:
        raise CheckpointError(f"{path} is truncated: it ends inside its header, at {size:,} bytes. {_AGAIN}")
    try:
        header = parse_object(header_bytes)
        end = max(
            (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
        )
        expected = 8 + length + operator.index(end)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(
            f"{path} is not a safetensors file: its header cannot be read. {_AGAIN}"
        ) from None
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: its header promises {expected:,} bytes, and it has {size:,}. {_AGAIN}"
        )
    return header


_AGAIN = "Copy or download it again"


def check_pickle(path: Path) -> None:
    """Refuse a pickle that is not whole; whether it is harmless shows when torch reads it."""
    with path.open("rb") as file:
        start = file.read(24)
    _refuse_pointer(path, start)
    # torch has written zip archives since 1.6, and a bare pickle (which opens with 0x80) before.
    if not zipfile.is_zipfile(path) and not start.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is truncated or not a PyTorch file: it is neither a whole zip archive nor a pickle. "
            f"{_AGAIN}"
        )
    if zipfile.is_zipfile(path):
        _check_archive(path)


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that would unpack to more than it has: torch compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged: its archive cannot be read ({error}). {_AGAIN}") from error
    if unpacked > path.stat().st_size:
        raise CheckpointError(
            f"{path} is no file that torch wrote: it would unpack to {unpacked:,} bytes. {_AGAIN}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file."""
    try:
        size = path.stat().st_size
        if size > MOST_JSON:
            raise CheckpointError(f"{path} has {size:,} bytes, and no configuration has so many. {_AGAIN}")
        return parse_object(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}. {_AGAIN}") from error


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, so the shards are not known. {_AGAIN}")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} names a shard by what is no name. {_AGAIN}")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or not name.isprintable()]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is no file beside it. {_AGAIN}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of {len(names)} shards: {', '.join(absent[:5])}"
            f"{', …' if len(absent) > 5 else ''} named in {index.name}. Copy or download the rest"
        )
    return tuple(index.parent / name for name in names)


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(LFS_POINTER[: len(start)]) and start:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its repository"
        )
