"""The files of a run as zarr reads them: each chunk is checked, and named if it is wrong, beforehand."""

from __future__ import annotations

import json
import math
import os
import threading
import zipfile
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.vlen import VLenUTF8
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from osp_diag.errors import StoreError
from osp_diag.json_text import parse_object
from osp_diag.plain_files import read_plain
from osp_diag.runs.chunks import check_presence, check_texts, decompressed, is_lost
from osp_diag.runs.folder import DAMAGED_ZIP
from osp_diag.runs.format import METADATA, ArrayLayout
from osp_diag.runs.nodes import MOST_CHUNK_BYTES, chunk_bytes, item_bytes
from osp_diag.runs.packed import MOST_RATIO, MOST_UNPACKED
from osp_diag.schema import LOGGED_STEP, SERIES, STEP

__all__ = ["FolderFiles", "PackedFiles", "RunStore"]

MOST_FILE_BYTES = MOST_CHUNK_BYTES + 2**20


class FolderFiles:
    """The files in the folder of a run; no link is followed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, key: str) -> bytes | None:
        """The bytes of a file; None if there is none."""
        try:
            return read_plain(self.path / key, MOST_FILE_BYTES)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreError(
                f"{self.path / key} cannot be read ({error.strerror}); restore the run from a copy"
            ) from error

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return os.path.lexists(self.path / key)

    def check_folders(self, nodes: Iterable[str]) -> None:
        """Refuse groups and arrays whose folder is a link, which leads out of the run."""
        for node in nodes:
            if (self.path / node).is_symlink():
                raise StoreError(
                    f"{self.path / node} is a link, which is not followed; restore the run from a copy"
                )

    def size_below(self, node: str) -> int:
        """Bytes of the files of an array."""
        total = 0
        for folder, _, names in os.walk(self.path / node):
            total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
        return total


class PackedFiles:
    """The files in a packed run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.path)
        return self._archive

    def read(self, key: str) -> bytes | None:
        """The bytes of an entry; None if there is none."""
        with self._lock:
            try:
                archive = self._open()
                entry = archive.getinfo(key)
                if entry.file_size > min(MOST_FILE_BYTES, MOST_UNPACKED + MOST_RATIO * entry.compress_size):
                    raise StoreError(
                        f"{self.path} is damaged: {key} declares {entry.file_size:,} bytes and has "
                        f"{entry.compress_size:,}; restore it from a copy"
                    )
                return archive.read(entry)
            except KeyError:
                return None
            except (OSError, *DAMAGED_ZIP) as error:
                raise StoreError(
                    f"{self.path} is damaged ({key}: {error}); restore it from a copy"
                ) from error

    def exists(self, key: str) -> bool:
        """Whether there is such an entry."""
        with self._lock:
            return key in self._open().NameToInfo

    def check_folders(self, nodes: Iterable[str]) -> None:
        """There are no links in a zip that is read without unpacking it."""

    def size_below(self, node: str) -> int:
        """Bytes of the entries of an array."""
        with self._lock:
            entries = self._open().infolist()
        return sum(entry.compress_size for entry in entries if entry.filename.startswith(f"{node}/"))


class RunStore(Store):
    """A run as a Zarr store that is read only.

    Parameters
    ----------
    files : where it is
    root : its metadata, checked by :func:`osp_diag.runs.nodes.check_nodes`

    Raises
    ------
    StoreError : an array declares far more than there is, here; a chunk is damaged or lost, when it is read
    """

    def __init__(self, files: FolderFiles | PackedFiles, root: Mapping[str, Any]) -> None:
        super().__init__(read_only=True)
        self.files, self.root = files, json.dumps(root).encode()
        nodes = root["consolidated_metadata"]["metadata"]
        files.check_folders(nodes)
        self.arrays = {path: entry for path, entry in nodes.items() if entry["node_type"] == "array"}
        for path, entry in self.arrays.items():
            declared = math.prod(entry["shape"]) * (item_bytes(entry) or 0)
            check_presence(declared, lambda path=path: files.size_below(path), self._named(path))  # type: ignore[misc]

    def _named(self, key: str) -> str:
        return str(self.files.path / key)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        data = self._read(key)
        return None if data is None else prototype.buffer.from_bytes(_part(data, byte_range))

    def _read(self, key: str) -> bytes | None:
        if key == METADATA:  # what was checked, and not what may lie there by now
            return self.root
        data = self.files.read(key)
        path, _, _ = key.partition("/c/") if "/c/" in key else key.rpartition("/c")
        entry = self.arrays.get(path)
        if entry is not None and not key.endswith(METADATA):
            if data is None:
                self._check_lost(path, entry, key)
            else:
                self._check(data, entry, self._named(key))
        return data

    def damage(self) -> dict[str, str]:
        """Array → what is wrong with its metadata or a chunk, damaged or lost; every chunk is read."""
        problems = {}
        for path, entry in self.arrays.items():
            if self._is_described_otherwise(path, entry):
                problems[path] = (
                    f"array {self._named(path)} is described in its own {METADATA} otherwise than in the "
                    "run's, so that one of them is damaged; restore the run from a copy"
                )
                continue
            width = entry["chunk_grid"]["configuration"]["chunk_shape"]
            counts = [math.ceil(size / step) for size, step in zip(entry["shape"], width, strict=True)]
            separator = entry["chunk_key_encoding"].get("configuration", {}).get("separator", "/")
            try:
                for index in np.ndindex(*counts):
                    self._read(f"{path}/{separator.join(['c', *map(str, index)])}")
            except StoreError as error:
                problems[path] = str(error)
        return problems

    def _is_described_otherwise(self, path: str, entry: Mapping[str, Any]) -> bool:
        """Whether the array's own metadata, which are written once, differ in more than the length."""
        own = self.files.read(f"{path}/{METADATA}")
        if own is None:
            return False
        try:
            described = parse_object(own)
        except ValueError:
            return True
        shapes = described.pop("shape", []), entry["shape"]
        growing = (entry.get("dimension_names") or [None])[0] in (STEP, LOGGED_STEP)
        return (
            described != {key: value for key, value in entry.items() if key != "shape"}
            or not isinstance(shapes[0], list)
            or shapes[0][growing:] != shapes[1][growing:]
        )

    def _check(self, data: bytes, entry: Mapping[str, Any], where: str) -> None:
        codecs = [codec["name"] if isinstance(codec, Mapping) else codec for codec in entry["codecs"]]
        is_text = "vlen-utf8" in codecs
        expected = None if is_text else chunk_bytes(entry)
        raw = decompressed(data, expected, where) if "zstd" in codecs else data
        if expected is not None and len(raw) != expected:
            raise StoreError(
                f"chunk {where} is damaged ({len(raw):,} bytes, not {expected:,}); restore the run from a "
                "copy"
            )
        if is_text:
            count = math.prod(entry["chunk_grid"]["configuration"]["chunk_shape"])
            check_texts(raw, count, where)
            try:
                VLenUTF8().decode(raw)
            except ValueError as error:
                raise StoreError(
                    f"chunk {where} is damaged ({error}); restore the run from a copy"
                ) from error

    def _check_lost(self, path: str, entry: Mapping[str, Any], key: str) -> None:
        """What zarr would make up is an error where the chunk was there once."""
        try:
            layout = ArrayLayout.from_metadata(entry, path)
            index = [int(part) for part in key.removeprefix(f"{path}/c").split(".")[1:]]
        except (StoreError, ValueError):
            return  # copied by another tool, which writes no chunk that has nothing in it
        counts = [math.ceil(size / width) for size, width in zip(entry["shape"], layout.chunk, strict=True)]
        growing = layout.dims[:1] in ((STEP,), (LOGGED_STEP,))
        growing = growing and path not in (STEP, f"{SERIES}/{LOGGED_STEP}")

        def exists(place: int) -> bool:
            return self.files.exists(f"{path}/{layout.chunk_name((place, *index[1:]))}")

        if is_lost(index, counts, growing, exists):
            raise StoreError(f"chunk {self._named(key)} is missing; restore the run from a copy")

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return self.files.exists(key)

    supports_writes = supports_deletes = False
    supports_partial_writes = False
    supports_listing = True

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        yield METADATA
        for path in self.arrays:
            yield f"{path}/{METADATA}"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        names = dict.fromkeys(
            [key.removeprefix(start).partition("/")[0] async for key in self.list_prefix(start)]
        )
        for name in names:
            yield name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunStore) and (type(self.files), self.files.path) == (
            type(other.files),
            other.files.path,
        )

    def __hash__(self) -> int:
        return hash(self.files.path)

    def __repr__(self) -> str:
        return f"RunStore({str(self.files.path)!r})"


def _part(data: bytes, byte_range: ByteRequest | None) -> bytes:
    if isinstance(byte_range, RangeByteRequest):
        return data[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return data[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return data[-byte_range.suffix :]
    return data
