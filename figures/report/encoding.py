"""Numbers and text on their way into a page: small, and never taken for markup or for code."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
from markupsafe import Markup

__all__ = ["compacted", "factored", "packed", "packed_log", "script_json"]

_DIGITS = 5
"""Significant digits of the numbers in figures: more than a screen shows."""


def script_json(value: Any) -> Markup:
    """JSON for a ``<script>`` element: ``<``, ``>`` and ``&`` are written so that no tag can end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def packed(values: np.ndarray) -> dict[str, Any]:
    """An array as base64: whole numbers below 65,536 of an integer type take two bytes, all else four."""
    whole = values.dtype.kind in "iu"
    kind = "<u2" if whole else "<f4"
    data = np.ascontiguousarray(values, dtype=kind).tobytes()
    return {"shape": list(values.shape), "kind": kind[1:], "data": base64.b64encode(data).decode("ascii")}


def packed_log(values: np.ndarray, low: float = 1e-3) -> dict[str, Any]:
    """Positive numbers in two bytes each, evenly spaced in the logarithm (to 0.02% over six decades).

    What is below ``low`` becomes ``low``; NaN and infinity have a code of their own.
    """
    finite = np.isfinite(values)
    high = max(float(values[finite].max(initial=low)), low * 10)
    # log(x / low) / log(high / low), in [0, 1]
    place = np.log(np.clip(np.where(finite, values, low), low, high) / low) / math.log(high / low)
    codes = np.where(finite, np.round(place * 65534), 65535).astype(np.uint16)
    return packed(codes) | {"kind": "log", "low": low, "high": high}


def compacted(value: Any) -> Any:
    """A plotly figure's dictionary with rounded numbers, and NaN as None."""
    if isinstance(value, dict):
        return {key: compacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compacted(item) for item in value]
    if isinstance(value, np.ndarray):
        return compacted(value.tolist())
    if isinstance(value, np.generic):
        return compacted(value.item())
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        # Steps and channels are whole numbers, and stay what they are.
        rounded = value if value.is_integer() else float(f"{value:.{_DIGITS}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return value


def factored(texts: Any) -> Any:
    """The texts of a map's cells as those of its rows and columns, if each is one and then the other.

    Cells are long, and there are as many as rows times columns. What is no such table is given back as it is.
    """
    if not isinstance(texts, list) or not texts or not all(isinstance(row, list) and row for row in texts):
        return texts
    parts = [[str(cell).partition("<br>") for cell in row] for row in texts]
    rows, columns = [row[0][0] for row in parts], [cell[2] for cell in parts[0]]
    same = all(
        len(row) == len(columns) and cell[0] == first and cell[2] == column
        for row, first in zip(parts, rows, strict=True)
        for cell, column in zip(row, columns, strict=False)
    )
    return {"rows": rows, "columns": columns} if same else texts
