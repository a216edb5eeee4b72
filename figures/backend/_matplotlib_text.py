"""Text in matplotlib: shown literally, measured before it is laid out, and kept in the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

__all__ = ["file_metadata", "fitting", "plain", "wrapped"]


@cache
def _glyphs(family: str) -> frozenset[int]:
    return frozenset(get_font(findfont(family)).get_charmap())


def plain(text: str) -> str:
    """Text to be shown as it is: no mathematics between dollars, a box where the font has no glyph."""
    known = _glyphs(mpl.rcParams["font.sans-serif"][0])
    shown = "".join(c if c == "\n" or ord(c) in known else "\u25a1" for c in text)
    return shown.replace("$", r"\$")


def fitting(labels: Sequence[str], room: float) -> int:
    """How many columns of a legend fit into ``room`` points."""
    size = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points()
    dressing = (mpl.rcParams["legend.handlelength"] + mpl.rcParams["legend.columnspacing"] + 0.6) * size
    widest = max((_width(label, size) for label in labels), default=0.0) + dressing
    total = sum(_width(label, size) + dressing for label in labels)
    return max(1, len(labels) if total <= room else int(room // widest))


def _width(text: str, size: float) -> float:
    """Points that a line of text takes."""
    font = FontProperties(family=mpl.rcParams["font.family"], size=size)
    return float(text_to_path.get_text_width_height_descent(text.replace("\\$", "$"), font, ismath=False)[0])


def wrapped(text: str, size: float, room: float) -> list[str]:
    """Lines of at most ``room`` points, measured in the font itself."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def file_metadata(suffix: str, said: Mapping[str, str]) -> dict[str, Any]:
    """Title and caption under the names of the format; no date, so that equal figures are equal files."""
    if suffix == ".pdf":
        return {
            "Title": said["title"],
            "Subject": said["caption"],
            "Creator": "osp_diag",
            "CreationDate": None,
        }
    if suffix == ".svg":
        return {"Title": said["title"], "Description": said["caption"], "Creator": "osp_diag", "Date": None}
    return {"Title": said["title"], "Description": said["caption"], "Software": "osp_diag"}
