"""How far the largest channel of a block stands above the others that share its scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float

from osp_diag.estimators._arrays import (
    Array,
    accumulator_dtype,
    index_range,
    namespace_of,
    quotient,
    row_blocks,
    weighted_row_sum,
)
from osp_diag.estimators.activation import ActivationObservation, max_over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.block_formats import BLOCK_WIDTHS, block_dim, in_blocks
from osp_diag.estimators.block_gaussian import CREST_ON_NOISE
from osp_diag.estimators.block_lens import FAMILY, FORMAT_SOURCES, constants
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.estimators.reductions import power_of_two_below, with_union
from osp_diag.schema import GRADIENT

__all__ = ["BlockCrest", "BlockCrestSums", "crests"]


def crests(rows: Float[Any, "row channel"], width: int) -> Float[Any, "row block"]:
    """max |x| / RMS of each block of channels; 0 for a block of zeros, which has none."""
    xp = namespace_of(rows)
    blocks = in_blocks(rows, width)
    peak = xp.max(xp.abs(blocks), axis=-1)
    unit = power_of_two_below(xp, peak)
    z = blocks / unit[..., None]
    # The last block may be shorter, and is filled up with zeros.
    place = index_range(0, blocks.shape[1], rows)
    size = xp.astype(xp.clip(rows.shape[1] - place * width, 0, width), rows.dtype)
    square = xp.sum(z * z, axis=-1) / size
    return peak / unit / xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))


@dataclass(frozen=True)
class BlockCrestSums(Measurement):
    """Sum over tokens and maximum of each block's crest, and how many tokens have one."""

    name = "block_crest"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        fields = {"maximum": Field(("stratum", "block_width"), "maximum")}
        for width in BLOCK_WIDTHS:
            dims = ("stratum", block_dim(width))
            fields |= {f"total_{width}": Field(dims), f"count_{width}": Field(dims)}
        return fields

    def coords(self) -> Mapping[str, Sequence[Any]]:
        return {"block_width": BLOCK_WIDTHS}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        x, strata = observation.x, observation.strata
        xp = namespace_of(x)
        wide = accumulator_dtype(xp, x)
        rows, parts = xp.reshape(x, (-1, x.shape[-1])), xp.reshape(strata[1:, ...], (strata.shape[0] - 1, -1))
        sums: dict[str, Array] = {}
        largest = []
        for width in BLOCK_WIDTHS:
            tops = []
            for block in row_blocks(rows):
                crest = crests(rows[block, :], width)
                tops.append(xp.max(crest, axis=-1))
                columns = {f"total_{width}": crest, f"count_{width}": xp.astype(crest > 0, crest.dtype)}
                for key, values in columns.items():
                    total = xp.astype(weighted_row_sum(parts[:, block], values), wide)
                    sums[key] = total if key not in sums else sums[key] + total
            top = xp.reshape(xp.concat(tops), strata.shape[1:])
            largest.append(max_over_strata(top, strata * xp.astype(top > 0, strata.dtype)[None, ...]))
        increments = {key: with_union(xp, total, xp.sum) for key, total in sums.items()}
        return increments | {"maximum": xp.stack(largest, axis=1)}


class BlockCrest(Estimator):
    """Largest magnitude of a block of 16, 32 or 128 channels over the block's root mean square.

    What a format with one scale a block has to bridge, whatever the format: 1 where all values of a block are
    equally large, √width where one value is all of it. Mean over tokens and blocks, and the largest;
    ``block_crest_<width>`` is the mean over tokens of each block, of which block b holds the channels from
    b · width on. A block of zeros is left out. The last block of a width that does not divide d is shorter.
    """

    name: ClassVar[str] = "block_crest"
    title: ClassVar[str] = "Crest of a block of channels"
    formula: ClassVar[str] = "mean over tokens and blocks of max_j |x_j| / √(mean_j x_j²), j in the block"
    range: ClassVar[str] = "[1, √width]"
    floor: ClassVar[str] = (
        "1; Gaussian noise gives 2.11 in blocks of 16, 2.37 of 32, 2.83 of 128 (`block_crest_on_noise`)"
    )
    ceiling: ClassVar[str] = "√width: 4, 5.7 and 11.3; one channel that is not 0"
    sources: ClassVar[tuple[Source, ...]] = FORMAT_SOURCES
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Confusable with the crest of a whole token, of which one outlier is most wherever it lies.",
    )
    sites: ClassVar[tuple[str, ...]] = ("*", f"{GRADIENT}*")
    optional: ClassVar[bool] = True
    family: ClassVar[str] = FAMILY

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (BlockCrestSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        maximum = state["block_crest.maximum"]
        xp = namespace_of(maximum)
        dims, coords = ("stratum", "block_width"), {"block_width": BLOCK_WIDTHS}
        mean, by_block = [], {}
        for width in BLOCK_WIDTHS:
            total, count = state[f"block_crest.total_{width}"], state[f"block_crest.count_{width}"]
            mean.append(quotient(xp.sum(total, axis=-1), xp.sum(count, axis=-1)))
            by_block[f"block_crest_{width}"] = Output(
                quotient(total, count),
                ("stratum", block_dim(width)),
                definition=f"mean over tokens of max |x| / RMS of each block of {width} channels",
                floor=1.0,
                ceiling=width**0.5,
            )
        return {
            self.name: Output(xp.stack(mean, axis=-1), dims, "1", self.formula, coords, floor=1.0),
            "block_crest_max": Output(
                maximum_or_nan(maximum), dims, "1", "the largest over tokens and blocks", coords, floor=1.0
            ),
            "block_crest_on_noise": Output(
                constants(CREST_ON_NOISE, maximum[..., 0, :]),
                ("block_width",),
                "1",
                "block_crest of Gaussian noise, simulated: the floor that a site is read against",
                coords,
            ),
            **by_block,
        }
