"""What the metadata of a run may say: checked before zarr, or a loop of ours, acts on any of it.

A run may come from a stranger. Its root lists every group and array; here each name has to stay inside of the
run, each array has to be of the few kinds that a run consists of, and what an array declares is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from osp_diag.errors import StoreError
from osp_diag.schema import LOGGED_STEP, SEGMENTS, SERIES, STEP

__all__ = ["CODECS", "MOST_CHUNK_BYTES", "check_attributes", "check_nodes", "chunk_bytes", "item_bytes"]

NUMBERS = {
    "bool": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4,
    "uint64": 8, "float16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
"""Types of numbers that a run holds, with their bytes."""
TEXT = "string"
FIXED_TEXT = "fixed_length_utf32"
"""How zarr writes text of one length, in runs that were copied with it."""

CODECS = ("bytes", "vlen-utf8", "zstd")
"""How chunks may be encoded. None of them executes anything; others are refused before zarr looks them up."""

MOST_CHUNK_BYTES = 512 * 2**20
"""Of a chunk in memory. The largest of ours is one row, 97 MB for the vocabulary of an 80-layer model."""
_MOST_ELEMENTS = 2**48
_KINDS: Mapping[Any, tuple[str, ...]] = {
    str: (
        "model_name", "model_fingerprint", "architecture", "protocol", "token_source", "token_fingerprint",
        "created", "command", "device", "dtype", "training_data", "interrupted", "estimator", "units",
        "long_name", "definition", "coordinates",
    ),
    (int, float): ("number_of_layers", "hidden_size", "sequence_length", "tokens", "tokens_per_step"),
    Mapping: (
        "sites", "absent_sites", "config", "versions", "estimator_parameters",
        "later_estimators",
    ),
    list: ("estimators", "resumed", "notes"),
}  # fmt: skip
"""Attributes that are read by name, and what they are."""
_GROWING = {STEP: STEP, LOGGED_STEP: f"{SERIES}/{LOGGED_STEP}"}


def check_nodes(nodes: Any, where: object) -> None:
    """Refuse what no run says of its groups and arrays.

    Parameters
    ----------
    nodes : path in the run → metadata, as the root consolidates them
    where : the run, for messages

    Raises
    ------
    StoreError : naming the array or group
    """
    if not isinstance(nodes, Mapping):
        raise _refusal(where, "its list of groups and arrays", "is no object")
    for path, entry in nodes.items():
        problem = _name_problem(path) or _problem(entry)
        if problem:
            raise _refusal(where, f"its group or array {path!r}", problem)
        check_attributes(entry.get("attributes", {}), f"{where}/{path}")
    for path, entry in nodes.items():
        dims = entry.get("dimension_names") or (None,)
        labels = nodes.get(_GROWING.get(str(dims[0]), ""))
        if labels is not None and entry["shape"][0] != (labels["shape"] or [None])[0]:
            problem = f"has {entry['shape'][0]:,} rows, and {dims[0]!r} another number"
            raise _refusal(where, f"its array {path!r}", problem)
        parent = path.rpartition("/")[0]
        if parent and nodes.get(parent, {}).get("node_type") != "group":
            raise _refusal(where, f"its group or array {path!r}", f"lies in {parent!r}, which is no group")


def check_attributes(attributes: Mapping[str, Any], where: object) -> None:
    """Refuse attributes of a run, or of an array, that are of another kind than a probe writes.

    Raises
    ------
    StoreError : naming the attribute
    """
    for kinds, names in _KINDS.items():
        for name in names:
            value = attributes.get(name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise _refusal(where, f"its attribute {name!r}", f"is {_short(value)}")
    for name in ("estimators", "notes"):
        if not all(isinstance(item, str) for item in attributes.get(name) or ()):
            raise _refusal(where, f"its attribute {name!r}", "holds what is no text")
    for parameters in (attributes.get("later_estimators") or {}).values():
        if not isinstance(parameters, Mapping):
            raise _refusal(where, "its attribute 'later_estimators'", "holds what is no object")
    for item in attributes.get("resumed") or ():
        if not isinstance(item, Mapping):
            raise _refusal(where, "its attribute 'resumed'", "holds what is no object")
    for item in attributes.get(SEGMENTS) or ():
        whole = isinstance(item, Mapping) and isinstance(item.get("attributes"), Mapping)
        if not whole or type(item.get("after_step")) is not int:
            raise _refusal(where, f"its attribute {SEGMENTS!r}", "holds what is no segment")


def _refusal(where: object, what: str, problem: str) -> StoreError:
    return StoreError(f"the run at {where} is damaged: {what} {problem}; restore it from a copy")


def _name_problem(path: str) -> str:
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path:
        return "is no path within the run"
    return "" if path.isprintable() and len(path) < 1000 else "has a name with signs that no name has"


def _problem(entry: Any) -> str:
    """What is wrong with the metadata of a group or array; empty if nothing is."""
    if not isinstance(entry, Mapping) or entry.get("zarr_format") != 3:
        return "is not described as Zarr v3 does"
    if not isinstance(entry.get("attributes"), Mapping):
        return "has no attributes, or such as are no object"
    if entry.get("node_type") == "group":
        return "" if entry.get("consolidated_metadata") is None else "lists members of its own"
    if entry.get("node_type") != "array":
        return f"is of the kind {entry.get('node_type')!r}"
    return _array_problem(entry)


def _array_problem(entry: Mapping[str, Any]) -> str:
    shape, dims = entry.get("shape"), entry.get("dimension_names")
    if not _are_sizes(shape, least=0) or math.prod(shape) > _MOST_ELEMENTS:  # type: ignore[arg-type]
        return f"has the shape {_short(shape)}"
    if dims is not None and not (
        isinstance(dims, list) and len(dims) == len(shape) and all(isinstance(dim, str) for dim in dims)  # type: ignore[arg-type]
    ):
        return f"has the dimensions {_short(dims)}"
    if item_bytes(entry) is None:
        return f"has the type {_short(entry.get('data_type'))}, which a run cannot hold"
    codecs = entry.get("codecs")
    names = [
        codec.get("name") if isinstance(codec, Mapping) else codec
        for codec in (codecs if isinstance(codecs, list) and codecs else [None])
    ]
    foreign = [name for name in names if name not in CODECS]
    if foreign:
        return (
            f"is encoded by {_short(foreign[0])}, and nothing but {', '.join(CODECS)} "
            "is decoded: another codec may execute what is in the file"
        )
    if entry.get("storage_transformers"):
        return "has storage transformers"
    grid, keys = entry.get("chunk_grid"), entry.get("chunk_key_encoding")
    chunk = _configured(grid, "regular", "chunk_shape")
    if not _are_sizes(chunk, least=1) or len(chunk) != len(shape):  # type: ignore[arg-type]
        return f"has chunks of {_short(chunk)}"
    if _configured(keys, "default", "separator", "/") not in (".", "/"):
        return f"names its chunks by {_short(keys)}"
    if chunk_bytes(entry) > MOST_CHUNK_BYTES:
        return f"has chunks of {chunk_bytes(entry):,} bytes; at most {MOST_CHUNK_BYTES:,} are read"
    return ""


def item_bytes(entry: Mapping[str, Any]) -> int | None:
    """Bytes of an element in memory, 8 of a text of any length; None of a type that a run cannot hold."""
    kind = entry.get("data_type")
    if isinstance(kind, str):
        return 8 if kind == TEXT else NUMBERS.get(kind)
    length = _configured(kind, FIXED_TEXT, "length_bytes")
    return length if isinstance(length, int) and 0 < length <= 2**16 else None


def chunk_bytes(entry: Mapping[str, Any]) -> int:
    """Bytes of one chunk in memory."""
    return math.prod(entry["chunk_grid"]["configuration"]["chunk_shape"]) * (item_bytes(entry) or 0)


def _configured(value: Any, name: str, key: str, default: Any = None) -> Any:
    if not isinstance(value, Mapping) or value.get("name") != name:
        return None
    configuration = value.get("configuration", {})
    return configuration.get(key, default) if isinstance(configuration, Mapping) else None


def _are_sizes(value: Any, least: int) -> bool:
    return isinstance(value, list) and all(type(size) is int and least <= size < 2**48 for size in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
