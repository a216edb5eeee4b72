"""What rounding to a block format does to rows of blocks: the losses, block by block."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Bool, Float

from osp_diag.estimators._arrays import Array, index_range, namespace_of
from osp_diag.estimators.block_formats import (
    E4M3,
    BlockFormat,
    block_scales,
    rounded_to_grid,
)
from osp_diag.estimators.reductions import power_of_two_below

__all__ = [
    "LARGEST_RATIO",
    "MOST_BITS",
    "ROW_SUMS",
    "SERIOUS_LOSS",
    "BlockLosses",
    "Blocks",
    "block_losses",
    "blocks_of",
    "extremes_of_rows",
    "sums_of_rows",
]

SERIOUS_LOSS = 0.1
"""Blocks whose neighbours lose more than this part of their energy are counted."""
MOST_BITS = 12.0
"""Effective bits end here: a row that a format holds exactly has no other end."""
LARGEST_RATIO = 2.0 ** (2.0 * MOST_BITS)
ROW_SUMS = ("above", "zeroed", "headroom", "scaled", "small_scale", "filled")


class Blocks(NamedTuple):
    """Rows of blocks as every format sees them, each divided by a power of two near its largest value."""

    z: Float[Any, "row block element"]
    unit: Float[Any, "row block"]
    largest: Float[Any, "row block"]
    """the element of the largest magnitude, with its sign; the first of equal ones"""
    is_other: Float[Any, "row block element"]
    """0 at that element, 1 at its neighbours"""
    energy: Float[Any, "row block"]
    """sum of squares of the neighbours"""
    zeros: Float[Any, "row block"]
    """how many elements are 0, those that fill up a shorter block among them"""


class BlockLosses(NamedTuple):
    """What a format does to each block, (row, block)."""

    collateral: Array
    """(error of the neighbours of the largest element)² over their energy; 0 where they are all 0"""
    has_neighbours: Bool[Any, "row block"]
    """whether any element beside the largest is not 0"""
    signal: Array
    """energy of all elements, over unit²"""
    noise: Array
    """squared error of all elements, over unit²"""
    zeroed: Array
    """how many elements that were not 0 are"""
    headroom: Array
    """log₂ of what the block's scale reaches at most over its largest magnitude; 0 without a scale"""
    has_scale: Bool[Any, "row block"]
    """whether the scale is above 0"""
    has_small_scale: Bool[Any, "row block"]
    """whether the block's type of scale cannot hold it in full: below E4M3's normal numbers"""


def blocks_of(blocks: Float[Any, "row block element"]) -> Blocks:
    """What is read of the elements once for all formats of a width."""
    xp = namespace_of(blocks)
    magnitude = xp.abs(blocks)
    unit = power_of_two_below(xp, xp.max(magnitude, axis=-1))
    z = blocks / unit[..., None]
    place = xp.argmax(magnitude, axis=-1)[..., None]
    is_other = xp.astype(index_range(0, blocks.shape[-1], place)[None, None, :] != place, z.dtype)
    others = z * is_other
    return Blocks(
        z=z,
        unit=unit,
        largest=xp.sum(z - others, axis=-1),
        is_other=is_other,
        energy=xp.sum(others * others, axis=-1),
        zeros=z.shape[-1] - xp.astype(xp.count_nonzero(z, axis=-1), z.dtype),
    )


def block_losses(entry: BlockFormat, blocks: Blocks, tensor_peak: Float[Any, "row block"]) -> BlockLosses:
    """The losses of one format.

    Parameters
    ----------
    tensor_peak : the largest |x| of the tensor that the blocks are of, in units of each block
    """
    xp = namespace_of(blocks.z)
    peak = xp.abs(blocks.largest)
    scale, held = block_scales(entry, peak, tensor_peak, blocks.unit)
    has_scale = scale > 0
    nothing, one = xp.zeros_like(peak), xp.ones_like(peak)
    safe = xp.where(has_scale, scale, one)
    y = blocks.z / safe[..., None]
    q = rounded_to_grid(entry.grid, y)
    error = (y - q) * blocks.is_other
    squares = safe * safe
    others = xp.sum(error * error, axis=-1) * squares
    top = blocks.largest / safe
    largest = (top - rounded_to_grid(entry.grid, top)) ** 2 * squares
    zeros = blocks.z.shape[-1] - xp.astype(xp.count_nonzero(q, axis=-1), peak.dtype)
    # Without a scale everything becomes 0.
    others, largest = xp.where(has_scale, others, blocks.energy), xp.where(has_scale, largest, peak * peak)
    zeros = xp.where(has_scale, zeros, blocks.z.shape[-1] * one)
    has_neighbours = blocks.zeros < blocks.z.shape[-1] - 1
    # Neighbours whose squares vanish beside the largest element are below the smallest step of every grid.
    has_energy = blocks.energy > 0
    lost = xp.where(has_energy, others / xp.where(has_energy, blocks.energy, one), one)
    reach = entry.grid.top * safe / xp.where(peak > 0, peak, one)
    return BlockLosses(
        collateral=xp.where(has_neighbours, lost, nothing),
        has_neighbours=has_neighbours,
        signal=blocks.energy + peak * peak,
        noise=others + largest,
        zeroed=zeros - blocks.zeros,
        headroom=xp.where(has_scale, xp.log2(reach), nothing),
        has_scale=has_scale,
        has_small_scale=(held < E4M3.smallest_normal) & (peak > 0) & (entry.scale == "e4m3"),
    )


def sums_of_rows(losses: BlockLosses) -> dict[str, Array]:
    """What is added up over the blocks of each row: (row) each, by the names of ``ROW_SUMS``."""
    xp = namespace_of(losses.collateral)
    dtype = losses.collateral.dtype
    above = losses.has_neighbours & (losses.collateral > SERIOUS_LOSS)
    columns = {
        "above": xp.astype(above, dtype),
        "zeroed": losses.zeroed,
        "headroom": losses.headroom,
        "scaled": xp.astype(losses.has_scale, dtype),
        "small_scale": xp.astype(losses.has_small_scale, dtype),
        "filled": xp.astype(losses.signal > 0, dtype),
    }
    return {key: xp.sum(values, axis=-1) for key, values in columns.items()}


def extremes_of_rows(losses: BlockLosses, unit: Float[Any, "row block"]) -> dict[str, Array]:
    """Worst loss and least headroom of each row's blocks, and the row's signal over noise: (row) each.

    −Inf, Inf and 1 where a row has no such blocks. A row without noise has the ratio ``LARGEST_RATIO``.
    """
    xp = namespace_of(unit)
    infinite = xp.full_like(unit, xp.inf)
    share = (unit / xp.max(unit, axis=-1, keepdims=True)) ** 2
    signal, noise = (xp.sum(part * share, axis=-1) for part in (losses.signal, losses.noise))
    is_inexact = noise > 0
    ratio = signal / xp.where(is_inexact, noise, xp.ones_like(noise))
    ratio = xp.where(is_inexact, ratio, xp.full_like(ratio, LARGEST_RATIO))
    return {
        "worst": xp.max(xp.where(losses.has_neighbours, losses.collateral, -infinite), axis=-1),
        "least_headroom": xp.min(xp.where(losses.has_scale, losses.headroom, infinite), axis=-1),
        "ratio": xp.clip(ratio, 1.0, LARGEST_RATIO),
    }
