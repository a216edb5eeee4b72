"""The bytes of a run: Zarr v3 arrays, groups and consolidated metadata, as the specification has them.

Runs are *read* by zarr and xarray like any other Zarr v3 hierarchy. They are *written* here, because
crash consistency rests on the order of writes: chunks first, then the root's consolidated metadata in
one atomic replacement. zarr-python gives no hold on that order, and takes about a millisecond per
array and operation where a probed step writes thousands of small arrays.

The subset used: regular chunks, chunk keys ``c.0.0`` in the array's own folder (fewer folders than
``c/0/0``), little-endian bytes (``vlen-utf8`` for text), then zstd with its checksum on, so that a
torn chunk is an error and never a silent wrong number.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd

from osp_diag.errors import StoreError
from osp_diag.plain_files import read_plain
from osp_diag.runs.chunks import check_presence, check_texts, decompressed
from osp_diag.runs.nodes import MOST_CHUNK_BYTES, NUMBERS

__all__ = [
    "PARTIAL",
    "ArrayLayout",
    "compact",
    "group_metadata",
    "jsonable",
    "replace_file",
    "root_document",
]

METADATA = "zarr.json"
PARTIAL = ".partial"
"""Ending of files that are being written; whatever carries it after a crash is rubbish."""

_COMPRESSION = {"level": 1, "checksum": True}


def jsonable(value: Any, where: str = "attributes") -> Any:
    """``value`` as plain JSON: NumPy scalars and arrays unwrapped, sets sorted, paths and dates as text.

    JSON has no NaN or infinity: they become the strings "NaN", "Infinity" and "-Infinity", as in
    Zarr's own fill values. Raises :class:`StoreError` that names the entry otherwise.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        return jsonable(value.tolist(), where)
    if isinstance(value, Enum):
        return jsonable(value.value, where)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Set):
        return [jsonable(item, where) for item in sorted(value, key=str)]
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [jsonable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise StoreError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be written as "
        "JSON; convert it to text, a number, a list or a dictionary"
    )


def compact(metadata: Mapping[str, Any]) -> str:
    """Metadata as JSON text without spaces: a thousand of them are in the file that every commit writes."""
    return json.dumps(metadata, separators=(",", ":"), allow_nan=False)


def replace_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Put ``data`` at ``path`` so that a reader, or a crash, sees the old file or the new one, whole.

    ``durable`` also waits until the file is on the device, for the one file that commits others.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _made_anew(partial) as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # Some network file systems cannot sync a folder; the file itself is safe by now.
            with suppress(OSError):
                os.fsync(folder)
        finally:
            os.close(folder)


def _made_anew(path: Path) -> BinaryIO:
    """A new file at ``path``; what was left there, by a crash or a stranger as a link, is removed first."""
    try:
        return open(path, "xb")
    except FileExistsError:
        path.unlink()
        return open(path, "xb")


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Zarr v3 metadata of a group; ``attributes`` are JSON already."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def root_document(attributes: Mapping[str, Any], nodes: Mapping[str, str]) -> bytes:
    """The root's ``zarr.json`` with the metadata of all ``nodes`` (path → JSON text) consolidated in it."""
    # Sorted, because zarr-python takes the members of one group to stand side by side.
    members = ",".join(f"{json.dumps(path)}:{nodes[path]}" for path in sorted(nodes))
    head = compact(group_metadata(attributes))
    consolidated = f'{{"kind":"inline","must_understand":false,"metadata":{{{members}}}}}'
    return f'{head[:-1]},"consolidated_metadata":{consolidated}}}'.encode()


@dataclass(frozen=True, eq=False)
class ArrayLayout:
    """How one array lies on disk: everything in its metadata except the shape, which grows."""

    dims: tuple[str, ...]
    dtype: str
    """A NumPy name such as "float32", or "string"."""
    chunk: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fill(self) -> Any:
        """What unwritten elements read as: NaN for floats, so that a gap cannot pass for a number."""
        if self.dtype == "string":
            return ""
        return np.nan if self.dtype.startswith("float") else np.dtype(self.dtype).type(0)

    @property
    def memory_dtype(self) -> np.dtype:
        return np.dtype(object) if self.dtype == "string" else np.dtype(self.dtype)

    def metadata(self, shape: Sequence[int]) -> dict[str, Any]:
        """The array's ``zarr.json`` at this shape."""
        text = self.dtype == "string"
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN" if self.dtype.startswith("float") else _plain(self.fill),
            "codecs": [
                {"name": "vlen-utf8"} if text else {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": _COMPRESSION},
            ],
            "attributes": dict(self.attributes),
            "dimension_names": list(self.dims),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> ArrayLayout:
        """The layout of an array written by :meth:`metadata`; anything else is refused."""
        try:
            layout = cls(
                tuple(metadata["dimension_names"]),
                metadata["data_type"],
                tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
                metadata["attributes"],
            )
            matches = layout.metadata(metadata["shape"]) == dict(metadata)
        except (KeyError, TypeError, ValueError):
            matches = False
        if not matches:
            raise StoreError(
                f"array {where} is not laid out as osp_diag writes it (was the run copied by another "
                "tool?); it can be read, but to append to it start a new run"
            )
        return layout

    @classmethod
    def of(
        cls, values: np.ndarray, dims: tuple[str, ...], attributes: Mapping[str, Any], where: str
    ) -> ArrayLayout:
        """A layout for ``values`` with one chunk that covers them; refuses types that runs do not hold."""
        if values.dtype.kind in "UT" or (
            values.dtype.kind == "O" and all(isinstance(v, str) for v in values.flat)
        ):
            dtype = "string"
        elif values.dtype.name in NUMBERS:
            dtype = values.dtype.name
        else:
            raise StoreError(
                f"variable {where} has type {values.dtype}, which a run cannot hold; convert it to one of "
                f"{', '.join(NUMBERS)} or text"
            )
        return cls(dims, dtype, tuple(max(1, size) for size in values.shape), attributes)

    @staticmethod
    def chunk_name(index: Sequence[int]) -> str:
        return ".".join(["c", *map(str, index)])

    def chunk_path(self, folder: Path, index: Sequence[int]) -> Path:
        return folder / self.chunk_name(index)

    def empty_chunk(self) -> np.ndarray:
        return np.full(self.chunk, self.fill, dtype=self.memory_dtype)

    def encode(self, block: np.ndarray) -> bytes:
        """One chunk as bytes; ``block`` may be smaller than the chunk (at the edge of the array)."""
        if block.shape != self.chunk:
            padded = self.empty_chunk()
            padded[tuple(map(slice, block.shape))] = block
            block = padded
        if self.dtype == "string":
            raw = VLenUTF8().encode(block.astype(object).ravel())
        else:
            kind = self.memory_dtype.newbyteorder("<")
            raw = np.ascontiguousarray(block, dtype=kind).tobytes()
        return Zstd(**_COMPRESSION).encode(raw)

    def decode(self, data: bytes, where: str) -> np.ndarray:
        """The chunk back from its bytes; its size and checksum are verified."""
        count = math.prod(self.chunk)
        text = self.dtype == "string"
        raw = decompressed(data, None if text else count * self.memory_dtype.itemsize, where)
        if not text:
            flat = np.frombuffer(raw, self.memory_dtype.newbyteorder("<"))
            return flat.astype(self.memory_dtype).reshape(self.chunk)
        check_texts(raw, count, where)
        try:
            return VLenUTF8().decode(raw).reshape(self.chunk)
        except ValueError as error:
            raise StoreError(f"chunk {where} is damaged ({error}); restore the run from a copy") from error

    def write_all(self, folder: Path, values: np.ndarray) -> None:
        """Write every chunk of a static array."""
        counts = [math.ceil(size / width) for size, width in zip(values.shape, self.chunk, strict=True)]
        for index in np.ndindex(*counts):
            corner = tuple(slice(i * w, (i + 1) * w) for i, w in zip(index, self.chunk, strict=True))
            replace_file(self.chunk_path(folder, index), self.encode(values[corner]))

    def read_all(self, folder: Path, shape: Sequence[int]) -> np.ndarray:
        """Every element of the array at this shape; a chunk that is not there is an error."""
        declared = math.prod(shape) * self.memory_dtype.itemsize
        check_presence(declared, lambda: sum(entry.stat().st_size for entry in os.scandir(folder)), folder)
        values = np.full(tuple(shape), self.fill, dtype=self.memory_dtype)
        counts = [math.ceil(size / width) for size, width in zip(shape, self.chunk, strict=True)]
        for index in np.ndindex(*counts):
            block = self.read_chunk(folder, index)
            if block is None:
                raise StoreError(
                    f"chunk {self.chunk_path(folder, index)} is missing; restore the run from a copy"
                )
            corner = tuple(slice(i * w, (i + 1) * w) for i, w in zip(index, self.chunk, strict=True))
            values[corner] = block[tuple(map(slice, values[corner].shape))]
        return values

    def read_chunk(self, folder: Path, index: Sequence[int]) -> np.ndarray | None:
        """One chunk; None if it is not there."""
        path = self.chunk_path(folder, index)
        try:
            return self.decode(read_plain(path, MOST_CHUNK_BYTES), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"chunk {path} cannot be read ({error.strerror or error}); restore the run from a copy"
            ) from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
