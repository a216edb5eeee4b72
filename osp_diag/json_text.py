"""JSON that may come from a stranger: whatever cannot be read is a :class:`ValueError` with a sentence."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json", "parse_object"]


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text; halves of surrogate pairs, which no file or terminal takes, become "?".

    Raises
    ------
    ValueError : it is not UTF-8, not JSON, nested too deep, or has a number of thousands of digits
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
        escapes = b"\\ud" if isinstance(text, bytes) else "\\ud"
        return _without_halves(value) if escapes in text.lower() else value  # type: ignore[operator]
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_object(text: bytes | str) -> dict[str, Any]:
    """The same, of which nothing but an object ({...}) is taken."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is {_kind(value)} and not an object")
    return value


def _without_halves(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_without_halves(item) for item in value]
    if isinstance(value, dict):
        return {_without_halves(key): _without_halves(item) for key, item in value.items()}
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
