"""Block formats once more, value by value in float64: grids as lists, nearest neighbours by search."""

from __future__ import annotations

import numpy as np

FORMATS = ("nvfp4", "mxfp4", "mxfp8", "fp8_block", "int4_g128", "int4_token")
WIDTHS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "fp8_block": 128, "int4_g128": 128, "int4_token": None}


def floating(exponents: range, mantissa_bits: int, top: float) -> np.ndarray:
    """All numbers of a floating type: those below its normal ones, and (1 + m/2ᵇ) · 2ᵉ."""
    parts = 2**mantissa_bits
    small = np.arange(parts) * 2.0 ** (exponents[0] - mantissa_bits)
    normal = [(1 + m / parts) * 2.0**e for e in exponents for m in range(parts)]
    positive = np.array([v for v in (*small, *normal) if v <= top])
    return np.unique(np.concatenate([-positive, positive]))


E2M1 = floating(range(3), 1, 6.0)
E4M3 = floating(range(-6, 9), 3, 448.0)
INT4 = np.arange(-8.0, 8.0)
GRIDS = dict(zip(FORMATS, (E2M1, E2M1, E4M3, E4M3, INT4, INT4), strict=True))


def nearest(grid: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The nearest number of a grid; between two, the one whose place counted from 0 is even."""
    above = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    place = above - np.searchsorted(grid, 0.0)
    tie = np.where(place % 2 == 0, high, low)
    middle = (low + high) / 2
    return np.where(values == middle, tie, np.where(values > middle, high, low))


def scales_of(name: str, peak: np.ndarray, tensor_peak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales of blocks that are not 0, and whether they are below the normal numbers of their type."""
    if name == "nvfp4":
        factor = 448 * 6 / tensor_peak
        held = nearest(E4M3, factor * peak / 6)
        return held / factor, held < 2.0**-6
    if name.startswith("mx"):
        return 2.0 ** (np.floor(np.log2(peak)) - (2 if name == "mxfp4" else 8)), peak < 0
    return peak / (448 if name == "fp8_block" else 7), peak < 0


def slices(channels: int, width: int | None) -> list[slice]:
    width = width or channels
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def crests(block: np.ndarray) -> np.ndarray:
    """Of rows (row, element); NaN of zeros."""
    peak = np.abs(block).max(-1)
    with np.errstate(invalid="ignore"):
        z = block / peak[:, None]
    return 1 / np.sqrt((z**2).mean(-1))


class Rounded:
    """What one format makes of rows of one block (row, element), and the numbers of each row."""

    def __init__(self, name: str, block: np.ndarray, tensor_peak: np.ndarray) -> None:
        peak = np.abs(block).max(-1)
        self.is_zero = peak == 0
        self.peak = safe = np.where(self.is_zero, 1.0, peak)
        scale, small = scales_of(name, safe, np.where(tensor_peak > 0, tensor_peak, 1.0))
        scale, self.is_small = np.where(self.is_zero, 0.0, scale), small & ~self.is_zero
        has_scale = scale > 0
        divisor = np.where(has_scale, scale, 1.0)[:, None]
        values = np.where(has_scale[:, None], nearest(GRIDS[name], block / divisor) * divisor, 0.0)
        error, z = (block - values) / safe[:, None], block / safe[:, None]
        # Energies over the squares of the blocks' peaks.
        self.signal, self.noise = (z**2).sum(-1), (error**2).sum(-1)
        others = np.arange(block.shape[1]) != np.abs(block).argmax(-1)[:, None]
        energy = (z**2 * others).sum(-1)
        self.loss = np.full(len(block), np.nan)
        some = energy > 0
        self.loss[some] = (error**2 * others).sum(-1)[some] / energy[some]
        self.zeroed = ((block != 0) & (values == 0)).sum(-1)
        self.headroom = np.full(len(block), np.nan)
        self.headroom[has_scale] = np.log2((scale * GRIDS[name][-1] / safe)[has_scale])


def bits(blocks: list[Rounded]) -> np.ndarray:
    """Effective bits of each row; NaN of zeros."""
    unit = np.max([b.peak * ~b.is_zero for b in blocks], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        signal, noise = (
            sum(getattr(b, key) * (b.peak / unit) ** 2 * ~b.is_zero for b in blocks)
            for key in ("signal", "noise")
        )
        return np.minimum(12.0, 0.5 * np.log2(signal / noise))


def mean(values: np.ndarray) -> float:
    """Of what is defined; NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def largest(values: np.ndarray) -> float:
    """Of what is defined; NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else np.nan


def smallest(values: np.ndarray) -> float:
    """As :func:`largest`."""
    return -largest(-values)
