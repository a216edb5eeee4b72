"""Colour maps and colour scales that mean the same in every backend.

The maps are Fabio Crameri's (perceptually uniform, readable with colour blindness and in grey), read
from the table that ``cmcrameri`` ships, so that matplotlib and plotly show the very same colours.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from osp_diag.errors import UsageError
from osp_diag.wording import did_you_mean

Kind = Literal["linear", "log", "symlog"]
KINDS: tuple[Kind, ...] = ("linear", "log", "symlog")

__all__ = ["KINDS", "ColourScale", "Kind", "colour_table", "hexadecimal", "sample", "tint"]


@cache
def _directory() -> Path:
    """Where the tables lie, found without importing the package (its import would pull in pyplot)."""
    spec = importlib.util.find_spec("cmcrameri")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("figures need the package `cmcrameri` for their colour maps: pip install cmcrameri")
    return Path(spec.submodule_search_locations[0]) / "cmaps"


@cache
def colour_table(name: str) -> Float[np.ndarray, "entry 3"]:
    """The red, green and blue values in [0, 1] of a map.

    A name ending in ``_r`` is reversed; ``vik:0.1:0.9`` is the part of ``vik`` from 0.1 to 0.9.
    """
    whole, *part = name.split(":")
    if part:
        low, high = (round(float(end) * (len(colour_table(whole)) - 1)) for end in part)
        return colour_table(whole)[low : high + 1]
    stem, reverse = (name[:-2], True) if name.endswith("_r") else (name, False)
    path = _directory() / f"{stem}.txt"
    if not path.is_file():
        names = sorted(file.stem for file in _directory().glob("*.txt"))
        raise UsageError(
            f"no colour map is named {name!r}; {did_you_mean(stem, names, 'add _r to reverse one')}"
        )
    table = np.loadtxt(path)
    return table[::-1] if reverse else table


def hexadecimal(rgb: Float[np.ndarray, "3"]) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb)


def sample(name: str, count: int, low: float = 0.0, high: float = 1.0) -> list[str]:
    """``count`` colours spread evenly over the part [low, high] of a map, as ``#rrggbb``."""
    table = colour_table(name)
    places = np.linspace(low, high, count) * (len(table) - 1)
    return [hexadecimal(table[round(float(place))]) for place in places]


def tint(colour: str, share: float) -> str:
    """``#rrggbb`` mixed with so much white: 0 leaves it, 1 is white."""
    rgb = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return hexadecimal(rgb + share * (1 - rgb))


@dataclass(frozen=True)
class ColourScale:
    """How values become colours: linear, logarithmic, or linear to ``threshold`` and logarithmic beyond."""

    low: float
    high: float
    kind: Kind = "linear"
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a colour scale is one of {', '.join(KINDS)}, not {self.kind!r}")

    @classmethod
    def over(
        cls, *values: Float[np.ndarray, "..."], kind: Kind = "linear", low: float | None = None
    ) -> ColourScale:
        """From the smallest (or ``low``) to the largest finite value; positive ones only if logarithmic."""
        flat = np.concatenate([np.ravel(value) for value in values]) if values else np.zeros(0)
        flat = flat[np.isfinite(flat) & ((flat > 0) if kind == "log" else True)]
        if not flat.size:
            return cls(1.0 if kind == "log" else 0.0, 10.0 if kind == "log" else 1.0, kind)
        bottom = float(flat.min()) if low is None else low
        top = float(flat.max())
        if top <= bottom:
            top = bottom * 10 if kind == "log" else bottom + 1.0
        magnitude = np.abs(flat[flat != 0])
        return cls(bottom, top, kind, float(np.median(magnitude)) if magnitude.size else 1.0)

    def place(self, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Values moved to the axis on which colours are evenly spaced."""
        values = np.asarray(values, dtype=np.float64)
        if self.kind == "linear":
            return values
        if self.kind == "log":
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(values > 0, np.log10(np.maximum(values, self.low)), np.log10(self.low))
        # Linear about 0 with the slope 1 / (threshold · ln 10), logarithmic beyond the threshold.
        return np.sign(values) * np.log10(1 + np.abs(values) / self.threshold)

    def fraction(self, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Where values lie between ``low`` (0) and ``high`` (1) on that axis."""
        # (place(x) − place(low)) / (place(high) − place(low))
        low, high = (float(self.place(np.asarray(end))) for end in (self.low, self.high))
        return np.clip((self.place(values) - low) / (high - low), 0.0, 1.0)

    def ticks(self) -> list[float]:
        """Round values at which the colour bar is labelled."""
        if self.kind == "linear":
            return _round_steps(self.low, self.high)
        decades = np.arange(-12, 13)
        candidates = [float(10.0**decade) for decade in decades]
        if self.kind == "symlog":
            candidates = (
                [-c for c in reversed(candidates) if c >= self.threshold]
                + [0.0]
                + [c for c in candidates if c >= self.threshold]
            )
        inside = [c for c in candidates if self.low <= c <= self.high]
        if len(inside) >= 2 or self.kind == "symlog":
            return inside
        finer = [float(m * 10.0**decade) for decade in decades for m in (1, 2, 5)]
        inside = [c for c in finer if self.low <= c <= self.high]
        return inside if len(inside) >= 2 else [self.low, self.high]


def _round_steps(low: float, high: float) -> list[float]:
    """Four to eight multiples of 1, 2 or 5 × 10ⁿ within [low, high]."""
    rough = (high - low) / 5
    decade = 10.0 ** np.floor(np.log10(rough))
    step = next(m * decade for m in (1, 2, 5, 10) if m * decade >= rough)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [round(float(n * step), 12) + 0.0 for n in np.arange(first, last + 1)]  # + 0.0: no "-0"
