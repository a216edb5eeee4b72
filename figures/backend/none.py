"""Draws nothing: records what would be drawn and gives back the data, so that tests assert numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import xarray as xr

from osp_diag.errors import UsageError

__all__ = ["Call", "Canvas", "Panel", "canvas"]

Call = tuple[str, dict[str, Any]]


class Panel:
    """Remembers the primitives called on it, by name."""

    _POSITIONAL: ClassVar[dict[str, tuple[str, ...]]] = {
        "line": ("x", "y"),
        "level": ("value", "text"),
        "scatter": ("x", "y"),
        "heat_map": ("values", "x", "y"),
        "surface": ("values", "x", "y"),
        "ticks": ("axis", "places", "texts"),
        "marks": ("x", "texts"),
        "annotate": ("x", "y", "text"),
        "limits": ("axis", "low", "high"),
        "legend": (),
    }

    def __init__(self, **labels: str) -> None:
        self.labels = labels
        self.calls: list[Call] = []

    def __getattr__(self, primitive: str) -> Any:
        if primitive not in self._POSITIONAL:
            raise AttributeError(f"the backends' panels have no primitive {primitive!r}")
        names = self._POSITIONAL[primitive]

        def record(*values: Any, **options: Any) -> None:
            self.calls.append((primitive, dict(zip(names, values, strict=True)) | options))

        return record


class Canvas:
    """Remembers the panels, colour bars and caption."""

    def __init__(self, rows: int, columns: int, **options: Any) -> None:
        self.shape = (rows, columns)
        self.options = options
        self.panels: dict[tuple[int, int], Panel] = {}
        self.colour_bars: list[dict[str, Any]] = []
        self.text = ""

    def panel(self, row: int, column: int, **labels: str) -> Panel:
        return self.panels.setdefault((row, column), Panel(**labels))

    def legend(self, *panels: Panel) -> None:
        for panel in panels:
            panel.legend()

    def colour_bar(self, panels: Sequence[Panel], **options: Any) -> None:
        self.colour_bars.append({"panels": list(panels), **options})

    def caption(self, text: str) -> None:
        self.text = text

    def finish(self, dataset: xr.Dataset) -> xr.Dataset:
        return dataset

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        raise UsageError(f"the backend `none` returns data and writes no file; cannot write {path}")


def canvas(rows: int, columns: int, **options: Any) -> Canvas:
    """An empty recording."""
    return Canvas(rows, columns, **options)
