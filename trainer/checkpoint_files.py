"""Reading torch's distributed checkpoints without executing anything that is in them.

torch keeps what a checkpoint holds in ``.metadata``, a pickle, and unpickles entries that are no tensors; a
crafted one runs code. Here the pickle is taken apart into inert records. What it names beyond torch's own
types is refused, and those types are made of the records' numbers and names, each of them checked. All
entries are tensors.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from osp_diag.errors import TrainingError
from osp_diag.plain_files import open_plain, read_plain

__all__ = ["TensorReader", "read_metadata"]

METADATA = ".metadata"
MOST_BYTES = 64 * 2**20
"""Of metadata; a chunk of a tensor takes about 200."""
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")

_OF_METADATA = "torch.distributed.checkpoint.metadata"
RECORDS = {
    (_OF_METADATA, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}
"""Every name in the metadata that torch 2.11 to 2.13 write, data types aside."""
DTYPES = {
    name: value
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    )
    if isinstance(value := getattr(torch, name), torch.dtype)
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of a chunk of a tensor are."""

    file: str
    offset: int
    length: int


class _Record:
    """An object of a pickle that was not made: the arguments and the state that it would have got."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Makes :class:`_Record` of whatever the pickle names, and runs nothing.

    Python's own unpickler, since the one in C grows its memo to any index that a pickle asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) not in RECORDS:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint of osp-diag has and which would be run "
                "where a pickle is trusted; nothing of it was run. Do not use this checkpoint"
            )
        return type(name, (_Record,), {})


def read_metadata(folder: Path) -> Metadata:
    """What the checkpoint in ``folder`` holds: names, sizes and types of its tensors, and where they lie.

    Raises
    ------
    TrainingError : it cannot be read, is damaged, or is none of osp-diag's; nothing of it was executed
    """
    path = folder / METADATA
    try:
        record = _Unpickler(io.BytesIO(read_plain(path, MOST_BYTES))).load()
        return _metadata(record, folder)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise TrainingError(f"{path} is not read: {error}") from error
    except Exception as error:
        # Of a damaged pickle anything may come, TypeError to RecursionError.
        reason = str(error) or type(error).__name__
        raise TrainingError(f"{path} is damaged ({type(error).__name__}: {reason})") from error


def _metadata(record: Any, folder: Path) -> Metadata:
    state = _state(record, "Metadata")
    tensors = {_text(name): _tensor(entry, name) for name, entry in state["state_dict_metadata"].items()}
    sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in _data_files(folder)}
    entries = {}
    for key, value in state["storage_data"].items():
        index, where = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
        name = _text(index["fqn"])
        if where.get("transform_descriptors"):
            raise ValueError(f"{name} was transformed when it was saved")
        entry = _Entry(_text(where["relative_path"]), _count(where["offset"]), _count(where["length"]))
        if entry.file not in sizes:
            raise ValueError(f"{name} lies in {entry.file!r}, which is no file of this checkpoint")
        if entry.offset + entry.length > sizes[entry.file]:
            raise ValueError(f"{name} goes beyond the end of {entry.file}, which was cut short")
        entries[MetadataIndex(name, _size(index["offset"]))] = entry
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in entries:
                raise ValueError(f"a part of {name} lies nowhere")
    return Metadata(dict(tensors), storage_data=entries, storage_meta=StorageMeta())


def _data_files(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [e for e in entries if DATA_FILE.fullmatch(e.name) and e.is_file(follow_symlinks=False)]


def _state(record: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != kind or not isinstance(record.state, dict):
        raise ValueError(f"{type(record).__name__} stands where {kind} should")
    return record.state


def _tensor(record: Any, name: str) -> TensorStorageMetadata:
    state = _state(record, "TensorStorageMetadata")
    properties, size = state["properties"], _size(state["size"])
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no data type")
    chunks = []
    for part in state["chunks"]:
        chunk = _state(part, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])))
    corners = {tuple(chunk.offsets) for chunk in chunks}
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(size)
        and all(o + s <= whole for o, s, whole in zip(chunk.offsets, chunk.sizes, size, strict=True))
        for chunk in chunks
    )
    # What no chunk covers would silently stay what it was before loading.
    if not inside or len(corners) < len(chunks) or sum(map(_volume, chunks)) != math.prod(size):
        raise ValueError(f"the parts of {name} do not make up the whole")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _volume(chunk: ChunkStorageMetadata) -> int:
    return math.prod(chunk.sizes)


def _size(record: Any) -> torch.Size:
    if not isinstance(record, _Record) or type(record).__name__ != "Size":
        raise ValueError(f"{type(record).__name__} stands where a size should")
    return torch.Size([_count(size) for size in record.arguments[0]])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{type(value).__name__} stands where a count should, or one out of range")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{type(value).__name__} stands where a name should")
    return value


class TensorReader(StorageReader):
    """Reads the tensors of one checkpoint for :func:`torch.distributed.checkpoint.load`, and nothing else.

    Parameters
    ----------
    folder : of the checkpoint
    metadata : of :func:`read_metadata`
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.metadata = folder, metadata

    def reset(self, checkpoint_id: Any = None) -> None:
        """There is nothing to begin anew."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was read already."""
        return self.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any folder will do."""
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every chunk that the plan asks for into its place; its checksum is verified."""
        for item in sorted(plan.items, key=lambda item: self._entry(item).offset):
            entry, name = self._entry(item), item.storage_index.fqn
            with open_plain(self.folder / entry.file) as file:
                file.seek(entry.offset)
                saved = _saved_tensor(file.read(entry.length), f"{name} in {self.folder / entry.file}")
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                saved = saved.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.size() != saved.size():
                raise ValueError(f"{name} is saved as {tuple(saved.size())}, not {tuple(target.size())}")
            target.copy_(saved)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _entry(self, item: Any) -> _Entry:
        return self.metadata.storage_data[item.storage_index]


def _saved_tensor(data: bytes, where: str) -> torch.Tensor:
    """The tensor that ``torch.save`` wrote; its archive is not compressed, and its checksums fit."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            torn = "it is compressed" if packed else archive.testzip()
        if not torn:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            torn = "" if isinstance(tensor, torch.Tensor) else "it is no tensor"
    except Exception as error:
        raise ValueError(
            f"{where} is damaged: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if torn:
        raise ValueError(f"{where} is damaged ({torn})")
    return tensor
