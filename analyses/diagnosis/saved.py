"""A diagnosis as a file of JSON, so that what checkpoints and replays said can be drawn later."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.analyses.diagnosis.plain import KINDS
from osp_diag.errors import UsageError
from osp_diag.json_text import parse_object

__all__ = ["read_diagnosis", "save_diagnosis"]


def save_diagnosis(diagnosis: Diagnosis, out: str | os.PathLike[str]) -> None:
    """Write a diagnosis as JSON.

    Raises
    ------
    UsageError : a file that cannot be written
    """
    text = json.dumps(diagnosis.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        Path(out).write_text(f"{text}\n", encoding="utf-8")
    except OSError as problem:
        raise UsageError(f"cannot write {out}: {problem.strerror or problem}; write elsewhere") from problem


def read_diagnosis(path: str | os.PathLike[str]) -> Diagnosis:
    """A diagnosis that :func:`save_diagnosis` wrote.

    Raises
    ------
    UsageError : it cannot be read, or is something else
    """
    advice = "give the file that `osp-diag diagnose RUN --out NAME.json` wrote"
    try:
        values = parse_object(Path(path).read_bytes())
        values = {key: value for key, value in values.items() if key not in ("confidences", "families")}
        made: Diagnosis = _made(Diagnosis, values, "the diagnosis")
        return made
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror or problem}; {advice}") from problem
    except (TypeError, ValueError) as problem:
        raise UsageError(f"{path} is no diagnosis: {problem}; {advice}") from problem


def _made(kind: Any, value: Any, where: str) -> Any:
    """The value as its annotation says; ValueError where it is something else."""
    origin, members = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in members:
            return None
        return _made(next(member for member in members if member is not type(None)), value, where)
    if origin is Literal:
        return _expected(value in members, value, where)
    if kind is xr.Dataset:
        return _dataset(_expected(isinstance(value, dict), value, where), where)
    if is_dataclass(kind):
        return _record(kind, _expected(isinstance(value, dict), value, where), where)
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        hints = list(get_type_hints(kind).values())
        _expected(isinstance(value, list) and len(value) == len(hints), value, where)
        return kind(*(_made(hint, entry, where) for hint, entry in zip(hints, value, strict=True)))
    if origin is tuple:
        _expected(isinstance(value, list), value, where)
        hints = [members[0]] * len(value) if members[-1] is Ellipsis else list(members)
        _expected(len(hints) == len(value), value, where)
        return tuple(_made(hint, entry, where) for hint, entry in zip(hints, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return dict(_expected(isinstance(value, dict), value, where))
    return _scalar(kind, value, where)


def _record(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    hints, entries = get_type_hints(kind), {}
    for field in fields(kind):
        required = field.default is MISSING and field.default_factory is MISSING
        if field.name in value:
            entries[field.name] = _made(hints[field.name], value[field.name], f"{field.name} of {where}")
        elif required:
            raise ValueError(f"{field.name} of {where} is missing")
    unknown = set(value) - set(hints)
    if unknown:
        raise ValueError(f"{where} has no {sorted(unknown)[0]!r}")
    return kind(**entries)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):
        return float(value)
    accepted = (int, float) if kind is float else kind
    _expected(isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)), value, where)
    return kind(value)


def _expected(is_so: bool, value: Any, where: str) -> Any:
    if not is_so:
        raise ValueError(f"{where} cannot be {str(value)[:60]!r}")
    return value


def _dataset(value: Mapping[str, Any], where: str) -> xr.Dataset:
    parts: dict[str, dict[str, Any]] = {}
    for group in ("coords", "data_vars"):
        variables = _expected(isinstance(value.get(group), dict), value.get(group), f"{group} of {where}")
        parts[group] = {name: _array(entry, f"{name} of {where}") for name, entry in variables.items()}
    return xr.Dataset(parts["data_vars"], parts["coords"], value.get("attrs"))


def _array(value: Any, where: str) -> tuple[list[str], np.ndarray, Any]:
    _expected(isinstance(value, dict) and isinstance(value.get("dims"), list), value, where)
    kinds = {kind.__name__: kind for kind in KINDS.values()}
    kind = kinds.get(value.get("type"))
    if kind is None:
        raise ValueError(f"the type of {where} cannot be {value.get('type')!r}")
    values = value.get("values")
    flat = _flat(values)
    array = np.array([_scalar(kind, entry, where) for entry in flat], dtype=None if kind is str else kind)
    return value["dims"], array.reshape(np.shape(values)), value.get("attrs") or {}


def _flat(values: Any) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return [values]
    return [entry for part in values for entry in _flat(part)]
