"""Nested configurations: checks that name the dotted key, changes by dotted key, and plain data."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from osp_diag import wording
from osp_diag.errors import UsageError
from osp_diag.wording import did_you_mean

__all__ = [
    "as_dictionary",
    "as_recorded",
    "check_at_least",
    "check_positive",
    "check_types",
    "differences",
    "with_changes",
]


# Checks. They name the dotted key, as a user writes it after --set.


def dotted(prefix: str, name: str) -> str:
    """``prefix.name``, or ``name`` alone at the root."""
    return f"{prefix}.{name}" if prefix else name


def check_at_least(config: Any, prefix: str, least: float, *names: str) -> None:
    """Refuse values below ``least``."""
    for name in names:
        if not getattr(config, name) >= least:
            raise UsageError(f"{dotted(prefix, name)}={getattr(config, name)}: give {least} or more")


def check_positive(config: Any, prefix: str, *names: str) -> None:
    """Refuse what is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{dotted(prefix, name)}={value}: give a finite number above 0")


def check_types(config: Any, prefix: str) -> None:
    """Refuse values that are not of their field's type."""
    hints = _hints(type(config))
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if not _fits(value, hints[entry.name]):
            raise UsageError(f"{dotted(prefix, entry.name)}={value!r}: give {_described(hints[entry.name])}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, member) for member in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple)
    if origin is dict:
        key, kind = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, kind) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_described(member) for member in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin is dict:
        return f"name:value pairs separated by commas, each value {_described(get_args(hint)[1])}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
        tuple: "values separated by commas",
    }
    return names.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


# Changes by dotted key


Config = TypeVar("Config")


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of ``config`` with values replaced by dotted key: ``{"optimizer.lr": "1e-3"}``.

    Values that are text are read as the field's type: numbers, ``true`` and ``false``, ``none``, and lists
    separated by commas (``name:value`` pairs for ``data.mixture`` and ``optimizer.route``). All keys are
    changed together, so that values which only fit one another may be given in any order.

    Raises
    ------
    UsageError : an unknown key (the message names the nearest), or a value that does not fit
    """
    return _changed(config, dict(changes), "")


def _changed(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    hints = _hints(type(config))
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, path = key.partition(".")
        full = dotted(prefix, key)
        if head not in hints or (path and not dataclasses.is_dataclass(hints[head])):
            suggestion = did_you_mean(full, as_dictionary(config, prefix))
            raise UsageError(f"there is no {full!r} in the configuration; {suggestion}")
        if path:
            nested.setdefault(head, {})[path] = value
        elif dataclasses.is_dataclass(hints[head]) and isinstance(value, str):
            raise UsageError(
                f"{full} is a group of values; set one of them, such as {full}.{_first_field(hints[head])}"
            )
        else:
            values[head] = _read(value, hints[head], full) if isinstance(value, str) else value
    for head, inner in nested.items():
        values[head] = _changed(getattr(config, head), inner, dotted(prefix, head))
    return dataclasses.replace(config, **values)


def _first_field(kind: Any) -> str:
    return dataclasses.fields(kind)[0].name


def _read(text: str, hint: Any, key: str) -> Any:
    """A value of the type ``hint`` from what a user typed."""
    origin = get_origin(hint)
    members = get_args(hint) if origin in (types.UnionType, typing.Union) else (hint,)
    if text.lower() in ("none", "null") and type(None) in members:
        return None
    for member in members:
        try:
            return _read_as(text, member)
        except ValueError:
            continue
    raise UsageError(f"{key}={text!r}: give {_described(hint)}")


def _read_as(text: str, hint: Any) -> Any:
    origin = get_origin(hint)
    if hint is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
            text.lower(), text
        )
    if hint is int:
        number = float(text.replace("_", ""))
        if not number.is_integer():
            raise ValueError(text)
        return int(number)
    if hint is float:
        return float(text)
    if origin is tuple:
        kind = get_args(hint)[0]
        return tuple(_read_as(part.strip(), kind) for part in text.split(",") if part.strip())
    if origin is dict:
        pairs = (part.rsplit(":", 1) for part in text.split(",") if part.strip())
        kind = get_args(hint)[1]
        return {name.strip(): _read_as(value.strip(), kind) for name, value in pairs}
    if hint is type(None):
        raise ValueError(text)
    return text


# To and from plain data


def as_dictionary(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value by dotted key, as plain data for JSON (tuples as lists)."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value, key = getattr(config, entry.name), dotted(prefix, entry.name)
        if dataclasses.is_dataclass(value):
            flat |= as_dictionary(value, key)
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


SECRETS = ("monitor.webhook",)
"""Keys whose values stand in no run and no checkpoint, which are sent to others."""


def as_recorded(config: Any) -> dict[str, Any]:
    """:func:`as_dictionary` without :data:`SECRETS`, which are None."""
    return as_dictionary(config) | dict.fromkeys(SECRETS)


def differences(before: Any, after: Any) -> list[str]:
    """``key: before → after`` for every value of a training's configuration that differs, but of secrets."""
    return wording.differences(as_recorded(before), as_recorded(after))
