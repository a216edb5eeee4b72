"""Number formats whose values share a scale by block of channels, simulated.

A block's values are s · q, where q is on the grid of the element type and s on that of the scale's:

- ``E2M1`` (FP4): 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives; ``E4M3`` (FP8): 3 bits of mantissa, up to 448,
  steps of 2⁻⁹ below 2⁻⁶; ``INT4``: −8 to 7. Halves are rounded to the even neighbour, and what lies beyond
  the largest is the largest.
- ``e8m0``: the scale is the largest power of two up to max |x| / divisor, not below 2⁻¹²⁷; ``float32``: the
  scale is max |x| / divisor; ``e4m3``: a scale of two levels. The tensor has g = 448 · 6 / max |x|, in
  float32, and the block's scale is what E4M3 makes of g · max |x| / 6, divided by g.

Of activations (and their gradients) a *tensor* is one sequence, so that no number changes with the batch or
its padding; of weights it is the matrix. The last block of a width that does not divide d is shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, leading_powers_of_two, namespace_of
from osp_diag.estimators.reductions import power_of_two_below

__all__ = [
    "BLOCK_FORMATS",
    "BLOCK_WIDTHS",
    "E2M1",
    "E4M3",
    "INT4",
    "BlockFormat",
    "ElementGrid",
    "block_dim",
    "block_format",
    "block_scales",
    "by_width",
    "check_formats",
    "in_blocks",
    "rounded_to_grid",
    "tensor_peak_by_block",
]

BLOCK_WIDTHS = (16, 32, 128)
"""The numbers of channels that blocks have, where it is not the whole token."""


@dataclass(frozen=True)
class ElementGrid:
    """The numbers that an element can be: whole ones, or floating ones with so many bits of mantissa."""

    bottom: float
    top: float
    mantissa_bits: int | None = None
    smallest_normal: float = 1.0


E2M1 = ElementGrid(-6.0, 6.0, 1)
E4M3 = ElementGrid(-448.0, 448.0, 3, 2.0**-6)
INT4 = ElementGrid(-8.0, 7.0)


@dataclass(frozen=True)
class BlockFormat:
    """One format: which values share a scale, and how both are rounded."""

    name: str
    width: int | None
    """channels of a block; None: all of a token, or of a weight's row"""
    grid: ElementGrid
    scale: Literal["e4m3", "e8m0", "float32"]
    divisor: float
    """what the block's largest magnitude is divided by before the scale is rounded"""
    rows: int = 1
    """how many rows of a weight matrix share a scale; of an activation it is always one token"""


# Which rules of scales, and why not others: docs/decisions.md, Estimators.
BLOCK_FORMATS = {
    entry.name: entry
    for entry in (
        BlockFormat("nvfp4", 16, E2M1, "e4m3", 6.0),
        BlockFormat("mxfp4", 32, E2M1, "e8m0", 4.0),
        BlockFormat("mxfp8", 32, E4M3, "e8m0", 256.0),
        BlockFormat("fp8_block", 128, E4M3, "float32", 448.0, rows=128),
        BlockFormat("int4_g128", 128, INT4, "float32", 7.0),
        BlockFormat("int4_token", None, INT4, "float32", 7.0),
    )
}
"""Name → format. Divisors of ``e8m0`` are the largest power of two on the grid, as the OCP rule is."""


def block_format(name: str) -> BlockFormat:
    """A format by its name.

    Raises
    ------
    EstimatorError : there is none of that name
    """
    if name not in BLOCK_FORMATS:
        raise EstimatorError(f"no block format is named {name!r}; there are {', '.join(BLOCK_FORMATS)}")
    return BLOCK_FORMATS[name]


def check_formats(names: Sequence[str]) -> None:
    """Refuse names of formats that there are not, no name, and one twice.

    Raises
    ------
    EstimatorError : as said
    """
    for name in names:
        block_format(name)
    if not names or len(set(names)) < len(names):
        raise EstimatorError(f"give one block format or more, each once; got {', '.join(names) or 'none'}")


def by_width(names: Sequence[str]) -> dict[int | None, list[str]]:
    """Width → those of the formats that have blocks of so many channels."""
    widths: dict[int | None, list[str]] = {}
    for name in names:
        widths.setdefault(block_format(name).width, []).append(name)
    return widths


def block_dim(width: int) -> str:
    """The name of the dimension over the blocks of ``width`` channels."""
    return f"block_{width}"


def in_blocks(
    rows: Float[Any, "row channel"], width: int | None, height: int = 1
) -> Float[Any, "band block element"]:
    """Rows cut into blocks of ``width`` channels (None: one of all) and ``height`` rows.

    What is missing of the last block of a row, or of the last rows, is filled up with zeros.
    """
    xp = namespace_of(rows)
    rows = _filled_up(_filled_up(rows, 1, width or rows.shape[1]), 0, height)
    if height == 1:
        return xp.reshape(rows, (rows.shape[0], -1, width or rows.shape[1]))
    tiles = xp.reshape(rows, (rows.shape[0] // height, height, -1, width or rows.shape[1]))
    tiles = xp.permute_dims(tiles, (0, 2, 1, 3))
    return xp.reshape(tiles, (*tiles.shape[:2], -1))


def _filled_up(rows: Array, axis: int, multiple: int) -> Array:
    """With zeros at the end of an axis, so that its length is a multiple."""
    missing = -rows.shape[axis] % multiple
    if not missing:
        return rows
    shape = list(rows.shape)
    shape[axis] = missing
    xp = namespace_of(rows)
    zero = xp.zeros_like(rows[:1, :1])
    return xp.concat([rows, xp.broadcast_to(zero, tuple(shape))], axis=axis)


def tensor_peak_by_block(peak: Float[Any, " row"], unit: Float[Any, "row block"]) -> Float[Any, "row block"]:
    """The largest |x| of each row's tensor in the units of its blocks.

    Of blocks 2⁻⁶⁰ below it, which have no scale in NVFP4 by far, less: so the quotient stays in range.
    """
    xp = namespace_of(unit)
    peak = peak[:, None]
    return peak / xp.maximum(unit, 2.0**-60 * power_of_two_below(xp, peak))


def block_scales(
    entry: BlockFormat,
    peak: Float[Any, "row block"],
    tensor_peak: Float[Any, "row block"],
    unit: Float[Any, "row block"],
) -> tuple[Float[Any, "row block"], Float[Any, "row block"]]:
    """The scale of each block, and what its own type holds of it; both are 0 where it vanishes.

    Parameters
    ----------
    peak : the largest |x| of each block, divided by ``unit``
    tensor_peak : that of the tensor which the block is of, divided by the same
    unit : a power of two for each block, which keeps float32 far from its ends
    """
    xp = namespace_of(peak)
    local = peak / entry.divisor
    if entry.scale == "float32":
        return local, local
    if entry.scale == "e8m0":
        lowest = 0.5 * (2.0**-126 / unit)
        scale = xp.where(peak > 0, xp.maximum(leading_powers_of_two(local), lowest), xp.zeros_like(peak))
        return scale, scale
    whole = xp.where(tensor_peak > 0, tensor_peak, xp.ones_like(tensor_peak))
    factor = E4M3.top * E2M1.top / whole
    held = rounded_to_grid(E4M3, factor * local)
    return held / factor, held


def rounded_to_grid(grid: ElementGrid, values: Array) -> Array:
    """Each value's nearest on a grid of elements, halves to even; beyond its ends, the end."""
    xp = namespace_of(values)
    if grid.mantissa_bits is None:
        return xp.clip(xp.round(values), grid.bottom, grid.top)
    # Below the normal numbers steps are as large as just above; what is beyond the top is cut off at last.
    inside = xp.clip(xp.abs(values), grid.smallest_normal, grid.top)
    step = leading_powers_of_two(inside) * 2.0**-grid.mantissa_bits
    return xp.clip(xp.round(values / step) * step, grid.bottom, grid.top)
